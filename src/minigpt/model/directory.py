"""The directory of a trained model: all that is needed to evaluate, sample and serve it.

config.json holds the configuration, a format number and the SHA-256 of every other file. Nothing in
the directory can run: the weights are safetensors, the tokenizer is text.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialised

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.common.validation import Section, validate
from minigpt.config import ModelConfig, SequencesConfig, TrainConfig, VocabularyConfig
from minigpt.data import tokenizer as tokenizers
from minigpt.data.tokenizer import Tokenizer
from minigpt.model.network import MiniGPT, frequent

FORMAT = 2
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer"
CONFIG = "config.json"
OLD_WEIGHTS = "minigpt.keras"  # of format 1

FILES = {WEIGHTS, *(f"{TOKENIZER}/{name}" for name in (tokenizers.SETTINGS, tokenizers.VOCABULARY))}
SECTIONS: dict[str, type[Section]] = {
    "vocabulary": VocabularyConfig,
    "sequences": SequencesConfig,
    "model": ModelConfig,
    "train": TrainConfig,
}


class OlderFormat(InputError):  # noqa: N818 - named after what the directory has
    """The directory has a format that this code does not read."""


@dataclass(frozen=True)
class ModelDirectory:
    """A loaded model directory.

    Attributes:
        network: The trained network.
        tokenizer: The tokenizer it was trained with.
        config: The sections vocabulary, sequences, model and train, as plain values.
        sha256: The digest of config.json, and so of the whole directory.
    """

    network: MiniGPT
    tokenizer: Tokenizer
    config: dict[str, Any]
    sha256: str


def save(
    path: Path,
    network: MiniGPT,
    tokenizer: Tokenizer,
    sections: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes a model directory; equal weights give equal bytes.

    Args:
        path: Replaced as a whole if it exists.
        network: The trained network.
        tokenizer: The tokenizer it was trained with.
        sections: Plain values of the sections vocabulary, sequences and train.
    """
    weights = {name: ops.convert_to_numpy(weight) for name, weight in _named(network).items()}
    with files.replacing(path) as beside:
        beside.mkdir()
        # Without metadata: safetensors writes several keys in a different order each time. Its own
        # `save_file` hides the file from other users.
        (beside / WEIGHTS).write_bytes(serialised(weights))
        tokenizer.save(beside / TOKENIZER)
        content = {
            "format": FORMAT,
            "config": {**sections, "model": network.config.model_dump(mode="json")},
            "sha256": {name: files.sha256(beside / name) for name in sorted(FILES)},
        }
        files.write_json(beside / CONFIG, content)


def load(path: Path, dtype_policy: str = "") -> ModelDirectory:
    """Reads a model directory, from anywhere.

    Args:
        path: The directory.
        dtype_policy: Of the network; nothing: the one that it was trained with.

    Raises:
        OlderFormat: The directory has another format.
        InputError: A file is missing, altered or malformed, or the files do not fit together.
    """
    content = _content(path)
    for name, expected in content["sha256"].items():
        if not (path / name).is_file():
            raise _broken(path, f"{name} is missing")
        if files.sha256(path / name) != expected:
            raise _broken(path, f"{name} was altered: its sha256 differs from that in {CONFIG}")
    sections = {
        name: validate(section, content["config"][name], name, str(path / CONFIG)).model_dump()
        for name, section in SECTIONS.items()
    }
    config = ModelConfig(**sections["model"])
    tokenizer = tokenizers.load(path / TOKENIZER)
    if config.dtype_policy == "auto":
        raise _broken(path, f"model.dtype_policy in {CONFIG} is auto: a network has one of its own")
    if config.vocabulary_size < len(tokenizer):
        raise _broken(
            path,
            f"its tokenizer has {len(tokenizer)} entries, but model.vocabulary_size in {CONFIG} is "
            f"{config.vocabulary_size}",
        )
    if dtype_policy:
        config = config.model_copy(update={"dtype_policy": dtype_policy})
    return ModelDirectory(_network(path, config), tokenizer, sections, digest(path))


def digest(path: Path) -> str:
    """Returns the SHA-256 of config.json, which holds the digests of all other files."""
    return files.sha256(path / CONFIG)


def export(path: Path, file: Path) -> None:
    """Writes the network as a .keras file, which `keras.saving.load_model` opens.

    Args:
        path: A model directory.
        file: Ends in .keras; replaced if it exists.

    Raises:
        InputError: As for `load`, or the file's name ends in something else.
    """
    if file.suffix != ".keras":
        raise InputError(f"{file}: Keras expects a file whose name ends in .keras")
    network = load(path).network
    with (
        files.replacing(file) as beside,
        tempfile.TemporaryDirectory(dir=file.parent, suffix=".tmp") as folder,
    ):
        written = Path(folder, "model.keras")  # Keras insists on the suffix
        network.save(written)
        written.replace(beside)


def _content(path: Path) -> dict[str, Any]:
    """Returns config.json with its outline checked."""
    if (path / OLD_WEIGHTS).is_file():
        raise OlderFormat(f"{path} has the older format 1; this code reads format {FORMAT}")
    try:
        content = files.read_json(path / CONFIG)
    except (FileNotFoundError, NotADirectoryError):
        raise _broken(path, f"{CONFIG} is missing") from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"{CONFIG} is not JSON: {error}") from None
    given = content if isinstance(content, dict) else {}
    found = given.get("format")
    if type(found) is int and found != FORMAT:
        raise OlderFormat(f"{path} has format {found}; this code reads format {FORMAT}")
    keys = {"config": set(SECTIONS), "sha256": FILES}
    if found != FORMAT or any(not _has_keys(given.get(key), keys[key]) for key in keys):
        wanted = "; ".join(f"{key} with {', '.join(sorted(keys[key]))}" for key in keys)
        raise _broken(path, f"{CONFIG} must hold format {FORMAT}; {wanted}")
    return given


def _has_keys(value: Any, keys: set[str]) -> bool:
    return isinstance(value, dict) and set(value) == keys


def _network(path: Path, config: ModelConfig) -> MiniGPT:
    """Makes the network that a configuration describes and fills in its weights.

    The sizes are compared before any memory is taken: a small file may describe a large network.
    """
    heads, inner = config.num_heads * config.key_dim, config.feed_forward_dim
    rows = frequent(config)
    rows += config.context_length if config.positions == "learned" else 0
    rows += config.num_blocks * (4 * heads + 2 * inner)
    rare = (config.vocabulary_size - frequent(config)) * (1 if config.tied_embeddings else 2)
    least = rows * config.embed_dim + rare * config.tail_dim  # no biases, norms, nor a head
    if 4 * least > (path / WEIGHTS).stat().st_size:
        raise _broken(path, f"{CONFIG} describes more weights than {WEIGHTS} holds")
    network = MiniGPT(config, name="minigpt")
    expected = _named(network)
    try:
        with safe_open(path / WEIGHTS, "np") as stored:
            if differing := sorted(set(stored.keys()) ^ set(expected)):
                names = ", ".join(differing[:3])[:200]
                raise _broken(path, f"{WEIGHTS} lacks weights or has more than described: {names}")
            for name, weight in expected.items():
                tensor, shape = stored.get_slice(name), list(weight.shape)
                found = tensor.get_dtype(), tensor.get_shape()
                if found != ("F32", shape):
                    raise _broken(path, f"{WEIGHTS}: {name} is {found}, not {('F32', shape)}")
                values = stored.get_tensor(name)
                if not np.isfinite(values).all():
                    raise _broken(path, f"{WEIGHTS}: {name} holds values that are not finite")
                weight.assign(values)
    except SafetensorError as error:
        raise _broken(path, f"{WEIGHTS} can't be read: {error}") from None
    return network


def _named(network: MiniGPT) -> dict[str, Any]:
    """Returns the weights by their names, which do not depend on the name of the network."""
    return {weight.path.removeprefix(f"{network.name}/"): weight for weight in network.weights}


def _broken(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not a complete model directory: {reason}; run `dvc repro train`")

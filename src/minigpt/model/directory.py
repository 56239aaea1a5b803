"""The directory of a trained model: all that is needed to evaluate, sample and serve it.

config.json holds the configuration, a format number and the SHA-256 of every other file. Nothing in
the directory can run: the weights are safetensors, the tokenizer is text.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.common.validation import validate
from minigpt.config import ModelConfig
from minigpt.data import tokenizer as tokenizers
from minigpt.data.tokenizer import Tokenizer
from minigpt.model.network import MiniGPT

FORMAT = 2
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer"
CONFIG = "config.json"
OLD_WEIGHTS = "minigpt.keras"  # of format 1


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
    path: Path, network: MiniGPT, tokenizer: Tokenizer, sections: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes a model directory; equal weights give equal bytes.

    Args:
        path: Replaced as a whole if it exists.
        network: The trained network.
        tokenizer: The tokenizer it was trained with.
        sections: Plain values of the sections vocabulary, sequences and train.
    """
    with files.replacing(path) as beside:
        beside.mkdir()
        # Without metadata: safetensors writes several keys in a different order each time.
        save_file(_weights(network), beside / WEIGHTS)
        tokenizer.save(beside / TOKENIZER)
        content = {
            "format": FORMAT,
            "config": {**sections, "model": network.config.model_dump(mode="json")},
            "sha256": {name: files.sha256(beside / name) for name in _names(beside)},
        }
        files.write_json(beside / CONFIG, content)


def load(path: Path) -> ModelDirectory:
    """Reads a model directory, from anywhere.

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
    config = validate(ModelConfig, content["config"]["model"], f"{path / CONFIG}: model")
    tokenizer = tokenizers.load(path / TOKENIZER)
    if config.dtype_policy == "auto" or config.vocabulary_size < len(tokenizer):
        raise _broken(
            path,
            f"its model has vocabulary_size {config.vocabulary_size} and dtype_policy "
            f"{config.dtype_policy}, its tokenizer {len(tokenizer)} entries",
        )
    network = _network(path, config)
    return ModelDirectory(network, tokenizer, content["config"], digest(path))


def digest(path: Path) -> str:
    """Returns the SHA-256 of config.json, which holds the digests of all other files."""
    return files.sha256(path / CONFIG)


def export(path: Path, file: Path) -> None:
    """Writes the network as a .keras file, which `keras.saving.load_model` opens.

    Args:
        path: A model directory.
        file: Ends in .keras.

    Raises:
        InputError: As for `load`, or the file's name ends in something else.
    """
    if file.suffix != ".keras":
        raise InputError(f"{file}: Keras expects a file whose name ends in .keras")
    network = load(path).network
    with files.replacing(file) as beside:
        with_suffix = beside.with_name(f"{beside.name}.keras")  # Keras insists on it
        network.save(with_suffix)
        with_suffix.replace(beside)


def _content(path: Path) -> dict[str, Any]:
    """Returns config.json, its outline checked."""
    if (path / OLD_WEIGHTS).is_file():
        raise OlderFormat(f"{path} has the older format 1; this code reads format {FORMAT}")
    try:
        content = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _broken(path, f"{CONFIG} is missing") from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"{CONFIG} is not JSON: {error}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, int) and found != FORMAT:
        raise OlderFormat(f"{path} has format {found}; this code reads format {FORMAT}")
    if not _has_outline(content):
        raise _broken(path, f"{CONFIG} lacks format, config (with model and vocabulary) or sha256")
    return dict(content)


def _has_outline(content: Any) -> bool:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return False
    config, digests = content.get("config"), content.get("sha256")
    if not isinstance(config, dict) or not isinstance(digests, dict):
        return False
    return isinstance(config.get("model"), dict) and set(digests) == {
        WEIGHTS,
        f"{TOKENIZER}/{tokenizers.SETTINGS}",
        f"{TOKENIZER}/{tokenizers.VOCABULARY}",
    }


def _network(path: Path, config: ModelConfig) -> MiniGPT:
    """Makes the network that a configuration describes and fills in its weights.

    The sizes are compared before any memory is taken: a small file may describe a large network.
    """
    size = (path / WEIGHTS).stat().st_size
    heads, wide = config.num_heads * config.key_dim, config.feed_forward_dim
    rows = config.vocabulary_size + config.context_length
    rows += config.num_blocks * (4 * heads + 2 * wide)
    if 4 * rows * config.embed_dim > size:
        raise _broken(path, f"{CONFIG} describes more weights than {WEIGHTS} holds")
    network = MiniGPT(config, name="minigpt")
    expected = {weight.path: weight for weight in network.weights if weight.trainable}
    try:
        with safe_open(path / WEIGHTS, "np") as stored:
            if set(stored.keys()) != set(expected):
                differing = sorted(set(stored.keys()) ^ set(expected))
                raise _broken(path, f"{WEIGHTS} has other weights than described: {differing[:5]}")
            for name, weight in expected.items():
                array = stored.get_tensor(name)
                if (array.shape, array.dtype) != (tuple(weight.shape), np.float32):
                    raise _broken(path, f"{WEIGHTS}: {name} is {array.dtype} of {array.shape}")
                if not np.isfinite(array).all():
                    raise _broken(path, f"{WEIGHTS}: {name} holds values that are not finite")
                weight.assign(array)
    except SafetensorError as error:
        raise _broken(path, f"{WEIGHTS} can't be read: {error}") from None
    return network


def _weights(network: MiniGPT) -> dict[str, Any]:
    trained = [weight for weight in network.weights if weight.trainable]
    return {weight.path: ops.convert_to_numpy(weight) for weight in trained}


def _names(folder: Path) -> list[str]:
    found = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(found)


def _broken(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not a complete model directory: {reason}; run `dvc repro train`")

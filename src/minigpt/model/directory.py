"""The directory of a trained model: all that is needed to evaluate, sample and serve it."""

import contextlib
import json
import re
import resource
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from keras import ops

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.data.text import STYLES
from minigpt.data.tokenizer import Vocabulary
from minigpt.data.tokenizer import load as load_vocabulary
from minigpt.model.network import MiniGPT

MODEL_FILE = "minigpt.keras"
VOCABULARY_FILE = "vocabulary.txt"
CONFIG_FILE = "config.json"

# What a model file may ask for: those that conf/ gives.
DTYPE_POLICIES = ("float32", "mixed_bfloat16")
MOST_BLOCKS = 1000
READING_BYTES = 2**28  # of memory, beside the weights themselves


@dataclass(frozen=True)
class ModelDirectory:
    """What a model directory holds: all that is needed to evaluate, sample and serve."""

    network: MiniGPT
    vocabulary: Vocabulary
    config: dict[str, Any]


def save(directory: Path, network: MiniGPT, vocabulary: Vocabulary, config: dict[str, Any]) -> None:
    """Writes a model directory, beside its place and then renamed.

    Args:
        directory: replaced whole when it is there.
        network: the trained model.
        vocabulary: the one that it was trained with.
        config: the resolved configuration, plain values only.
    """
    with files.replacing(directory) as beside:
        beside.mkdir()
        network.save(beside / MODEL_FILE)
        _leave_out_times(beside / MODEL_FILE)
        vocabulary.save(beside / VOCABULARY_FILE)
        (beside / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _leave_out_times(path: Path) -> None:
    """Keras writes the time into its file; without it the same weights give the same bytes."""
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    metadata = json.loads(content["metadata.json"]) | {"date_saved": "1980-01-01@00:00:00"}
    content["metadata.json"] = json.dumps(metadata).encode()
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(zipfile.ZipInfo(name), data)  # of 1980, the zip format's first year


def load(directory: Path) -> ModelDirectory:
    """Reads a model directory, from anywhere: no code of its files is run, nothing is unpickled.

    Raises:
        InputError: a file is missing or malformed, or the parts do not fit each other.
    """
    try:
        network = _read_network(directory / MODEL_FILE)
        config = json.loads((directory / CONFIG_FILE).read_text())
        if not isinstance(config, dict) or config["vocabulary"]["style"] not in STYLES:
            raise ValueError(f"{CONFIG_FILE} names no vocabulary.style of {', '.join(STYLES)}")
    except Exception as error:  # zipfile, h5py and Keras raise many kinds for a malformed file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{directory} is not a whole model directory: {reason}; run `dvc repro train`"
        ) from None
    vocabulary = load_vocabulary(directory / VOCABULARY_FILE)
    if len(vocabulary.tokens) > network.settings["vocabulary_size"]:
        raise InputError(
            f"{directory / VOCABULARY_FILE} has {len(vocabulary.tokens)} entries, the model only "
            f"{network.settings['vocabulary_size']}: they are not of one run; run `dvc repro train`"
        )
    return ModelDirectory(network, vocabulary, config)


def _read_network(path: Path) -> MiniGPT:
    """Makes the network that a Keras file describes, and fills in its weights.

    `keras.saving.load_model` would make an object of any Keras class that the file names, with any
    argument, and its safe mode refuses little more than lambdas.  Of this file's description only
    the settings are taken.
    """
    weights_name, size = "model.weights.h5", path.stat().st_size
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{MODEL_FILE}: {entry.filename!r} is compressed; Keras's are not")
        settings, policy = _described(json.loads(archive.read("config.json")), size)
        weights = archive.extract(weights_name, folder)
        network = MiniGPT(**settings, dtype=policy, name="minigpt")
        own = Path(folder, f"own.{weights_name}")
        network.save_weights(own)
        with _memory_limit(2 * size + READING_BYTES):
            _copy_weights(weights, own)
        network.load_weights(own)
    for weight in network.weights:
        if not np.all(np.isfinite(ops.convert_to_numpy(weight))):
            raise ValueError(f"{MODEL_FILE}: {weight.path} holds values that are no numbers")
    return network


def _described(description: dict[str, Any], size: int) -> tuple[dict[str, Any], str]:
    """The settings and the dtype policy that a file of so many bytes describes, checked."""
    if description["registered_name"] != "minigpt>MiniGPT":
        raise ValueError(f"{MODEL_FILE} is no MiniGPT")
    given, settings = description["config"], {}
    for name, kind in MiniGPT.__init__.__annotations__.items():
        if kind not in (int, float, bool):
            continue
        value = settings[name] = given[name]
        known = isinstance(value, bool) if kind is bool else type(value) in {kind, int}
        if not known or (kind is int and value < 1) or (kind is float and not 0 <= value < 1):
            raise ValueError(f"{MODEL_FILE}: {name} is {value!r}")
    s = settings
    heads, wide = s["num_heads"] * s["key_dim"], s["feed_forward_dim"]
    rows = s["vocabulary_size"] + s["context_length"] + s["num_blocks"] * (4 * heads + 2 * wide)
    if s["num_blocks"] > MOST_BLOCKS or 4 * rows * s["embed_dim"] > size:
        raise ValueError(f"{MODEL_FILE} describes more weights than it holds")
    policy = given["dtype"]["config"]["name"]
    if policy not in DTYPE_POLICIES:
        raise ValueError(f"{MODEL_FILE}: its dtype policy is {policy!r}")
    return settings, policy


@contextlib.contextmanager
def _memory_limit(more_bytes: int) -> Iterator[None]:
    """Has this process fail to take more memory than that, on Linux.

    libhdf5 takes as much as a file tells it to.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    taken = re.search(r"VmData:\s+(\d+) kB", status.read_text())
    assert taken
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [1024 * int(taken[1]) + more_bytes, *before]
    least = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (least, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _copy_weights(theirs: str | Path, ours: Path) -> None:
    """Copies weights into a file that we wrote, where they are laid out like those in it.

    A shape may be larger than any memory, a layout of pieces or of links lead to other files.  Each
    name is looked up; a walk over a hostile file need not end.
    """
    with h5py.File(theirs) as given, h5py.File(ours, "r+") as wanted:
        names: list[str] = []
        wanted.visit(names.append)
        for name in names:
            entry, expected = given, wanted[name]
            for part in name.split("/"):
                if not isinstance(entry.get(part, getlink=True), h5py.HardLink):
                    raise ValueError(f"{MODEL_FILE} lacks {name}")
                entry = entry[part]
            stored = isinstance(expected, h5py.Dataset)
            if type(entry) is not type(expected) or (
                stored and (entry.shape, entry.dtype) != (expected.shape, expected.dtype)
            ):
                raise ValueError(f"{MODEL_FILE}: {name} is of another shape or type than described")
            if stored:
                if entry.chunks or entry.external or entry.is_virtual:
                    raise ValueError(f"{MODEL_FILE}: {name} is not stored in one piece")
                expected[()] = entry[()]

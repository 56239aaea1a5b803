"""The model directory: what is saved is loaded, and whatever is wrong ends in one clear error."""

import errno
import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import load_file, save_file

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.data.tokenizer import SPECIAL_TOKENS, WordTokenizer
from minigpt.model import directory
from minigpt.model.directory import CONFIG, WEIGHTS, OlderFormat
from minigpt.model.network import MiniGPT

TOKENIZER = WordTokenizer((*SPECIAL_TOKENS, *(f"word{number}" for number in range(40))), "spaced")
SECTIONS = {
    "vocabulary": {"style": "spaced", "max_tokens": 42},
    "sequences": {"policy": "windows", "length": 20, "validation_fraction": 0.05},
    "train": {"epochs": 1, "batch_size": 4, "learning_rate": 0.001, "seed": 7},
}
SETTINGS, VOCABULARY = "tokenizer/tokenizer.json", "tokenizer/vocabulary.txt"
FIXTURE = Path(__file__).parents[1] / "fixtures" / "version_of_format_1.tar.gz"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, make_network: Any) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    directory.save(path, make_network(num_blocks=1), TOKENIZER, SECTIONS)
    return path


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def values(network: Any) -> list[np.ndarray]:
    return [ops.convert_to_numpy(weight) for weight in network.weights]


def contents(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


def seal(path: Path, change: Callable[[Any], Any] = lambda content: None) -> None:
    """Changes config.json, and gives it the digests of the files as they are."""
    content = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    content["sha256"] = {name: files.sha256(path / name) for name in content["sha256"]}
    change(content)
    files.write_json(path / CONFIG, content)


def refused(path: Path, says: str = "", kind: type[InputError] = InputError) -> None:
    with pytest.raises(kind, match=says) as raised:
        directory.load(path)
    assert type(raised.value) is kind and str(path) in str(raised.value)


# Saving and loading.


@pytest.mark.backend
@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("float32", {"positions": "rotary", "kernels": "matrices", "token_shift": True}),
        ("mixed_bfloat16", {"tied_embeddings": True}),
        # A tail with few weights: far fewer than as many rows of the whole width.
        ("float32", {"vocabulary_size": 1_000, "cutoff": 10, "tail_dim": 1}),
        (
            "float32",
            {"vocabulary_size": 1_000, "cutoff": 10, "tail_dim": 1, "tied_embeddings": True},
        ),
    ],
)
def test_what_is_saved_is_what_is_loaded(
    tmp_path: Path, make_network: Any, dtype: str, changes: Any
) -> None:
    network = make_network(dtype=dtype, **changes)
    directory.save(tmp_path / "model", network, TOKENIZER, SECTIONS)
    loaded = directory.load(tmp_path / "model")
    assert loaded.tokenizer == TOKENIZER
    assert loaded.network.config == network.config
    assert loaded.network.dtype_policy.name == dtype
    for before, after in zip(values(network), values(loaded.network), strict=True):
        np.testing.assert_array_equal(before, after)
    assert loaded.config["sequences"] == {**SECTIONS["sequences"], "shards": 8}  # its default
    assert loaded.config["model"] == network.config.model_dump()
    assert set(loaded.config) == {*SECTIONS, "model"}
    assert loaded.sha256 == directory.digest(tmp_path / "model")


def test_equal_weights_give_equal_bytes(saved: Path, make_network: Any, tmp_path: Path) -> None:
    assert set(contents(saved)) == {CONFIG, WEIGHTS, SETTINGS, VOCABULARY}
    network = make_network(num_blocks=1)
    named = MiniGPT(network.config, name="of_another_name")
    named.set_weights(values(network))
    named.trainable = False
    for again in (network, named):
        directory.save(tmp_path / "again", again, TOKENIZER, SECTIONS)
        assert contents(tmp_path / "again") == contents(saved)
    network.head_bias.assign(network.head_bias + 1)
    directory.save(tmp_path / "again", network, TOKENIZER, SECTIONS)
    assert directory.digest(tmp_path / "again") != directory.digest(saved)


def test_a_directory_that_names_no_choice_of_network_has_the_published_one(
    path: Path, make_network: Any
) -> None:
    def forget(content: Any) -> None:
        for key in ("positions", "kernels"):
            del content["config"]["model"][key]

    seal(path, forget)
    network = make_network(num_blocks=1)
    loaded = directory.load(path).network
    assert loaded.config == network.config
    for before, after in zip(values(network), values(loaded), strict=True):
        np.testing.assert_array_equal(before, after)


def test_other_users_may_read_what_they_may_read_of_any_file(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "any").write_bytes(b"")
    modes = {(saved / name).stat().st_mode for name in contents(saved)}
    assert modes == {(tmp_path / "any").stat().st_mode}


def test_an_old_directory_is_replaced_as_a_whole(path: Path, make_network: Any) -> None:
    (path / "stray.txt").write_text("from another run", encoding="utf-8")
    with pytest.raises(TypeError):
        directory.save(path, make_network(), TOKENIZER, {"not plain": {"": object()}})
    assert (path / "stray.txt").exists()
    directory.load(path)
    directory.save(path, make_network(1, num_blocks=1), TOKENIZER, SECTIONS)
    assert not (path / "stray.txt").exists()
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


def test_keras_opens_an_exported_network(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "exported" / "model.keras"
    directory.export(path, file)
    assert list(file.parent.iterdir()) == [file]
    exported: Any = keras.saving.load_model(file)  # test_backend.py: in another process, too
    network = directory.load(path).network
    tokens = np.arange(20, dtype="int32")[None]
    found, expected = (ops.convert_to_numpy(model(tokens)) for model in (exported, network))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_export_ends_in_keras(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.h5: .* ends in \.keras"):
        directory.export(path, tmp_path / "model.h5")
    assert not (tmp_path / "model.h5").exists()


# Files that are missing or damaged.


def test_a_directory_that_does_not_exist(path: Path) -> None:
    refused(path / "elsewhere", r"config\.json is missing; run `dvc repro train`")
    refused(path / CONFIG, r"config\.json is missing")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, SETTINGS, VOCABULARY])
def test_a_missing_or_damaged_file(path: Path, name: str) -> None:
    content = (path / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    for damaged in (flipped, content[:middle], b""):
        (path / name).write_bytes(damaged)
        refused(path, f"{name} (was altered|is not JSON)")
    (path / name).unlink()
    refused(path, f"{name} is missing; run `dvc repro train`")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not JSON", r"config\.json is not JSON"),
        (b"[" * 100_000, r"config\.json is not JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", r"config\.json is not JSON"),
        (b'{"format": 2}', r"config\.json must hold format 2; config with model, sequences, train"),
        (b"[2]", "must hold format 2"),
        (b"{}", "must hold format 2"),
        (b'{"format": true}', "must hold format 2"),
        (b'{"format": 2, "config": [], "sha256": {}}', "must hold format 2"),
    ],
)
def test_a_malformed_config_json(path: Path, content: bytes, says: str) -> None:
    (path / CONFIG).write_bytes(content)
    refused(path, says)


@pytest.mark.parametrize("number", [1, 3])
def test_another_format(path: Path, number: int) -> None:
    seal(path, lambda content: content.update(format=number))
    refused(path, f"has format {number}; this code reads format 2", OlderFormat)


def test_the_format_before_safetensors(tmp_path: Path) -> None:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    old = tmp_path / "version" / "artifacts" / "model"
    refused(old, "has the older format 1; this code reads format 2", OlderFormat)


def of_section(name: str, **changes: Any) -> Callable[[Any], Any]:
    return lambda content: content["config"][name].update(changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (of_section("model", embed_dim=0), r"model\.embed_dim in .* is 0: allowed is"),
        (of_section("model", embed_dim=True), r"model\.embed_dim in .* is True"),
        (of_section("model", embed_dim="16"), r"model\.embed_dim in .* is '16'"),
        (of_section("model", dropout=float("nan")), r"model\.dropout in .* is nan"),
        (of_section("model", tied_embeddings=1), r"model\.tied_embeddings in .* is 1"),
        (of_section("model", dtype_policy="int8"), r"model\.dtype_policy in .* is 'int8'"),
        (of_section("model", dtype_policy="auto"), r"model\.dtype_policy in .* is auto"),
        (of_section("model", layers=3), r"unknown key model\.layers"),
        (lambda content: content["config"]["model"].pop("key_dim"), r"key_dim in .* is missing"),
        (lambda content: content["config"].update(model=[1]), r"model in .* is \[1\]"),
        (of_section("vocabulary", style="other"), r"vocabulary\.style in .* is 'other'"),
        (of_section("sequences", validation_fraction=2), r"sequences\.validation_fraction in"),
        (of_section("train", epochs=None), r"train\.epochs in .* is None"),
        (lambda content: content["config"].pop("train"), "must hold format 2; config with"),
        (lambda content: content["config"].update(more={}), "must hold format 2; config with"),
        (lambda content: content["sha256"].pop(WEIGHTS), "must hold .* sha256 with tokenizer/"),
        (lambda content: content["sha256"].update({"../x": ""}), "must hold format 2"),
        (of_section("model", vocabulary_size=41), "tokenizer has 42 entries.* is 41"),
        (of_section("model", vocabulary_size=0), "tokenizer has 42 entries.* is 0"),
        # Sizes that would take gigabytes of memory.
        (of_section("model", vocabulary_size=10**7), "describes more weights than .* holds"),
        (of_section("model", vocabulary_size=10**7, cutoff=1), "describes more weights than"),
        (of_section("model", context_length=65_536), "describes more weights than .* holds"),
        (of_section("model", num_heads=16, key_dim=65_536), "describes more weights than"),
        (of_section("model", feed_forward_dim=2**20), "describes more weights than .* holds"),
        (of_section("model", num_blocks=1000), "describes more weights than .* holds"),
    ],
)
def test_a_configuration_that_is_refused(path: Path, change: Any, says: str) -> None:
    seal(path, change)
    refused(path, says)


# Weights that are malformed, although their digest is right.


def renamed(weights: dict[str, np.ndarray]) -> None:
    weights["block_1/query/kernel"] = weights.pop("block_0/query/kernel")


def with_value(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights["head_bias"][3] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights.pop("head_bias"), "lacks weights or has more .* head_bias"),
        (lambda weights: weights.update(more=np.zeros(3)), "lacks weights or has more .* more"),
        (renamed, "lacks weights or has more .* block_0/query/kernel, block_1/query/kernel"),
        (
            lambda weights: weights.update(head_bias=weights["head_bias"][:-1]),
            r"head_bias is \('F32', \[59\]\), not \('F32', \[60\]\)",
        ),
        (
            lambda weights: weights.update(head_bias=weights["head_bias"].astype("float64")),
            r"head_bias is \('F64', \[60\]\)",
        ),
        (with_value(np.nan), "head_bias holds values that are not finite"),
        (with_value(np.inf), "head_bias holds values that are not finite"),
    ],
)
def test_weights_other_than_described(path: Path, change: Any, says: str) -> None:
    weights = load_file(path / WEIGHTS)
    change(weights)
    save_file(weights, path / WEIGHTS)
    seal(path)
    refused(path, says)


def with_header(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    """Changes the JSON with which a safetensors file begins."""

    def changed(content: bytes) -> bytes:
        start = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:start])
        change(header)
        told = json.dumps(header).encode()
        return struct.pack("<Q", len(told)) + told + content[start:]

    return changed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: struct.pack("<Q", 2**40) + content[8:], "can't be read: .*header"),
        (lambda content: content[:8] + b"[" * (len(content) - 8), "can't be read: .*header"),
        (lambda content: content[:-4], "can't be read"),
        (
            with_header(lambda header: header["head_bias"].update(shape=[2**40, 2**40])),
            "can't be read",
        ),
        (
            with_header(lambda header: header["head_bias"].update(dtype="BF16", shape=[120])),
            r"head_bias is \('BF16', \[120\]\)",
        ),
    ],
)
def test_a_malformed_weights_file(path: Path, change: Any, says: str) -> None:
    (path / WEIGHTS).write_bytes(change((path / WEIGHTS).read_bytes()))
    seal(path)
    refused(path, says)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("files.sha256", PermissionError(errno.EACCES, "Permission denied")),
        ("tokenizers.load", OSError(errno.EIO, "Input/output error")),
        ("safe_open", OSError(errno.ENOMEM, "Cannot allocate memory")),
        ("MiniGPT", MemoryError()),
    ],
)
def test_errors_of_the_environment_are_no_fault_of_the_files(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(f"minigpt.model.directory.{name}", fail)
    with pytest.raises(type(error)) as raised:
        directory.load(path)
    assert raised.value is error

"""Files and folders are complete or absent, on a disk that fills up too."""

import contextlib
import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.config import ModelConfig, SequencesConfig
from minigpt.data import corpus, cutting, shards
from minigpt.data.tokenizer import WordTokenizer
from minigpt.model import directory
from minigpt.model.network import MiniGPT
from minigpt.training.checkpoints import Checkpoints


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_a_file_is_replaced_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new/file"
    (tmp_path / "new").mkdir()
    (tmp_path / "new/file.tmp").write_text("of a writer that was killed, and longer")
    with files.replacing(path) as beside:
        beside.write_text("first")
        assert not path.exists()
    with files.replacing(path) as beside:
        beside.write_text("second")
        assert path.read_text() == "first"
    assert content(tmp_path) == {"new": None, "new/file": b"second"}


def test_an_error_that_comes_from_itself_passes(tmp_path: Path) -> None:
    error, other = ValueError("a"), ValueError("b")
    error.__cause__, other.__cause__ = other, error
    with pytest.raises(ValueError, match="a"), files.replacing(tmp_path / "file"):
        raise error


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for name in ("model", "model.tmp", "model.old.tmp"):  # the last two: its writer was killed
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("old")
    with files.replacing(path) as beside:
        beside.mkdir()
        (beside / "new").write_text("new")
        assert content(path) == {"old": b"old"}
    assert content(tmp_path) == {"model": None, "model/new": b"new"}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), files.replacing(path) as beside:
        beside.write_text("half")
        raise error
    assert content(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("Unable to flush (errno = 28, message = 'No space left on device')"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
    ],
)
def test_a_full_disk_is_told_by_name(tmp_path: Path, error: Exception, full: bool) -> None:
    expected = pytest.raises(InputError if full else KeyError)
    with expected as raised, files.replacing(tmp_path / "file"):
        try:
            raise error
        except Exception as inner:
            raise KeyError("what came of it") from inner
    if full:
        assert f"no space left on the disk for {tmp_path}/file: make room" in str(raised.value)


# A disk that is full indeed.

WORDS = WordTokenizer(("", "[UNK]", *(f"word{number:06}" for number in range(40_000))), "spaced")


def write_sequences(path: Path) -> None:
    ids = np.random.default_rng(0).integers(2, 9, 300_000).astype("int32")
    config = SequencesConfig(policy="windows", length=80, validation_fraction=0.0, shards=2)
    reviews = cutting.Encoded(
        corpus.pa.array(["a"]), ids, np.array([0, len(ids)]), np.array([False])
    )
    shards.write(path, [reviews], config=config, tokenizer=WordTokenizer(("", "[UNK]"), "spaced"))


def write_reviews(path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.bytes(1000).hex() for _ in range(400)]
    rows = {"id": [str(n) for n in range(400)], "text": texts}
    rows |= {"split": [""] * 400, "label": [None] * 400, "rating": [None] * 400}
    corpus.write_reviews([corpus.pa.record_batch(rows, schema=corpus.SCHEMA)], path)


def network() -> MiniGPT:
    return MiniGPT(
        ModelConfig(
            vocabulary_size=40_002,
            context_length=8,
            embed_dim=4,
            num_blocks=1,
            num_heads=2,
            key_dim=8,
            feed_forward_dim=16,
            dropout=0.1,
            tied_embeddings=False,
            dtype_policy="float32",
        )
    )


def write_checkpoint(path: Path) -> None:
    import keras

    trained = keras.Sequential([network()])
    trained.compile(optimizer="adam", loss="mse")
    trained.optimizer.build(trained.trainable_variables)
    Checkpoints(path, "a", True).save(trained, step=7)


WRITERS: dict[str, Callable[[Path], None]] = {
    "samples.txt": lambda path: files.write_text(path, "a film " * 100_000),
    "tokenizer": WORDS.save,
    "reviews.parquet": write_reviews,
    "sequences": write_sequences,
    "model": lambda path: directory.save(path, network(), WORDS, {}),
    "checkpoints": write_checkpoint,
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(["mount", *options], capture_output=True).returncode == 0:
            yield folder
            subprocess.run(["umount", str(folder)], check=True)
            return
    pytest.skip("only root can mount a small disk")


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_costs_nothing_and_is_gone_on_from(disk: Path, name: str) -> None:
    path = disk / name
    if name == "checkpoints":
        Checkpoints(path, "a", True)  # its state is small
    elif "." in name:
        path.write_text("old")
    else:
        path.mkdir()
        (path / "old").write_text("old")
    old = content(disk)
    with pytest.raises(InputError, match=f"no space left on the disk for {path}"):
        WRITERS[name](path)
    found = content(disk)
    found.pop("checkpoints/state.json", None)  # begun anew
    assert found == {name: value for name, value in old.items() if "state" not in name}

    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    WRITERS[name](path)
    assert not [left for left in content(disk) if left.endswith(".tmp")]
    assert sum(len(data or b"") for data in content(disk).values()) > 2**17

"""Shards at an address."""

import sys
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.data import sequences, stored

RECORD = (3).to_bytes(8, "little") + b"head" + b"abc" + b"tail"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(storage: str) -> dict[str, Any]:
    """Writes sequences of which only the manifest is here."""
    splits: dict[str, Any] = {"train": {"shards": []}, "validation": {"shards": []}}
    for number, split in enumerate(("train", "train", "validation"), 1):
        file = Path("made")
        file.write_bytes(RECORD * number)
        shard = {"file": f"{split}-{number}", "records": number, "bytes": len(RECORD) * number}
        shard["sha256"] = files.sha256(file)
        shard["address"] = stored.put(file, storage, shard["sha256"])
        splits[split]["shards"].append(shard)
        file.unlink()
    manifest = {"splits": splits, "length": 3, "tokenizer": {"sha256": "a"}}
    files.write_json(Path("sequences/manifest.json"), manifest)
    return manifest


@pytest.mark.parametrize("storage", ["shared/a b", "file://{}/shared", "memory://shards/é"])
def test_a_shard_at_an_address_is_fetched_once_and_read_here(project: Path, storage: str) -> None:
    manifest = write(storage.format(project))
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    assert all(shard["address"].endswith(shard["sha256"]) for shard in shards)
    assert [path.name for path in Path("sequences").iterdir()] == ["manifest.json"]
    steps: list[tuple[int, int | None]] = []

    def progress(done: int, total: int | None) -> None:
        steps.append((done, total))

    found = sequences.verify(Path("sequences"), progress=lambda: progress)
    assert found == manifest and steps == [(1, 3), (2, 3), (3, 3)]
    for shard in shards:
        system, path = fsspec.url_to_fs(shard["address"])
        assert len(system.ls(system._parent(path))) == 3 - shards.index(shard)  # nothing beside
        system.rm(path)
        copy = stored.local_path(Path("sequences"), shard)
        assert files.sha256(copy) == shard["sha256"]
    assert sequences.verify(Path("sequences")) == manifest
    data = sequences._Records(Path("sequences"), manifest["splits"]["train"]["shards"])
    assert data.read(np.arange(3)).tolist() == [b"abc"] * 3


def test_processes_of_a_machine_fetch_a_shard_once(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write("shared")
    got: list[str] = []
    get = LocalFileSystem.get_file

    def get_file(self: Any, path: str, *arguments: Any) -> None:
        got.append(path)
        get(self, path, *arguments)

    monkeypatch.setattr(LocalFileSystem, "get_file", get_file)
    found: list[Any] = []

    def verify(rank: int) -> None:
        found.append(sequences.verify(Path("sequences"), None, rank, 3))

    ranks = [threading.Thread(target=verify, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert found == [manifest] * 3 and len(got) == len(set(got)) == 3


def test_the_cache_may_be_on_another_disk(project: Path) -> None:
    scratch = project / "scratch/shards"
    stored.cache().parent.mkdir(parents=True)
    stored.cache().symlink_to(scratch)
    manifest = write("shared")
    sequences.verify(Path("sequences"))
    shards = {shard["sha256"] for s in manifest["splits"].values() for shard in s["shards"]}
    assert {path.name for path in scratch.iterdir()} - {"lock", "lock.pid"} == shards


def test_the_copies_of_an_experiment_share_what_was_fetched(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stored.cache()
    copy = project / ".dvc/tmp/exps/search/one/in/git"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert stored.cache() == found == project / ".dvc/tmp/shards"


def test_a_wrong_shard_is_named_with_the_way_on(project: Path) -> None:
    shard = write("shared")["splits"]["train"]["shards"][1]
    path = project / "shared" / shard["sha256"]

    def complaint() -> str:
        with pytest.raises(InputError) as caught:
            sequences.verify(Path("sequences"))
        assert not (stored.cache() / shard["sha256"]).exists()
        assert f"file://{path}" in str(caught.value)
        assert "dvc repro -sf sequences" in str(caught.value)
        return str(caught.value)

    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert f"has {len(data) - 1} bytes, not {len(data)}" in complaint()
    path.write_bytes(data[:-1] + b"x")
    assert "was altered" in complaint()
    path.unlink()
    assert "is missing" in complaint()
    path.write_bytes(data)
    sequences.verify(Path("sequences"))
    (stored.cache() / shard["sha256"]).write_bytes(data[:-1])
    with pytest.raises(InputError, match=rf"{shard['sha256']} has .*; delete it, and run this ag"):
        sequences.verify(Path("sequences"))


def test_an_unreachable_store_is_no_fault_of_the_shards(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("shared")

    def unplugged(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("https://me:hunter2@host: no route")

    for name in ("get_file", "put_file"):
        monkeypatch.setattr(LocalFileSystem, name, unplugged)
    for call in (lambda: sequences.verify(Path("sequences")), lambda: stored.check("shared")):
        with pytest.raises(InputError, match=r"can't be reached \(ConnectionError.*network") as e:
            call()
        assert "dvc repro" not in str(e.value) and "hunter2" not in str(e.value)
    with pytest.raises(InputError, match=r"s3://b can't be reached: .*[Ii]nstall"):
        monkeypatch.setitem(sys.modules, "s3fs", None)
        stored.check("s3://b")
    monkeypatch.setattr(LocalFileSystem, "get_file", full)
    with pytest.raises(InputError, match="no space left on the disk"):
        sequences.verify(Path("sequences"))


def full(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_check_leaves_nothing(project: Path) -> None:
    stored.check("shared")
    assert list((project / "shared").iterdir()) == []


def test_an_interrupted_writer_leaves_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("shared")
    before = sorted((project / "shared").iterdir())

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalFileSystem, "mv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stored.put(Path("sequences/manifest.json"), "shared", "other")
    assert sorted((project / "shared").iterdir()) == before

"""Bad input stops its stage with one line and exit code 2, and leaves earlier outputs intact."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ARCHIVE, Project

pytestmark = pytest.mark.pipeline


def contents(project: Project) -> dict[Path, bytes]:
    """All files of all outputs."""
    tops = [project / path for path in project.outs()]
    files = [file for top in tops for file in (top.rglob("*") if top.is_dir() else [top])]
    return {file: file.read_bytes() for file in files if file.is_file()}


Refused = Callable[[str], str]


@pytest.fixture
def refused(project: Project, stage: Callable[[str], int], capsys: Any) -> Refused:
    """Runs a stage that must refuse; returns its one line."""

    def refused(name: str) -> str:
        before = contents(project)
        assert stage(name) == 2
        printed = "".join(capsys.readouterr())
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, printed
        assert "Traceback" not in printed
        assert contents(project) == before
        return lines[0]

    return refused


def test_an_unknown_key(project: Project, refused: Refused) -> None:
    project.edit("params.yaml", r"^  epochs:.*", "  epoch: 1")
    line = refused("compose")
    assert "train.epoch in params.yaml" in line
    assert "did you mean epochs?" in line


def test_an_unknown_key_under_dvc(project: Project) -> None:
    before = contents(project)
    printed = project.dvc("exp", "run", "-S", "+train.epoch=1", code=255)
    assert "error: compose: unknown key train.epoch" in printed
    assert contents(project) == before


def test_a_wrong_checksum(project: Project, refused: Refused) -> None:
    project.edit("resolved.yaml", r"^  sha256: \w+", f"  sha256: {'f' * 64}")
    line = refused("download")
    assert "wrong checksum" in line
    assert "f" * 64 in line


def test_a_wrong_checksum_under_dvc_costs_nothing(project: Project) -> None:
    before, params = contents(project), (project / "params.yaml").read_text()
    project.edit("params.yaml", r"^  sha256: \w+", f"  sha256: {'f' * 64}")
    assert "error: download: " in project.dvc("repro", code=255)
    (project / "params.yaml").write_text(params)
    # DVC removes a stage's outputs before it runs, but has them in its cache.
    assert project.repro() == ["compose"]
    assert contents(project) == before


def test_a_truncated_archive(project: Project, refused: Refused) -> None:
    whole = (project / ARCHIVE).read_bytes()
    (project / ARCHIVE).write_bytes(whole[: len(whole) // 2])
    sha256 = hashlib.sha256(whole[: len(whole) // 2]).hexdigest()
    project.edit("resolved.yaml", r"^  sha256: \w+", f"  sha256: {sha256}")
    assert f"{ARCHIVE} is not a whole .tar.gz archive" in refused("download")


def test_a_folder_that_the_archive_lacks(project: Project, refused: Refused) -> None:
    project.edit("resolved.yaml", "aclImdb/train/neg", "aclImdb/train/none")
    assert "'aclImdb/train/none'" in refused("download")


def test_a_corpus_too_small_for_its_validation_split(project: Project, refused: Refused) -> None:
    project.edit("resolved.yaml", r"^  validation_fraction: .*", "  validation_fraction: 0.0001")
    line = refused("sequences")
    assert "sequences.validation_fraction=0.0001" in line


def test_an_altered_shard(project: Project, refused: Refused) -> None:
    shard = sorted((project / "data/sequences").glob("train-*"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert shard.name in refused("train")


def test_a_tokenizer_that_does_not_match(project: Project, refused: Refused) -> None:
    path = project / "data/tokenizer/vocabulary.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[2], lines[3] = lines[3], lines[2]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert "made with another tokenizer" in refused("train")


def test_a_prompt_of_unknown_words(project: Project, refused: Refused) -> None:
    sample = (project / "resolved.yaml").read_text()
    before, after = sample.rsplit("- this movie is", 1)
    (project / "resolved.yaml").write_text(f"{before}- zyx qwvut{after}")
    assert "'zyx qwvut'" in refused("sample")

"""A small copy of the project, in which the real `dvc` runs."""

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from helpers import ARCHIVE, Project

REPOSITORY = Path(__file__).resolve().parents[2]
REVIEWS_A_FOLDER = 30

# All that makes the pipeline fast; what the tests edit is left to the project's own files.
TINY = """\
# @package _global_
defaults:
  - override /corpus: sample

sequences:
  length: 16
model:
  embed_dim: 16
  key_dim: 8
  feed_forward_dim: 16
train:
  batch_size: 32
  warmup_steps: 0
  preview:
    max_tokens: 8
evaluate:
  reviews: 8
  max_tokens: 8
sample:
  prompts: [this movie is]
  max_tokens: 8
gate:
  max_perplexity: 0
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A clone in which the whole pipeline ran on 120 reviews; leave it as it is."""
    project = Project(tmp_path_factory.mktemp("finished") / "project")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in names.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, project / name)
    _small_archive(project / "data/sample/reviews.tar.gz", project / ARCHIVE)
    sha256 = hashlib.sha256((project / ARCHIVE).read_bytes()).hexdigest()
    (project / "conf/experiment/tiny.yaml").write_text(TINY)
    project.edit("params.yaml", r"^  experiment:(?: null)?", "  experiment: tiny")
    project.edit("params.yaml", r"^  url:.*", f"  url: {ARCHIVE}")
    project.edit("params.yaml", r"^  sha256:.*", f"  sha256: {sha256}")
    project.edit("conf/train/default.yaml", r"^epochs:.*", "epochs: 2")
    for command in ("init --quiet", "config user.name user", "config user.email user@localhost"):
        project.run("git", *command.split())
    project.commit()
    project.dvc("repro")
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of it of one's own, with all that git sees committed."""
    copied = finished.copy(tmp_path / "project")
    copied.commit()
    return copied


def _small_archive(source: Path, target: Path) -> None:
    """The first reviews of each folder, and the members that a reader has to step over."""
    taken: dict[str, int] = {}
    with tarfile.open(source) as whole, tarfile.open(target, "w:gz") as small:
        for member in whole:
            folder = str(Path(member.name).parent)
            taken[folder] = taken.get(folder, 0) + 1
            if taken[folder] <= REVIEWS_A_FOLDER:
                small.addfile(member, whole.extractfile(member) if member.isreg() else None)

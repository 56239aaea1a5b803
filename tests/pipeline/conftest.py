"""A small copy of the project, in which the real `dvc` runs."""

from pathlib import Path

import pytest
from helpers import Project, new_project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A clone in which the whole pipeline ran on 120 reviews; leave it as it is."""
    project = new_project(tmp_path_factory.mktemp("finished") / "project")
    project.dvc("repro")
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of it of one's own, with all that git sees committed."""
    copied = finished.copy(tmp_path / "project")
    copied.commit()
    return copied

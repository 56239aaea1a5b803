"""A small copy of the project, in which the real `dvc` runs."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from filelock import FileLock
from helpers import Project, new_project

from minigpt.stages import __main__ as stages


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Project:
    """A clone in which the whole pipeline ran on 120 reviews; leave it as it is."""
    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":  # the first worker that needs it makes it for all
        shared = shared.parent
    with FileLock(shared / "made.lock"):
        made, done = Project(shared / "made/project"), shared / "made/done"
        if not done.exists():
            new_project(made.root).dvc("repro")
            done.touch()
        return made.copy(tmp_path_factory.mktemp("finished") / "project")


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of it of one's own, with all that git sees committed."""
    copied = finished.copy(tmp_path / "project")
    copied.commit()
    return copied


@pytest.fixture
def stage(
    project: Project, monkeypatch: pytest.MonkeyPatch, clean_environment: None
) -> Callable[[str], int]:
    """Runs a stage as dvc.yaml does, but in this process, which has loaded the libraries."""

    def stage(name: str) -> int:
        monkeypatch.chdir(project.root)
        monkeypatch.setattr(sys, "argv", ["minigpt.stages", name])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with mock.patch.dict(os.environ):
            try:
                return stages.main()
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    return stage

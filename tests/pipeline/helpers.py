"""What the tests of the pipeline share."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from minigpt.common import files

REPOSITORY = Path(__file__).resolve().parents[2]
ARCHIVE = "data/sample/tiny.tar.gz"
REVIEWS_A_FOLDER = 30
DATABASE_PASSWORD = "database-secret"
# Forced, because DVC's cache has what the same training gave before.
TRAIN = ("repro", "--single-item", "--force", "train")

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
checkpointing:
  steps: 4
logging:
  steps: 2
evaluate:
  reviews: 8
  max_tokens: 8
sample:
  prompts: [this movie is]
  max_tokens: 8
gate:
  max_perplexity: 0
"""


class Project:
    """A git repository with the project in it, and what a user does there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = f"sqlite:///{root}/mlflow.db"
        hidden = ("DVC_", "MLFLOW_", "GIT_", "KERAS_", "PYTHON", "PYTEST_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        self.env |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            # Neither the machine's settings nor DVC's memory of files that it has hashed.
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_SYSTEM": os.devnull,
            "DVC_GLOBAL_CONFIG_DIR": str(root.parent / "dvc/global"),
            "DVC_SYSTEM_CONFIG_DIR": str(root.parent / "dvc/system"),
            "DVC_SITE_CACHE_DIR": str(root.parent / "dvc/site"),
        }

    def __truediv__(self, path: str) -> Path:
        return self.root / path

    def options(self, env: dict[str, str]) -> dict[str, Any]:
        """How `subprocess` runs a command here, with all that it prints in one pipe."""
        one_pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return {"cwd": self.root, "env": self.env | env, **one_pipe}

    def run(self, *command: str, code: int = 0, **env: str) -> str:
        """Runs a command, expects its exit code, and returns all that it printed."""
        done = subprocess.run(command, **self.options(env))
        assert done.returncode == code, f"{command} gave {done.returncode}:\n{done.stdout}"
        return done.stdout

    def dvc(self, *arguments: str, code: int = 0, **env: str) -> str:
        return self.run("dvc", *arguments, code=code, **env)

    def repro(self, *arguments: str) -> list[str]:
        """`dvc repro`; returns the stages that ran."""
        return ran(self.dvc("repro", *arguments))

    def stage(self, name: str, code: int = 0) -> str:
        """Runs a stage as dvc.yaml does, but without DVC, which removes its outputs before."""
        return self.run("python", "-m", "minigpt.stages", name, code=code, PYTHONPATH="src")

    def git_status(self) -> set[str]:
        """The files that git reports as changed or new."""
        lines = self.run("git", "status", "--short", "--untracked-files=all").splitlines()
        return {line[3:] for line in lines}

    def commit(self) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--allow-empty", "--message", "as it is")

    def edit(self, path: str, pattern: str, replacement: str) -> None:
        """Edits a file, in which the pattern stands once."""
        text, times = re.subn(pattern, replacement, (self / path).read_text(), flags=re.MULTILINE)
        assert times == 1, f"{pattern!r} stands {times} times in {path}"
        (self / path).write_text(text)

    def yaml(self, path: str) -> Any:
        return yaml.safe_load((self / path).read_text())

    def json(self, path: str) -> Any:
        return json.loads((self / path).read_text())

    def losses(self) -> list[dict[str, float]]:
        """The rows of reports/losses.csv."""
        rows = files.read_csv(self / "reports/losses.csv")
        return [{name: float(figure) for name, figure in row.items()} for row in rows]

    def outs(self) -> dict[str, bool]:
        """The outputs that dvc.yaml names, and whether each is cached."""
        found = {}
        for stage in self.yaml("dvc.yaml")["stages"].values():
            for out in (
                out for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])
            ):
                path, settings = (out, {}) if isinstance(out, str) else next(iter(out.items()))
                found[path] = settings.get("cache", True)
        return found

    def runs(self) -> list[Any]:
        """The MLflow runs, the oldest first."""
        client = self.mlflow()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return list(client.search_runs(experiments, order_by=["start_time"]))

    def mlflow(self) -> Any:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        from mlflow import MlflowClient

        return MlflowClient(self.store)

    def history(self, run: Any, metric: str) -> list[tuple[int, float]]:
        """The points of a metric, as step and value."""
        points = self.mlflow().get_metric_history(run.info.run_id, metric)
        return [(point.step, point.value) for point in points]

    def copy(self, root: Path) -> "Project":
        """The same project elsewhere, with its cache and its MLflow store."""
        shutil.copytree(self.root, root, symlinks=True)
        if (root / "mlflow.db").exists():
            _replace_in_database(root / "mlflow.db", str(self.root), str(root))
        return Project(root)


def new_project(root: Path) -> Project:
    """A clone in which the pipeline, of 120 reviews, has yet to run."""
    project = Project(root)
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
    return project


def ran(printed: str) -> list[str]:
    """The stages that ran, by what `dvc repro` or `dvc exp run` printed."""
    return re.findall(r"^Running stage '(\w+)'", printed, flags=re.MULTILINE)


def start(project: Project, *command: str, **env: str) -> "subprocess.Popen[str]":
    """Starts a command in a process group of its own."""
    return subprocess.Popen(command, **project.options(env), start_new_session=True)


def until(
    running: "subprocess.Popen[str]", happened: Callable[[], Any], every_s: float = 0.01
) -> None:
    """Waits until something has happened, while a command runs that `start` has started."""
    deadline = time.monotonic() + 600
    while not happened():
        if running.poll() is not None or time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            raise AssertionError(running.communicate()[0])
        time.sleep(every_s)


def below(parent: int, part: str) -> set[psutil.Process]:
    """The processes that a process has started and whose command has a part.

    Neither a shell that starts the command (`-c`) is one of them, nor a copy of a process that is
    about to start another command.
    """
    found = set()
    for process in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended since
            command = process.cmdline()
            if part in " ".join(command) and "-c" not in command and not _is_copy(process):
                found.add(process)
    return found


def _is_copy(process: psutil.Process) -> bool:
    """Whether it still is what its parent is, as between fork and exec."""
    above = process.parent()
    return bool(above) and all(
        getattr(process, name)() == getattr(above, name)() for name in ("cmdline", "environ")
    )


def artifact(run: Any, path: str) -> str:
    """The text of an MLflow run's artifact."""
    return (Path(run.info.artifact_uri.removeprefix("file://")) / path).read_text()


def _replace_in_database(path: Path, old: str, new: str) -> None:
    """MLflow keeps absolute paths of artifacts."""
    database = sqlite3.connect(path)
    with database:
        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (table,) in tables:
            for _, column, kind, *_ in database.execute(f"PRAGMA table_info({table})").fetchall():
                if kind.startswith(("VARCHAR", "TEXT")):
                    change = f'UPDATE {table} SET "{column}" = replace("{column}", ?, ?)'
                    database.execute(change, (old, new))
    database.close()


def _small_archive(source: Path, target: Path) -> None:
    """The first reviews of each folder, and the members that a reader has to step over."""
    taken: dict[str, int] = {}
    with tarfile.open(source) as whole, tarfile.open(target, "w:gz") as small:
        for member in whole:
            folder = str(Path(member.name).parent)
            taken[folder] = taken.get(folder, 0) + 1
            if taken[folder] <= REVIEWS_A_FOLDER:
                small.addfile(member, whole.extractfile(member) if member.isreg() else None)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait(running: subprocess.Popen[bytes], action: Callable[[], object]) -> None:
    """Repeats what fails until a server answers, as long as it lives."""
    while running.poll() is None:
        with contextlib.suppress(OSError):
            action()
            return
        time.sleep(0.2)
    raise RuntimeError(f"{running.args!r} ended with {running.returncode}")

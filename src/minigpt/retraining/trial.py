"""A trial of a search: an experiment of DVC in a copy of the project, which ends with its searcher.

`dvc exp run --temp` makes copies too, but it changes the workspace for a moment while it makes one,
and two at once take DVC's lock from each other, one of them after hours of training.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.common import files, paths
from minigpt.common.errors import InputError

COPIES = Path(".dvc/tmp/exps/search")  # where `paths.is_copy` knows it for one
GRACE_S = 60  # for a pipeline to end by itself after SIGINT: a step, a checkpoint, MLflow's answer


class Source(NamedTuple):
    """The project as it was at one moment.

    Attributes:
        top: The folder of the git repository.
        prefix: The project's folder in it.
        commit: HEAD, from which the experiments derive.
        content: A commit with all tracked files; it is HEAD where no file was changed.
        cache: DVC's cache.
    """

    top: Path
    prefix: str
    commit: str
    content: str
    cache: str


def source(root: Path) -> Source:
    """Records the project's tracked files as they are now; nothing is changed.

    Raises:
        InputError: The project isn't in a git repository, or has no commit.
    """
    from dvc.repo import Repo

    commit = content = _git(root, "rev-parse", "HEAD")
    # It also brings the index up to date, without which `stash create` fails in a copied folder.
    if _git(root, "status", "--porcelain", "--untracked-files=no"):
        content = _git(root, "stash", "create")
    with Repo(str(root)) as repo:
        cache = repo.cache.local_cache_dir
    return Source(
        Path(_git(root, "rev-parse", "--show-toplevel")),
        _git(root, "rev-parse", "--show-prefix"),
        commit,
        content,
        cache,
    )


class Trial:
    """A running experiment.

    Its pipeline is interrupted, as by Ctrl-C, when `stop` is called or this process dies.
    """

    def __init__(
        self,
        root: Path,
        made_of: Source,
        name: str,
        settings: Sequence[str],
        env: Mapping[str, str],
    ) -> None:
        """Copies the project and starts the pipeline, whose output is passed on.

        Args:
            root: The project's folder.
            made_of: What is copied.
            name: Of the experiment; it stands before each line of the output.
            settings: As `dvc exp run -S` takes them.
            env: Environment variables.

        Raises:
            InputError: There is an experiment of this name, or git fails.
        """
        if _experiments(root, name):
            raise InputError(
                f"there is an experiment {name} already, of an earlier search: choose another "
                f"name, or `dvc exp remove {name}`"
            )
        self._root, self._name, self._copy = root, name, root / COPIES / name
        self._folder = self._copy / made_of.prefix
        try:
            self._make(made_of)
        except BaseException:
            shutil.rmtree(self._copy, ignore_errors=True)
            raise
        choices = [part for setting in settings for part in ("-S", setting)]
        command = ["dvc", "exp", "run", "--name", name, *choices]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, name, str(self._copy), *command],
            cwd=self._folder,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches the searcher alone
        )

    def _make(self, made_of: Source) -> None:
        """Makes the copy, with what git leaves out: the author, DVC's local settings and cache."""
        from dvc.config import Config

        shutil.rmtree(self._copy, ignore_errors=True)
        clone = ["clone", "--quiet", "--shared", "--no-checkout", str(made_of.top), str(self._copy)]
        _git(self._root, *clone)
        _git(self._copy, "checkout", "--quiet", "--detach", made_of.commit)
        _git(self._copy, "read-tree", "--reset", "-u", made_of.content)
        for key in ("user.name", "user.email"):
            with contextlib.suppress(InputError):  # neither here nor there
                _git(self._copy, "config", key, _git(self._root, "config", key))
        local = Path(".dvc/config.local")
        if (self._root / local).exists():
            shutil.copy(self._root / local, self._folder / local)
        with Config(str(self._folder / ".dvc")).edit("local") as settings:
            settings["cache"]["dir"] = made_of.cache

    def losses(self, column: str) -> list[float]:
        """Returns a column of reports/losses.csv for the epochs that have ended.

        Raises:
            InputError: There is no such column.
        """
        path = self._folder / paths.LOSSES
        # Until the training has begun, a file of the commit may stand there.
        if not (self._folder / paths.CHECKPOINTS).exists() or not path.exists():
            return []
        rows = files.read_csv(path)
        if rows and column not in rows[0]:
            raise InputError(
                f"prune.column of the search: {paths.LOSSES} has no column {column!r}; it has "
                f"{', '.join(rows[0])}"
            )
        return [float(row[column]) for row in rows]

    def poll(self) -> int | None:
        """Returns the exit code, or None while the pipeline runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Asks the pipeline to end."""
        assert self._process.stdin
        self._process.stdin.close()

    def reports(self) -> dict[str, Any]:
        """Returns the content of the reports in JSON, by path."""
        folder = self._folder / paths.REPORTS
        return {
            (paths.REPORTS / file.name).as_posix(): files.read_json(file)
            for file in folder.glob("*.json")
        }

    def keep(self) -> None:
        """Makes the finished experiment one of the project's.

        Raises:
            InputError: git fails.
        """
        for ref in _experiments(self._copy, self._name):
            _git(self._root, "fetch", "--quiet", "--no-tags", str(self._copy), f"{ref}:{ref}")

    def close(self) -> None:
        """Waits for the end of the pipeline and removes the copy."""
        self.stop()
        self._process.wait()
        shutil.rmtree(self._copy, ignore_errors=True)


def _experiments(folder: Path, name: str) -> list[str]:
    """Returns the git references of the experiments of a name, one for each baseline."""
    found = _git(folder, "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{name}")
    return found.split()


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
    )
    if done.returncode:
        raise InputError(f"`git {arguments[0]}` in {folder} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def main() -> int:
    """Runs a command in a session of its own until it ends or standard input does.

    The searcher holds the other end of standard input, so that its death, of whatever kind, stops
    the command. Then the copy is removed too, since nobody else is left to do so.

    Returns:
        The exit code of the command.
    """
    name, copy, *command = sys.argv[1:]
    stopped = threading.Event()

    def watch() -> None:
        while os.read(0, 1):  # nothing is ever written
            pass
        stopped.set()
        # DVC passes over SIGINT while a stage runs, and the stage ends at it.
        for number, wait_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, 0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, number)
            time.sleep(wait_s)

    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as running:
        threading.Thread(target=watch, daemon=True).start()
        assert running.stdout
        for line in running.stdout:  # to its end, which is that of the last stage too
            with contextlib.suppress(OSError):  # nobody reads any more
                sys.stdout.buffer.write(f"{name}: ".encode() + line)
                sys.stdout.buffer.flush()
    if stopped.is_set():
        shutil.rmtree(copy, ignore_errors=True)
    return running.returncode


if __name__ == "__main__":
    sys.exit(main())

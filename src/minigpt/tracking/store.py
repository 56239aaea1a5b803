"""Where runs and models are kept: the address of the MLflow store, and access to it."""

import contextlib
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.db import utils
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from minigpt.common import files, locks
from minigpt.common.errors import InputError
from minigpt.common.redaction import redact
from minigpt.tracking import deadline

SQLITE = "sqlite:///"
FAILURES = (MlflowException, SQLAlchemyError, OSError)  # requests' errors are OSErrors too
LOCK_WAIT_S = 20  # as long as sqlite itself waits for another writer
OPERATION_S = 60  # of all calls of a command
STAGE_S = 300  # of all calls with which `register` sends or registers; OPERATION_S for each
CREATE_S = 300  # of a new database, in dozens of steps of MLflow's


def sqlite_uri(path: Path) -> str:
    """Returns the address of a sqlite file.

    SQLAlchemy takes `?` for the end of the path, and `%` for the start of a quoted character.
    """
    return SQLITE + str(path).replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path | None:
    """Returns the file of a store, or None where the store is not a sqlite file."""
    if not uri.startswith(SQLITE):
        return None
    database = make_url(uri).database
    return Path(database) if database else None


def tracking_uri(root: Path) -> str:
    """Returns the address of the store.

    Args:
        root: The project's folder. DVC runs queued and temporary experiments in a copy of it that
            is deleted afterwards; DVC_ROOT, the repository, takes its place there.

    Returns:
        MLFLOW_TRACKING_URI if it is set, else mlflow.db in the project. Paths are absolute.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    path = sqlite_path(uri)
    if path is None or path.is_absolute():
        return uri
    home = Path(os.environ.get("DVC_ROOT") or root).resolve()
    _, mark, query = uri.partition("?")
    return f"{sqlite_uri(home / path)}{mark}{query}"


def create(uri: str) -> None:
    """Creates a sqlite store if there is none yet; leaves every other store alone.

    MLflow brings a new database to its present schema in dozens of steps. If it is killed between
    two of them, the database is unusable, so it is created beside its place and then renamed.
    """
    path = sqlite_path(uri)
    if path and not path.exists():
        with files.replacing(path) as beside:
            new = sqlite_uri(beside)
            deadline.within(CREATE_S, lambda: MlflowClient(new).search_experiments())


@contextlib.contextmanager
def open_store(uri: str) -> Iterator[MlflowClient]:
    """Yields a client for an operation of at most OPERATION_S; errors become one line for the user.

    Raises:
        InputError: There is no store at this address, or it can't be used.
    """
    path = sqlite_path(uri)
    if path and not path.exists():
        raise InputError(
            f"there is no MLflow store at {redact(uri)}; run `dvc repro`, go to the project's "
            "folder, or set MLFLOW_TRACKING_URI"
        )
    prepare(2)
    operation = deadline.Operation(OPERATION_S)
    with told(uri):
        yield deadline.client(uri, operation.left_s)


@contextlib.contextmanager
def told(uri: str) -> Iterator[None]:
    """Turns the failures of a store into errors for the user; a full disk is none of its failures.

    Raises:
        InputError: The store can't be used.
    """
    try:
        yield
    except FAILURES as error:
        if files.is_full(error):
            raise
        raise InputError(
            f"MLflow at {redact(uri)} can't be used: {reason_of(uri, error)}"
        ) from error


def reason_of(uri: str, error: BaseException) -> str:
    """Returns the first line of an error without credentials, and who has locked the store."""
    if isinstance(error, InputError):
        return str(error)
    line = redact(str(error).strip().split("\n")[0])[:500] or type(error).__name__
    path = sqlite_path(uri)
    late = isinstance(error, deadline.LateError) or "database is locked" in line
    if path and late and (pid := locks.holder(path)):
        line += f"; process {pid} has locked it: wait until it ends, or end it"
    return line


def command(uri: str, *words: str) -> str:
    """Returns a command of MLflow's for people to type, without credentials."""
    return f"MLFLOW_TRACKING_URI={shlex.quote(redact(uri))} {shlex.join(['mlflow', *words])}"


def prepare(retries: int, timeout_s: int | None = None) -> None:
    """Sets what decides how long MLflow tries, and how much it says.

    Args:
        retries: Of a request to a server, unless MLFLOW_HTTP_REQUEST_MAX_RETRIES is set.
        timeout_s: Of a request, unless MLFLOW_HTTP_REQUEST_TIMEOUT is set; None: MLflow's own.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(retries))
    # A server may ask for an hour.
    os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")
    if timeout_s:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout_s))
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one message is enough
    utils.MAX_RETRY_COUNT = 1  # no variable sets this one: 10 attempts take 100 s for a database
    # It would make the folder of the address as it is quoted, perhaps outside of the project.
    utils._make_parent_dirs_if_sqlite = lambda db_uri: None


@contextlib.contextmanager
def lock(uri: str) -> Iterator[None]:
    """Lets one process at a time use a store that is a sqlite file; a server has no lock.

    Raises:
        InputError: Another process keeps the lock.
    """
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    busy = "process {pid} is using the MLflow store: wait until it ends, then run this again"
    with locks.hold(path.with_name(f"{path.name}.lock"), wait_s=LOCK_WAIT_S, busy=busy):
        yield

"""Where runs and models are kept: the address of the MLflow store, and access to it."""

import contextlib
import os
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

SQLITE = "sqlite:///"
FAILURES = (MlflowException, SQLAlchemyError, OSError)  # requests' errors are OSErrors too
LOCK_WAIT_S = 20  # as long as sqlite itself waits for another writer


def sqlite_uri(path: Path) -> str:
    """Returns the address of a sqlite file.

    SQLAlchemy takes `?` for the end of the path, and `%` for the start of a quoted character.
    (MLflow creates the folder of the address as it is quoted, so an empty one appears there too.)
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
            MlflowClient(sqlite_uri(beside)).search_experiments()


@contextlib.contextmanager
def open_store(uri: str) -> Iterator[MlflowClient]:
    """Yields a client whose errors become one line for the user.

    Raises:
        InputError: There is no store at this address, or it can't be used.
    """
    path = sqlite_path(uri)
    if path and not path.exists():
        raise InputError(
            f"there is no MLflow store at {redact(uri)}; run `dvc repro`, go to the project's "
            "folder, or set MLFLOW_TRACKING_URI"
        )
    limit_retries(2)
    try:
        yield MlflowClient(uri)
    except FAILURES as error:
        if files.is_full(error):
            raise
        raise unusable(uri, error) from error


def unusable(uri: str, error: BaseException) -> InputError:
    """Returns the error for a store that fails, with the reason it gave."""
    return InputError(f"MLflow at {redact(uri)} can't be used: {reason(error)}")


def reason(error: BaseException) -> str:
    """Returns the first line of an error, without credentials."""
    return redact(str(error).strip().split("\n")[0])[:500] or type(error).__name__


def limit_retries(retries: int, timeout_s: int | None = None) -> None:
    """Makes MLflow give up a store that fails after seconds rather than minutes.

    Args:
        retries: Of a request to a server, unless MLFLOW_HTTP_REQUEST_MAX_RETRIES is set.
        timeout_s: Of a request, unless MLFLOW_HTTP_REQUEST_TIMEOUT is set; None: MLflow's own.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(retries))
    if timeout_s:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout_s))
    utils.MAX_RETRY_COUNT = 1  # no variable sets this one: 10 attempts take 100 s for a database


@contextlib.contextmanager
def lock(uri: str) -> Iterator[None]:
    """Lets one process at a time use a store that is a sqlite file; a server needs no lock.

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

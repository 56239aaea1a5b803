"""Limits on the wall clock for calls of MLflow, each by itself and all of an operation together.

MLflow's own timeouts hold for one read, so a server that sends a byte a second would keep a caller
for ever.
"""

import contextlib
import contextvars
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, thread
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar, cast

from mlflow import MlflowClient

T = TypeVar("T")

SLOWEST_BYTES_S = 100_000  # of a transfer, which may take a second more for as many bytes


class LateError(TimeoutError):
    """A call did not end in time."""


class Operation:
    """Calls that have to be over in time together; what they transfer puts the end off."""

    def __init__(self, limit_s: float, call_s: float = math.inf) -> None:
        """Begins the operation.

        Args:
            limit_s: How long all calls together may take.
            call_s: How long one of them may take.
        """
        self._end, self._call_s = time.monotonic() + limit_s, call_s

    def left_s(self, sends: int = 0) -> float:
        """Returns how long the next call, which sends as many bytes, may take."""
        more_s = sends / SLOWEST_BYTES_S
        self._end += more_s
        return min(self._call_s + more_s, self._end - time.monotonic())


def within(limit_s: float, action: Callable[[], T], received: Callable[[], int] = lambda: 0) -> T:
    """Runs an action in a thread of its own, and gives it up when its time is over.

    Args:
        limit_s: How long the action may take.
        action: What has nothing to clean up if it never ends.
        received: How many bytes have come so far; they extend the time.

    Raises:
        LateError: The time is over.
    """
    future: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(action))
        except BaseException as error:  # passed on to the caller
            future.set_exception(error)

    began = time.monotonic()
    threading.Thread(target=run, daemon=True).start()
    while not future.done():
        total_s = limit_s + received() / SLOWEST_BYTES_S
        left_s = began + total_s - time.monotonic()
        if left_s <= 0:
            threading._register_atexit(_let_the_process_end)  # type: ignore[attr-defined]
            raise LateError(f"no answer within {round(total_s, 1):g} s")
        wait_for([future], timeout=min(left_s, 1))
    return future.result()


def client(uri: str, left_s: Callable[[int], float]) -> MlflowClient:
    """Returns a client of which each call ends in time.

    Args:
        uri: The address of the store.
        left_s: How long the next call may take, by the bytes that it uploads.
    """
    made = within(left_s(0), lambda: MlflowClient(uri))
    return cast(MlflowClient, _Bounded(made, left_s))


class _Bounded:
    """Stands for a client."""

    def __init__(self, made: MlflowClient, left_s: Callable[[int], float]) -> None:
        self._made, self._left_s = made, left_s

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._made, name)
        if not callable(found):
            return found
        return lambda *args, **kwargs: within(self._left_s(0), lambda: found(*args, **kwargs))

    def log_artifact(self, run_id: str, path: str, folder: str | None = None) -> None:
        limit_s = self._left_s(Path(path).stat().st_size)
        within(limit_s, lambda: self._made.log_artifact(run_id, path, folder))

    def log_model_artifacts(self, model_id: str, folder: str) -> None:
        limit_s = self._left_s(size(Path(folder)))
        within(limit_s, lambda: self._made.log_model_artifacts(model_id, folder))


def size(folder: Path) -> int:
    """Returns the bytes of the files in a folder; a download may rename them meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _let_the_process_end() -> None:
    """Forgets the workers of pools that an unfinished call has started, when Python exits.

    Python would wait for them, though they are daemons like the thread that started them.
    """
    workers: Any = thread._threads_queues
    for worker in [worker for worker in workers if worker.daemon]:
        del workers[worker]

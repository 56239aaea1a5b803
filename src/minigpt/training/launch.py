"""Further processes on this machine, started to train one network together."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from minigpt.common.errors import InputError
from minigpt.training.parallel import Place, World, free_address, joined

GRACE_S = 5  # in which a process ends by itself when another has ended


@contextlib.contextmanager
def launched(processes: int, command: Sequence[str], logs: Path) -> Iterator[World]:
    """Starts further processes on this machine, joins them and ends them.

    Args:
        processes: How many, this one included.
        command: What each of the others runs; it finds its place with `named`.
        logs: A folder for what they print.

    Yields:
        The world of this process, which is the first one.

    Raises:
        InputError: Another process has ended, or all of them would use the same GPUs.
    """
    address = free_address("127.0.0.1")
    logs.mkdir(parents=True, exist_ok=True)
    others, connected = list[_Other](), threading.Event()
    try:
        for rank in range(1, processes):
            place = Place(rank, processes, address)
            others.append(_Other(place, command, logs / f"minigpt-train-{rank}.log"))
        threading.Thread(target=_watch, args=(others, connected), daemon=True).start()
        with joined(Place(0, processes, address)) as world:
            connected.set()
            _check_devices(processes)
            yield world
    except InputError as error:
        if error.__cause__ is None:
            raise
        deadline = time.monotonic() + GRACE_S  # its sockets are closed before it has ended
        while not (lost := _lost(others)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not lost:
            raise
        raise InputError(lost) from error
    finally:
        connected.set()
        deadline = time.monotonic() + GRACE_S
        for other in others:
            other.end(deadline)


class _Other:
    """Another process of the training on this machine."""

    def __init__(self, place: Place, command: Sequence[str], log: Path) -> None:
        self.place, self.log = place, log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                env=os.environ | place.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def lost(self) -> str:
        """Returns what ended it; nothing if it runs or has finished."""
        code = self.process.poll()
        if not code:
            return ""
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        said = f": {lines[-1]}" if lines else ""
        return (
            f"process {self.place.rank} of the {self.place.processes} that train together {how} "
            f"({self.log}{said}); `dvc repro` resumes from the last checkpoint"
        )

    def end(self, deadline: float) -> None:
        """Waits until it has ended, and kills it if it does not: it writes nothing."""
        try:
            self.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _lost(others: Sequence[_Other]) -> str:
    return next((lost for other in others if (lost := other.lost())), "")


def _watch(others: Sequence[_Other], connected: threading.Event) -> None:
    """Ends this process, which can't be interrupted while it waits for the others to connect."""
    while not connected.wait(0.2):
        if lost := _lost(others):
            print(f"error: train: {lost}", file=sys.stderr, flush=True)
            for other in others:
                other.process.kill()
            os._exit(2)


def _check_devices(processes: int) -> None:
    import jax

    if jax.default_backend() != "cpu":
        raise InputError(
            f"engine.workers is {processes}, but one process uses all devices of this machine by "
            "itself: set engine.workers to 1"
        )

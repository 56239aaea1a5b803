"""Several devices and processes that train one network: each takes its rows of every batch.

On the JAX backend, Keras keeps a copy of the weights on each device and adds up the gradients
(data parallelism). A process that has one device and no others beside it is left as it is.
"""

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import keras
import numpy as np

from minigpt.common import backend
from minigpt.common.errors import InputError

T = TypeVar("T")

CONNECT_S = 300  # in which all processes must have started
LOST_S = 30  # after which a process that gives no sign of life ends the others
GRACE_S = 5  # in which a process ends by itself when another has ended

# What JAX raises, with different types, when a process has gone.
_LOST = re.compile("Gloo|NCCL|coordination service")

ADDRESSES = "KERAS_DISTRIBUTION_JOB_ADDRESSES"
PROCESSES = "KERAS_DISTRIBUTION_NUM_PROCESSES"
PROCESS = backend.PROCESS


class Place(NamedTuple):
    """Where a process finds the others.

    Attributes:
        rank: Its number, from 0.
        processes: How many there are.
        address: host:port, on which the first process listens.
    """

    rank: int
    processes: int
    address: str

    def environment(self) -> dict[str, str]:
        """Returns the variables from which `named` reads the place."""
        return {
            ADDRESSES: self.address,
            PROCESSES: str(self.processes),
            PROCESS: str(self.rank),
        }


class World(NamedTuple):
    """What a process knows of the others that train the same network.

    Attributes:
        rank: Its number, from 0. The first one writes; all read.
        processes: How many there are.
        devices: How many devices all of them have.
    """

    rank: int = 0
    processes: int = 1
    devices: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def any(self, asked: bool) -> bool:
        """Returns whether any process asks; each calls this at the same point."""
        return bool(self._gathered(np.array([asked], "int32")).any())

    def agree(self, about: str) -> None:
        """Compares what each process starts from.

        Raises:
            InputError: The processes differ.
        """
        digest = hashlib.sha256(about.encode()).digest()
        found = self._gathered(np.frombuffer(digest, "uint8").astype("int32"))
        if not (found == found[0]).all():
            raise InputError(
                "the processes of this training see different code, data or checkpoints: give "
                "each the same environment, and a project's folder that all of them share"
            )

    def main_first(self, action: Callable[[], T]) -> T:
        """Calls a function in the first process, and then in the others."""
        if not self.is_main:
            self.any(False)  # waits for all
        result = action()
        if self.is_main:
            self.any(False)
        return result

    def _gathered(self, values: Any) -> Any:
        """Returns the values of all processes, (processes, ...)."""
        if self.processes == 1:
            return values[None]
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(values)


SINGLE = World()


def named() -> Place | None:
    """Returns the place that a launcher gives this process in KERAS_DISTRIBUTION_*.

    Raises:
        InputError: A variable is missing or malformed.
    """
    found = {name: os.environ.get(name, "") for name in (ADDRESSES, PROCESSES, PROCESS)}
    if not any(found.values()):
        return None
    address = found[ADDRESSES].split(",")[0]  # JAX needs the first one only
    patterns = {ADDRESSES: r"[^\s:]+:\d+|\[[^\s\]]+\]:\d+", PROCESSES: r"[1-9]\d*", PROCESS: r"\d+"}
    for name, pattern in patterns.items():
        text = address if name == ADDRESSES else found[name]
        if not re.fullmatch(pattern, text):
            wanted = "host:port of process 0" if name == ADDRESSES else "a number"
            raise InputError(
                f"{name} is {found[name]!r}: it must be {wanted}; set all of {list(found)}"
            )
    rank, processes = int(found[PROCESS]), int(found[PROCESSES])
    if rank >= processes:
        raise InputError(f"{PROCESS} is {rank}: it must be below {PROCESSES}, {processes}")
    return Place(rank, processes, address)


def join(place: Place | None) -> World:
    """Connects this process with the others and spreads what Keras makes from now on.

    It is called before anything is computed.

    Args:
        place: Where the others are; None: there are none.

    Raises:
        InputError: The backend is not JAX, or the processes don't find each other.
    """
    processes = place.processes if place else 1
    if keras.backend.backend() != "jax":
        if processes > 1:
            raise InputError(
                f"{PROCESSES} is {processes}, but train.backend is {keras.backend.backend()!r}: "
                "only JAX trains with several processes; `dvc exp run -S train.backend=jax`"
            )
        return SINGLE
    import jax

    if place and processes > 1:
        # Its handler of SIGTERM would replace ours.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                place.address,
                processes,
                place.rank,
                # Slurm's variables would give each process one device.
                cluster_detection_method="deactivate",
                initialization_timeout=CONNECT_S,
                heartbeat_timeout_seconds=LOST_S,
                # JAX would listen on every interface.
                coordinator_bind_address=os.environ.get(
                    "JAX_COORDINATOR_BIND_ADDRESS", place.address
                ),
            )
        except RuntimeError as error:
            raise InputError(
                f"process {place.rank} of {processes} did not find the others at {place.address} "
                f"within {CONNECT_S} s: start all of them, with the same {ADDRESSES} ({error})"
            ) from error
    world = World(jax.process_index(), jax.process_count(), jax.device_count())
    if world.processes != processes:
        raise RuntimeError(f"{processes} processes were started, but JAX sees {world.processes}")
    if world.devices > 1:
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(auto_shard_dataset=False)
        )
    return world


@contextlib.contextmanager
def joined(place: Place | None) -> Iterator[World]:
    """Joins the other processes, and waits at the end until they have finished too.

    Raises:
        InputError: As for `join`, or another process was lost.
    """
    world = join(place)
    try:
        yield world
    except Exception as error:
        if world.processes > 1 and is_lost(error):
            raise InputError(
                f"process {world.rank} of {world.processes} has lost another one, which says why; "
                f"`dvc repro` resumes from the last checkpoint ({str(error).splitlines()[0]})"
            ) from error
        raise
    if world.processes > 1:
        import jax

        jax.distributed.shutdown()


def is_lost(error: BaseException) -> bool:
    """Returns whether an error is what JAX raises when another process has gone."""
    return bool(_LOST.search(str(error)))


def free_address(host: str) -> str:
    """Returns host:port with a port that nobody listens on, for a `Place`."""
    with socket.create_server((host, 0)) as server:
        return f"{host}:{server.getsockname()[1]}"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keeps what Keras makes within on one device of this process."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


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
    others = [
        _Other(Place(rank, processes, address), command, logs / f"minigpt-train-{rank}.log")
        for rank in range(1, processes)
    ]
    connected = threading.Event()
    threading.Thread(target=_watch, args=(others, connected), daemon=True).start()
    try:
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

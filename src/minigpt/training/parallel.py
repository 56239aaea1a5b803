"""Several devices and processes that train one network: each takes its rows of every batch.

On the JAX backend, Keras keeps a copy of the weights on each device and adds up the gradients
(data parallelism). A process that has one device and no others beside it is left as it is.
"""

import contextlib
import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import keras
import numpy as np

from minigpt.common import backend
from minigpt.common.errors import InputError

T = TypeVar("T")

CONNECT_S = 300  # in which all processes must have started
LOST_S = 30  # after which a process that gives no sign of life ends the others

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

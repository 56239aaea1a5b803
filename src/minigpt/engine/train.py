"""Training by Ray: workers are started around one function, and replaced when they are lost."""

import asyncio
import importlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.train import WorkerGroupError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.config import LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.jax import JaxTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minigpt.common import backend
from minigpt.common.errors import InputError
from minigpt.config import EngineConfig
from minigpt.engine import cluster

log = logging.getLogger(__name__)

MOST_LOST = 3  # times in a row that workers are lost without a new checkpoint
FOLDER = Path(".dvc/tmp")  # for what Ray Train writes, of which nothing is read again
LONGEST_REASON = 200  # characters
POLL_S = 0.5
STOP_S = 10  # in which Ray passes on that the workers must stop


def run(engine: EngineConfig, function: Callable[..., None], done: Callable[[], Any]) -> None:
    """Runs a function in `engine.workers` processes that train together.

    They work in the folder of this process, which must be on a file system that all of them see:
    what new workers go on from are the checkpoints there, not Ray's own.

    Args:
        engine: The section `engine`; Ray is connected.
        function: Of a module. It takes a `training.parallel.Place`, or None if there is one worker,
            and a `threading.Event`, after which it soon raises KeyboardInterrupt.
        done: Returns another value once there is a new checkpoint.

    Raises:
        InputError: A worker raised it, or workers died again and again.
        KeyboardInterrupt: SIGINT or SIGTERM arrived; the workers have stopped.
        WorkerGroupError: Workers raised another exception again and again.
    """
    asked = threading.Event()

    def ask(signum: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    lost, before = 0, done()
    while True:
        try:
            return _attempt(engine, function, asked)
        except WorkerGroupError as error:
            for failure in error.worker_failures.values():
                cause = getattr(failure, "_base_exc", failure)
                if isinstance(cause, InputError | KeyboardInterrupt):
                    raise cause from None
            now = done()
            lost, before = (lost + 1 if now == before else 1), now
            for rank, failure in error.worker_failures.items():
                reason = str(failure).strip().splitlines()[-1][:LONGEST_REASON]
                log.warning("worker %s of %s was lost: %s", rank, engine.workers, reason)
            if lost == MOST_LOST:
                failures = error.worker_failures.values()
                if not any(hasattr(failure, "health_check_failure") for failure in failures):
                    raise  # no worker died: what they raised is a fault of the code
                raise InputError(
                    f"workers were lost {MOST_LOST} times in a row without a new checkpoint; find "
                    "out what ends them (a lack of memory?), and `dvc repro` resumes from the last "
                    "checkpoint"
                ) from error
            log.warning("new workers go on from the last checkpoint")


class _Line:
    """An actor through which this process and the workers talk."""

    def __init__(self) -> None:
        self.said: list[tuple[int, str]] = []
        self.listening = 0
        self.stopped = asyncio.Event()

    async def say(self, level: int, text: str) -> None:
        """Takes a line of a worker's log."""
        self.said.append((level, text))

    async def hear(self) -> list[tuple[int, str]]:
        """Returns what was said since the last call."""
        said, self.said = self.said, []
        return said

    async def stop(self) -> int:
        """Stops the workers; returns how many there are."""
        self.stopped.set()
        return self.listening

    async def wait(self) -> None:
        """Returns when the workers must stop."""
        self.listening += 1
        await self.stopped.wait()


def _attempt(engine: EngineConfig, function: Callable[..., None], asked: threading.Event) -> None:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    line: Any = ray.remote(_Line).options(num_cpus=0, scheduling_strategy=here).remote()
    environment = cluster.environment()
    if not engine.use_gpu:
        environment["JAX_PLATFORMS"] = "cpu"
    task = {"folder": os.getcwd(), "environment": environment, "line": line}
    task |= {"module": function.__module__, "function": function.__name__}
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ray-", dir=FOLDER.resolve()) as folder:
        trainer = JaxTrainer(
            _work,
            train_loop_config=task,
            scaling_config=ScalingConfig(
                num_workers=engine.workers,
                use_gpu=engine.use_gpu,
                resources_per_worker={"CPU": engine.cpus_per_worker},
            ),
            run_config=RunConfig(
                storage_path=folder, logging_config=LoggingConfig(log_level="WARNING")
            ),
        )
        try:
            _fit(trainer, line, asked)
        finally:
            ray.kill(line)


def _fit(trainer: JaxTrainer, line: Any, asked: threading.Event) -> None:
    """Runs a trainer beside this thread, so that Ray handles no signals."""
    outcome: list[BaseException] = []
    ended = threading.Event()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            outcome.append(error)
        ended.set()

    threading.Thread(target=fit, daemon=True).start()
    stopping, heard = False, line.hear.remote()
    while not ended.wait(POLL_S):
        heard = _relay(line, heard)
        if asked.is_set() and not stopping:
            stopping = True
            try:
                if not ray.get(line.stop.remote(), timeout=STOP_S):
                    raise KeyboardInterrupt  # no worker has begun
            except ray.exceptions.GetTimeoutError:
                raise KeyboardInterrupt from None
    _relay(line, _relay(line, heard, STOP_S), STOP_S)  # the second time, what came last
    if outcome:
        raise outcome[0]


def _relay(line: Any, heard: Any, wait_s: float = 0) -> Any:
    """Logs what the workers said once it is heard; returns what is heard next."""
    if not ray.wait([heard], timeout=wait_s)[0]:
        return heard
    for level, text in ray.get(heard):
        log.log(level, "%s", text)
    return line.hear.remote()


def _work(task: dict[str, Any]) -> None:
    """Runs in each worker, in a thread."""
    cluster.enter(Path(task["folder"]), task["environment"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    line = task["line"]
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # `run` reports what is raised
    logging.getLogger().addHandler(_Relayed(line, logging.WARNING if rank else logging.INFO))
    stop = threading.Event()

    def listen() -> None:
        ray.get(line.wait.remote())
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    with backend.silenced(), backend.without_the_unused():
        from minigpt.training import parallel

        function = getattr(importlib.import_module(task["module"]), task["function"])
    # Ray's own set-up for JAX leaves processors out: each worker would train alone.
    address = broadcast_from_rank_zero(
        parallel.free_address(ray.util.get_node_ip_address()) if rank == 0 else None
    )
    function(parallel.Place(rank, world, address) if world > 1 else None, stop)


class _Relayed(logging.Handler):
    """Sends what a worker logs to the process that started it."""

    def __init__(self, line: Any, level: int) -> None:
        super().__init__(level)
        self.line = line

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a record."""
        if not record.name.startswith("ray"):
            self.line.say.remote(record.levelno, record.getMessage())

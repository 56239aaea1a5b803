"""Ray, started on this machine or joined where it runs, with what it listens on closed to others.

Ray runs pickled code from whoever reaches its ports. So what is started here listens on loopback
and wants a token that is made for it, and a cluster beyond loopback must want a token too.
"""

import contextlib
import importlib.util
import logging
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import minigpt
from minigpt.common import backend
from minigpt.common.errors import InputError
from minigpt.config import EngineConfig

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
TOKEN_FILE = Path("~/.ray/auth_token")  # where Ray looks if the environment names no token
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # the work has the priority of this process
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # of 60, in which a busy machine starts none
}
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What a worker gets of this process's environment. It travels with the task: Ray writes the
# environments that it sets to its logs, and MLflow's may hold a password.
PREFIXES = ("AWS_", "AZURE_", "DVC_", "GOOGLE_", "KERAS_", "MLFLOW_", "TF_", "XLA_")


@contextlib.contextmanager
def connected(engine: EngineConfig) -> Iterator[None]:
    """Connects this process to Ray, and leaves it at the end.

    Without `engine.address` Ray is started here and ended again, with all its processes, which also
    end when this process is killed.

    Args:
        engine: The section `engine`, whose kind is ray.

    Raises:
        InputError: Ray is not installed, has no such resources, or doesn't answer; or the address
            is beyond loopback and there is no token.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError(
            "engine.kind is ray, but Ray is not installed: run `make ray`, or choose "
            "groups.engine=local"
        )
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with _joined(engine) if engine.address else _started(engine):
        for number, handler in handlers.items():  # Ray has set its own
            signal.signal(number, handler)
        yield


def environment() -> dict[str, str]:
    """Returns what a worker gets of this process's environment."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}


def enter(folder: Path, environment: Mapping[str, str]) -> None:
    """Makes a worker like the process that connected to Ray.

    Args:
        folder: The project's folder, which becomes the working directory.
        environment: What `environment` returned there.

    Raises:
        InputError: This machine does not see the folder.
    """
    if not folder.is_dir():
        raise InputError(
            f"{socket.gethostname()} does not see the project's folder: each machine of "
            f"engine.address needs it at {folder}, such as on a network file system"
        )
    os.chdir(folder)
    os.environ |= environment
    backend.quiet()


@contextlib.contextmanager
def _started(engine: EngineConfig) -> Iterator[None]:
    # Ray reads these once, when it is imported. The first one makes it listen on loopback alone, on
    # any system. Asked for 127.0.0.1 by `_node_ip_address`, it takes an address of the network.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one machine is not drained
    import ray

    # Reservations are counts, not processors: two workers may share the only one.
    cpus = max(backend.processors(), engine.workers * engine.cpus_per_worker)
    with tempfile.TemporaryDirectory(prefix="minigpt-ray-", ignore_cleanup_errors=True) as folder:
        log.info("starting Ray on this machine")
        try:
            _start(num_cpus=cpus, include_dashboard=False, _temp_dir=folder)
            gpus = int(ray.cluster_resources().get("GPU", 0))
            if engine.use_gpu and gpus < engine.workers:
                raise InputError(
                    f"engine.workers is {engine.workers} and engine.use_gpu is true, but this "
                    f"machine has {gpus} GPUs: lower engine.workers, or name a cluster in "
                    "engine.address"
                )
            yield
        finally:
            ray.shutdown()


def _start(**options: Any) -> None:
    """Starts Ray here, and once more if it fails: it waits 30 s, too little on a busy machine."""
    import psutil  # Ray brings it
    import ray

    this = psutil.Process()
    others = set(this.children(recursive=True))
    for is_last in (False, True):
        try:
            return _init("local", **options)
        except Exception as error:  # Ray has no narrower one
            ray.shutdown()
            for process in set(this.children(recursive=True)) - others:  # what it left
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if is_last:
                raise InputError(
                    f"Ray did not start on this machine: {error}\nIt takes at most 30 s: try again "
                    "when the machine is less busy, or choose groups.engine=local"
                ) from error
            log.warning("Ray did not start: %s; trying once more", error)


@contextlib.contextmanager
def _joined(engine: EngineConfig) -> Iterator[None]:
    address = engine.address
    has_token = (
        any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
        or TOKEN_FILE.expanduser().is_file()
    )
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    is_loopback = address.rpartition(":")[0] in {LOOPBACK, "localhost"}
    if not is_loopback and not (has_token and os.environ["RAY_AUTH_MODE"] == "token"):
        raise InputError(
            f"engine.address is {address}, but there is no token: Ray runs code from whoever "
            "reaches its ports. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, here as where the "
            "cluster is started (docs/scale.md)"
        )
    import ray

    log.info("joining Ray at %s", address)
    try:
        _init(address)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(
            f"Ray can't be joined at engine.address {address}: {error}\nStart it there with `ray "
            "start --head`, and on this machine with `ray start --address`, both with the token "
            "that is set here (docs/scale.md)"
        ) from None
    try:
        has = ray.cluster_resources()
        wanted = {"CPU": engine.workers * engine.cpus_per_worker}
        wanted["GPU"] = engine.workers if engine.use_gpu else 0
        for name, count in wanted.items():
            if has.get(name, 0) < count:
                log.warning(
                    "the cluster has %s of the %s %ss of engine.workers, and work waits until it "
                    "has them all",
                    int(has.get(name, 0)),
                    count,
                    name,
                )
        yield
    finally:
        ray.shutdown()


def _init(address: str, **options: Any) -> None:
    """Calls `ray.init` so that workers find this project's code, which may not be installed."""
    import ray

    code = str(Path(minigpt.__file__).parents[1].resolve())
    found = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
    ray.init(
        address,
        runtime_env={"env_vars": {"PYTHONPATH": found}},
        logging_level=logging.WARNING,
        log_to_driver=False,  # it is Ray's own for the most part
        **options,
    )

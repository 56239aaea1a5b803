"""What Keras, TensorFlow and MLflow read from the environment while they are imported."""

import contextlib
import importlib.util
import logging
import os
import platform
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from minigpt.common.errors import InputError

ONEDNN = "TF_ENABLE_ONEDNN_OPTS"
PROCESS = "KERAS_DISTRIBUTION_PROCESS_ID"  # among those that train together, from 0
BACKENDS = ("tensorflow", "jax", "torch")


def choose(wanted: str = "") -> None:
    """Chooses the Keras backend and its kernels, before Keras is imported.

    oneDNN is on unless TF_ENABLE_ONEDNN_OPTS is set. TensorFlow leaves it off on a processor
    without AVX-512, where it makes a training step a quarter faster (benchmarks/README.md).

    Args:
        wanted: The backend of `train.backend`, for the stage that trains; nothing: KERAS_BACKEND,
            or TensorFlow if that is not set.

    Raises:
        InputError: KERAS_BACKEND names another backend than the wanted one, none of Keras's, or one
            that is not installed.
    """
    chosen = os.environ.setdefault("KERAS_BACKEND", wanted or "tensorflow")
    if chosen not in BACKENDS:
        raise InputError(f"KERAS_BACKEND is {chosen!r}: allowed are {', '.join(BACKENDS)}")
    if wanted and chosen != wanted:
        raise InputError(
            f"KERAS_BACKEND is {chosen!r}, but train.backend is {wanted!r}: unset KERAS_BACKEND, "
            f"or train with `dvc exp run -S train.backend={chosen}`"
        )
    if importlib.util.find_spec(chosen) is None:
        raise InputError(f"the Keras backend {chosen} is not installed: `pip install {chosen}`")
    if platform.machine() == "x86_64":  # not measured on others
        os.environ.setdefault(ONEDNN, "1")


def pin() -> None:
    """Keeps the machine's own Keras settings out of a stage, before Keras is imported.

    keras.json in KERAS_HOME may set another float type or epsilon, which no output would show.

    Raises:
        InputError: The environment would cut a training short.
    """
    for name in ("KERAS_MAX_EPOCHS", "KERAS_MAX_STEPS_PER_EPOCH"):
        if os.environ.get(name):
            raise InputError(f"{name} is set and would cut a training short: unset it")
    os.environ.pop("KERAS_NNX_ENABLED", None)
    os.environ["KERAS_HOME"] = os.path.abspath(".dvc/tmp/keras")


def is_main() -> bool:
    """Tells whether this process writes files: the only one of a training, or its first."""
    return os.environ.get(PROCESS, "") in {"", "0"}


def processors() -> int:
    """Returns how many processors this process may use; macOS can't restrict it to some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def leave(code: int) -> NoReturn:
    """Ends the process.

    One of several that train together doesn't wait for the others when it has failed, as JAX would:
    they may be waiting for this one.
    """
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def quiet() -> None:
    """Turns off the log lines, progress bars and telemetry of the libraries."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what fails raises an exception too
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # The address of a run, which MLflow would print, may hold a password.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("jax", "matplotlib"):  # they report on missing hardware, and on a new font cache
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns of each new shape of a text


@contextlib.contextmanager
def importing(interrupted: str) -> Iterator[None]:
    """Wraps the import of the libraries in a command of its own process.

    An exception from a signal handler would leave libraries half imported, so a signal ends the
    process at once.

    Args:
        interrupted: The line that is printed when SIGINT or SIGTERM arrives.
    """
    with silenced() as stderr, without_the_unused():

        def leave(signum: int, frame: FrameType | None) -> None:
            os.write(stderr, f"{interrupted}\n".encode())
            os._exit(130)

        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, leave) for number in numbers}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def import_tensorflow() -> None:
    """Imports TensorFlow where only some of a stage's processes need it."""
    with silenced(), without_the_unused():
        import tensorflow  # noqa: F401


@contextlib.contextmanager
def silenced() -> Iterator[int]:
    """Drops what is written to stderr; yields a descriptor that still reaches it.

    TensorFlow writes to stderr while it is imported, and no setting stops it.
    """
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield stderr
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextlib.contextmanager
def without_the_unused() -> Iterator[None]:
    """Hides packages that Keras and TensorFlow import if they are installed, and no stage uses.

    They take 1.3 of 4.5 s of processor time and 190 MB.
    """
    unused = {"PIL", "jax", "matplotlib", "sklearn"} - {os.environ["KERAS_BACKEND"]}
    unused -= sys.modules.keys()
    sys.modules.update(dict.fromkeys(unused))  # type: ignore[arg-type] # None: not found
    try:
        yield
    finally:
        for name in unused:
            del sys.modules[name]

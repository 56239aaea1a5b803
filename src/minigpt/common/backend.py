"""What Keras, TensorFlow and MLflow read from the environment while they are imported."""

import contextlib
import os
import platform
import signal
import sys
from collections.abc import Iterator
from types import FrameType

ONEDNN = "TF_ENABLE_ONEDNN_OPTS"


def choose() -> None:
    """Chooses the Keras backend and its kernels, before Keras is imported.

    TensorFlow unless KERAS_BACKEND names another, with oneDNN unless TF_ENABLE_ONEDNN_OPTS is set.
    TensorFlow leaves oneDNN off on a processor without AVX-512, where it makes a training step a
    quarter faster (benchmarks/README.md).
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if platform.machine() == "x86_64":  # not measured on others
        os.environ.setdefault(ONEDNN, "1")


def quiet() -> None:
    """Turns off the log lines, progress bars and telemetry of TensorFlow and MLflow."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what fails raises an exception too
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # The address of a run, which MLflow would print, may hold a password.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


@contextlib.contextmanager
def importing(interrupted: str) -> Iterator[None]:
    """Wraps the import of the libraries.

    TensorFlow writes to stderr while it is imported, and no setting stops it. An exception from a
    signal handler would leave libraries half imported, so a signal ends the process at once.

    Args:
        interrupted: The line that is printed when SIGINT or SIGTERM arrives.
    """
    stderr = os.dup(2)

    def leave(signum: int, frame: FrameType | None) -> None:
        os.write(stderr, f"{interrupted}\n".encode())
        os._exit(130)

    handlers = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with without_the_unused():
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        for number, handler in handlers.items():
            signal.signal(number, handler)


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

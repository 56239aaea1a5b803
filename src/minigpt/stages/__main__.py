"""Runs a stage: `python -m minigpt.stages NAME`, in the folder of dvc.yaml."""

import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from minigpt.common import backend, files
from minigpt.common.errors import InputError
from minigpt.stages import guard


def main() -> int:
    """Runs the stage that the first argument names.

    Returns:
        The exit code: 2 for bad input or configuration.
    """
    stage = sys.argv[1]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Libraries read these while they are imported, so a stage is imported after them.
    backend.choose()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what fails raises an exception too
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # The address of the run that MLflow would print may hold a password.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    interrupted = f"error: {stage}: interrupted"
    try:
        with guard.alone(stage):
            guard.check_inputs(stage)
            with _silent_stderr() as stderr, backend.without_the_unused():

                def leave(signum: int, frame: Any) -> None:
                    os.write(stderr, f"{interrupted}\n".encode())
                    os._exit(130)  # libraries half imported can't take an exception

                _on_signals(leave)
                # What is imported stays to the end: to look for garbage in it, meanwhile and when
                # the process ends, took a third of the time of loading TensorFlow and MLflow.
                gc.disable()
                run = importlib.import_module(f"minigpt.stages.{stage}").run
                gc.freeze()
                gc.enable()
            _on_signals(_interrupt)
            run()
    except InputError as error:
        print(f"error: {stage}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except Exception as error:
        if not files.is_full(error):
            raise
        print(f"error: {stage}: no space left on the disk ({error}): make room", file=sys.stderr)
        return 2
    return 0


def _on_signals(handler: Callable[[int, Any], None]) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handler)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _silent_stderr() -> Iterator[int]:
    """TensorFlow reports on CUDA and oneDNN while it is imported, and no setting stops it.

    Yields:
        The descriptor of what stderr was.
    """
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield stderr
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


if __name__ == "__main__":
    sys.exit(main())

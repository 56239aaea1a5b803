"""Runs a stage: `python -m minigpt.stages NAME`, in the folder of dvc.yaml."""

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator

from minigpt.errors import InputError


def main() -> int:
    """Runs the stage that the first argument names.

    Returns:
        The exit code: 2 for bad input or configuration.
    """
    stage = sys.argv[1]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Libraries read these while they are imported, so a stage is imported after them.
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what fails raises an exception too
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # The address of the run that MLflow would print may hold a password.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with _silent_stderr():
        run = importlib.import_module(f"minigpt.stages.{stage}").run
    try:
        run()
    except InputError as error:
        print(f"error: {stage}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"error: {stage}: interrupted", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """TensorFlow reports on CUDA and oneDNN while it is imported, and no setting stops it."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


if __name__ == "__main__":
    sys.exit(main())

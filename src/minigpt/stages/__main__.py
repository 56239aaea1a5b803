"""Runs a stage: `python -m minigpt.stages NAME`, in the folder of dvc.yaml."""

import importlib
import logging
import os
import sys

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
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        importlib.import_module(f"minigpt.stages.{stage}").run()
    except InputError as error:
        print(f"error: {stage}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

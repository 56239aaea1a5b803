"""Runs a stage: `python -m minigpt.stages NAME`, in the folder of dvc.yaml."""

import argparse
import contextlib
import importlib
import logging
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from minigpt import config
from minigpt.common import backend, files, locks
from minigpt.common.errors import InputError

BUSY = (
    "process {pid} runs this stage already in this folder (a killed `dvc repro` leaves its stage "
    "running): wait for it, or end it with `kill`"
)


def main() -> int:
    """Runs the stage that the first argument names.

    Returns:
        The exit code: 2 for bad input or configuration.
    """
    parser = argparse.ArgumentParser("python -m minigpt.stages", description="Runs a stage.")
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    parser.add_argument("stage", choices=names)
    stage = parser.parse_args().stage
    interrupted = f"error: {stage}: interrupted"
    level = logging.INFO if backend.is_main() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    backend.quiet()
    try:
        # The backend decides weights, so the training's is configuration.
        backend.choose(config.load().train.backend if stage == "train" else "")
        backend.pin()
        lock = Path(f".dvc/tmp/minigpt-{stage}.lock")
        with contextlib.ExitStack() as held:
            if backend.is_main():
                held.enter_context(locks.hold(lock, wait_s=10, busy=BUSY))
            with backend.importing(interrupted):
                run = importlib.import_module(f"minigpt.stages.{stage}").run
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _interrupt)
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


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    backend.leave(code)

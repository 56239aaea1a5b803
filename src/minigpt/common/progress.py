"""Progress that a person sees: a bar in a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_EVERY_S = 10

Progress = Callable[[int, int | None], None]  # how much is done, and in all (None while unknown)


def bar(what: str, unit: str, scale: bool = False) -> Progress:
    """Makes a progress bar in a terminal; elsewhere, something that logs a line now and then.

    Args:
        what: The activity, which stands before the bar.
        unit: What is counted.
        scale: Whether the bar abbreviates numbers (1.5M for 1500000).
    """
    if sys.stderr.isatty():
        shown = tqdm(desc=what, unit=unit, unit_scale=scale)

        def show(done: int, total: int | None) -> None:
            shown.total = total
            shown.update(done - shown.n)
            if done == total:
                shown.close()

        return show

    logged = time.monotonic()

    def write(done: int, total: int | None) -> None:
        nonlocal logged
        if done == total or time.monotonic() - logged >= LOG_EVERY_S:
            logged = time.monotonic()
            log.info("%s: %s of %s %s", what, f"{done:,}", f"{total:,}" if total else "?", unit)

    return write

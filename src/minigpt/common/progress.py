"""Progress that a person sees: a bar in a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_EVERY_S = 10


def bar(what: str, unit: str, scale: bool = False) -> Callable[[int, int | None], None]:
    """A progress bar in a terminal, a line now and then elsewhere.

    Args:
        what: is going on.
        unit: what is counted.
        scale: whether the bar writes 1.5M for 1500000.

    Returns:
        A function to call with what is done and, if it is known, what there is in all.
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

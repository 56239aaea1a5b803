"""What the stages share: progress that a person sees, and files that are never half-written."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minigpt import files

log = logging.getLogger(__name__)

LOG_EVERY_S = 10


def progress(what: str, unit: str, scale: bool = False) -> Callable[[int, int | None], None]:
    """A progress bar in a terminal, a line now and then elsewhere.

    Args:
        what: is going on.
        unit: what is counted.
        scale: whether the bar writes 1.5M for 1500000.

    Returns:
        A function to call with what is done and, if it is known, what there is in all.
    """
    if sys.stderr.isatty():
        bar = tqdm(desc=what, unit=unit, unit_scale=scale)

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        return show

    logged = time.monotonic()

    def write(done: int, total: int | None) -> None:
        nonlocal logged
        if done == total or time.monotonic() - logged >= LOG_EVERY_S:
            logged = time.monotonic()
            log.info("%s: %s of %s %s", what, f"{done:,}", f"{total:,}" if total else "?", unit)

    return write


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place, then renames it."""
    with files.replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that a person can read."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

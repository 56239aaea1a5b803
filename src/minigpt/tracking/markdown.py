"""Markdown in which nothing that a model or a person wrote can break the page."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

LITERAL = {ord(character): f"&#{ord(character)};" for character in "<>&\\`*_|[]~@#"}


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table; no content of a cell can end the cell."""
    lines = [header, ["---"] * len(header), *([escape(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escape(value: Any) -> str:
    """Returns a value on one line, which Markdown shows as it is and which notifies nobody.

    GitHub looks for @names and #numbers in the finished page, where escapes are gone; only a space
    without width keeps it from finding them.
    """
    text = " ".join(str(value).split())
    text = re.sub(r"(?<=[@#])(?=\w)|(?<=\bGH)(?=-\d)", "\u200b", text)
    return text.translate(LITERAL)

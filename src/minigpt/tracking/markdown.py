"""Markdown in which nothing that a model or a person wrote can break the page."""

from collections.abc import Iterable, Sequence
from typing import Any

LITERAL = {ord(character): f"&#{ord(character)};" for character in "<>&\\`*_|[]~@#"}


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table; no content of a cell can end the cell."""
    lines = [header, ["---"] * len(header), *([escape(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escape(value: Any) -> str:
    """Returns a value on one line, every character of which Markdown shows as it is."""
    return " ".join(str(value).split()).translate(LITERAL)

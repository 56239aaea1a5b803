"""Limits and checks for every review, from an archive or from the user's own files."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from minigpt.common.errors import InputError
from minigpt.config import CorpusConfig
from minigpt.data import corpus

# Even with spaces around each punctuation mark, such a review fits into an Arrow array (2 GiB).
MAX_REVIEW_BYTES = 2**28
_CHARACTERS_AT_ONCE = 2**26  # of long reviews, a batch holds fewer


def check_limits(config: CorpusConfig, where: object, *, size: int = 0, members: int = 0) -> None:
    """Raises InputError if a corpus holds more than the configuration allows.

    Args:
        config: Its `max_bytes` and `max_members` apply.
        where: The archive or file, for the message.
        size: Bytes read so far.
        members: Members of the archive, or reviews, read so far.
    """
    for key, found, unit in (
        ("max_bytes", size, "bytes"),
        ("max_members", members, "members or reviews"),
    ):
        if found > (most := getattr(config, key)):
            raise InputError(
                f"{where} holds over {most:,} {unit}: if that is intended, raise corpus.{key}."
            )


def check_size(where: object, size: int) -> None:
    """Raises InputError if a review of `size` bytes is too long."""
    if size > MAX_REVIEW_BYTES:
        raise InputError(f"{where} has over {MAX_REVIEW_BYTES:,} bytes, too many for one review.")


def decode(data: bytes, where: str, undecodable: str) -> str:
    """Returns the text of a review, without the byte order mark that some editors write.

    Args:
        data: UTF-8.
        where: The review, for messages.
        undecodable: "fail", or "replace" to put U+FFFD for bytes that are not UTF-8.

    Raises:
        InputError: The text is too long, empty or not UTF-8.
    """
    check_size(where, len(data))
    try:
        text = data.decode("utf-8", "replace" if undecodable == "replace" else "strict")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {error.start} is not UTF-8: correct it, or set "
            "corpus.undecodable=replace."
        ) from error
    text = text.removeprefix("\ufeff")
    if not text or text.isspace():
        raise InputError(f"{where} is empty: add text or remove it.")
    return text


def batches(source: Path, reviews: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    """Yields reviews in batches of `corpus.SCHEMA`.

    Args:
        source: Where they come from, for messages.
        reviews: Rows with the columns of the schema.

    Raises:
        InputError: There is no review, two have the same id, or a value cannot be stored.
    """
    ids: set[str] = set()
    waiting: list[dict[str, Any]] = []
    characters = 0
    for review in reviews:
        if review["id"] in ids:
            raise InputError(f"{source}: the id {review['id']!r} occurs more than once.")
        ids.add(review["id"])
        waiting.append(review)
        characters += len(review["text"])
        if len(waiting) == corpus.REVIEWS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield _batch(source, waiting)
            waiting, characters = [], 0
    if waiting:
        yield _batch(source, waiting)
    if not ids:
        raise InputError(f"{source} holds no reviews.")


def _batch(source: Path, reviews: list[dict[str, Any]]) -> pa.RecordBatch:
    columns = {name: [review[name] for review in reviews] for name in corpus.SCHEMA.names}
    columns["split"] = ["" if value is None else str(value) for value in columns["split"]]
    columns["label"] = [None if value is None else str(value) for value in columns["label"]]
    try:
        # Inferred first and then cast: when asked for int8 directly, Arrow cuts 7.5 to 7.
        ratings = pa.array(columns["rating"]).cast(pa.int8())
        return pa.record_batch(columns | {"rating": ratings}, schema=corpus.SCHEMA)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        if isinstance(error, MemoryError):
            raise
        raise InputError(f"{source}: an id, label or rating cannot be stored: {error}.") from error

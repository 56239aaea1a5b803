"""Limits and checks for every review, from an archive or from the user's own files."""

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from minigpt.common.errors import InputError
from minigpt.config import CorpusConfig
from minigpt.data import corpus

# Even with spaces around each punctuation mark, such a review fits into an Arrow array (2 GiB).
MAX_REVIEW_BYTES = 2**28
_CHARACTERS_AT_ONCE = 2**26  # of long reviews, a batch holds fewer
# Padding makes a small file look like a bomb: up to this size, no ratio counts.
_SMALL_BYTES = 2**20
_BREAK = re.compile("<[bB][rR] />")
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",  # which is how the mark of UTF-32 begins too
    codecs.BOM_UTF16_BE: "UTF-16",
}


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


def check_unpacked(config: CorpusConfig, path: object, packed: int, unpacked: int) -> None:
    """Raises InputError if a compressed file unpacks to more than the configuration allows.

    Args:
        config: Its `max_bytes` and `max_ratio` apply.
        path: The file, for the message.
        packed: Its size in bytes.
        unpacked: Bytes unpacked so far.
    """
    check_limits(config, path, size=unpacked)
    if unpacked > max(packed * config.max_ratio, _SMALL_BYTES):
        raise InputError(
            f"{path} unpacks to over {config.max_ratio:g} times its size, as a bomb does: if that "
            "is intended, raise corpus.max_ratio."
        )


def check_size(where: object, size: int) -> None:
    """Raises InputError if a review of `size` bytes is too long."""
    if size > MAX_REVIEW_BYTES:
        raise InputError(f"{where} has over {MAX_REVIEW_BYTES:,} bytes, too many for one review.")


def decode(data: bytes, where: str, undecodable: str) -> str:
    """Returns bytes as text, without the byte order mark that some editors write.

    Args:
        data: UTF-8.
        where: The review or the line, for messages.
        undecodable: "fail", or "replace" to put U+FFFD for bytes that are not UTF-8.

    Raises:
        InputError: The text is too long or not UTF-8.
    """
    check_size(where, len(data))
    if encoding := _wide_encoding(data):
        raise InputError(
            f"{where} is {encoding}: convert it to UTF-8 (`iconv -f {encoding} -t UTF-8`)."
        )
    try:
        text = data.decode("utf-8", "replace" if undecodable == "replace" else "strict")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {error.start} is not UTF-8: correct it, or set "
            "corpus.undecodable=replace."
        ) from error
    return text.removeprefix("\ufeff")


def decode_review(data: bytes, where: str, config: CorpusConfig) -> str:
    """Returns the text of a review, as `decode` does, with the white space that the corpus has.

    Args:
        data: UTF-8.
        where: The review, for messages.
        config: Its `undecodable` and `white_space` apply.

    Raises:
        InputError: The text is too long, empty or not UTF-8.
    """
    text = decode(data, where, config.undecodable)
    if config.white_space == "collapse":
        text = collapse(text)
    if not text or text.isspace():
        raise InputError(f"{where} is empty: add text or remove it.")
    return text


def collapse(text: str) -> str:
    """Turns `<br />` and each run of ASCII white space into one space, and trims both ends.

    No tokenizer sees a difference, since what it takes for a line break is what the published
    script does: `<br />`, in any case, with exactly one space. So where collapsing would make
    another one, of `<br  />`, two spaces stay.
    """
    words = _BREAK.sub(" ", text).encode().split()  # str.split would split at others too
    return _BREAK.sub(lambda made: made[0].replace(" ", "  "), b" ".join(words).decode())


def _wide_encoding(data: bytes) -> str | None:
    """Returns the name of an encoding in which a character takes at least two bytes, if it is one.

    Without a mark, UTF-16 passes for UTF-8 in many languages: every other byte is a small number, 0
    in English and 4 in Russian.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return encoding
    head = data[:2000]
    if len(head) >= 8 and b"\0" in head:
        small = [sum(byte < 9 for byte in half) / len(half) for half in (head[::2], head[1::2])]
        if max(small) > 0.9 and min(small) < 0.5:
            return "UTF-16"
    return None


def batches(source: object, reviews: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
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


def _batch(source: object, reviews: list[dict[str, Any]]) -> pa.RecordBatch:
    columns = {name: [review[name] for review in reviews] for name in corpus.SCHEMA.names}
    columns["split"] = [as_text(value) or "" for value in columns["split"]]
    columns["label"] = [as_text(value) for value in columns["label"]]
    columns["rating"] = [_rating(value) for value in columns["rating"]]
    try:
        return pa.record_batch(columns, schema=corpus.SCHEMA)
    except UnicodeEncodeError as error:
        raise InputError(f"{source}: an id cannot be stored: {error}.") from error


def as_text(value: Any) -> str | None:
    """Returns a value of any type as valid Unicode; None stays."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value).encode("utf-8", "backslashreplace").decode()


def _rating(value: Any) -> int | None:
    """Returns a rating, or None for one that is no whole number from -128 to 127.

    Nothing that is trained depends on ratings, so one that the column can't hold is left out.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and -128 <= number <= 127 else None

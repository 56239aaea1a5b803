"""Splits text into tokens, and turns tokens back into readable text."""

import functools
import re
import string
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

STYLES = ("published", "spaced", "words")

# In the published script's character class, f"[{string.punctuation}]", the backslash escapes the
# bracket behind it. So it is the only one of the 32 ASCII punctuation characters without a match.
PUNCTUATION = string.punctuation.replace("\\", "")
WHITE_SPACE = " \t\n\v\f\r"

_OTHER, _SPACE, _MARK = range(3)
# By byte; all bytes of a character outside ASCII are above 127 and count as _OTHER.
_KINDS = np.full(256, _OTHER, np.uint8)
_KINDS[list(WHITE_SPACE.encode())] = _SPACE
_KINDS[list(PUNCTUATION.encode())] = _MARK
_LOWER = np.frombuffer(bytes(range(256)).lower(), np.uint8)

_TAGS = {
    style: [np.frombuffer(tag, np.uint8) for tag in tags]
    for style, tags in (
        ("published", [b"<br />"]),
        ("spaced", [b"<br />"]),
        ("words", [b"<br />", b"<br>", b"<br >", b"<br/>"]),
    )
}

# A link, as tokens: the spaces in it are lost, so it ends where a sentence is as likely to begin.
_WORD = r"[^\W_]+"
_DOMAIN = r"(?:com|org|net|edu|gov|info|tv|io|co|uk|de|fr|es|nl|ru|jp|kr|cn|ca|au|br|eu|ch|se|pl)"
_COUNTRY = r"(?:uk|au|jp|kr|br|nz|za|cn|tw|mx|tr)"
_FILE = r"(?:[sx]?html?|php|aspx?|jsp|cgi|pdf|txt|xml|jpe?g|png|gif)"
_LINK = (
    rf"\b(?:(?:https?|ftp) ?: ?/ ?/ ?|www(?= ?\.))(?:{_WORD})?(?: ?[.-] ?{_WORD})*?"
    rf" ?\. ?{_DOMAIN}\b(?: ?\. ?{_COUNTRY}\b)?(?: ?: ?\d+)?"
    rf"(?: ?[/~](?: ?{_WORD})?(?: ?[-_~=+](?: ?{_WORD})?| ?\. ?{_FILE}\b| ?% ?[\da-f]{{2}}\b"
    rf"| ?[?&] ?{_WORD}(?= ?=)| ?# ?{_WORD})*)*"
)
_ENTITY = r"& ?(?:amp|lt|gt|quot|apos|nbsp|# ?x?[\da-f]+) ?;"


def _joined(match: re.Match[str]) -> str:
    return match[0].replace(" ", "")


def _quoted(opens: str, closes: str) -> str:
    """Returns the pattern of a quotation.

    What closes it does not decide how it begins, so that a text does not change as it grows.
    """
    return rf"([{opens}]) ?([^{opens}{closes}]*?)(?: ?([{closes}])|(?=[{opens}])|\Z)"


# Applied in order. Each changes nothing but spaces, and fits the tokens of all styles.
_CLOSE_UP: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (_LINK, _joined),
        (_ENTITY, _joined),
        (r"([-*=_~]) (?=\1)", r"\1"),
        (r"(?<=[\w\]]) (['’]) ?(?=(?:s|t|d|m|re|ve|ll|clock)\b)", r"\1"),  # isn't
        (_quoted('"', '"'), r"\1\2\3"),
        (r"(?<!\S)' ?((?:[^']|(?<=\w)'(?=\w))*?) '(?!\w)", r"'\1'"),
        (r"(?<=\ws) (['’])(?= \w)", r"\1"),  # the actors' names
        (_quoted("„“", "“”"), r"\1\2\3"),
        (rf"{_quoted('«', '»')}|{_quoted('»', '«')}", r"\1\2\3\4\5\6"),
        (rf"{_quoted('‹', '›')}|{_quoted('›', '‹')}", r"\1\2\3\4\5\6"),
        (r"([‚‘]) ?((?:[^‚‘’]|(?<! )’)*?)(?: ([‘’])|(?=[‚‘])|\Z)", r"\1\2\3"),
        (r"(?<!\S)([¿¡]) (?=[\w\[])", r"\1"),
        (r"(?<=\w) ’ ?(?=\w)", "’"),  # d’un
        (r" +(?=[.,;:!?)\]}%…”،؛؟।、。，！？：；）」』】》])", ""),
        (r"(?<=[(\[{（「『【《]) +", ""),
        (r"(?<=[\w\]]) ([-‐‑/]) ?(?=[\w\[])", r"\1"),  # well-known, 7/10
        (r"(?<=\d) – (?=\d)", "–"),
        (r"([$#]) (?=\d)", r"\1"),
        (r"\b([a-z])\. (?=[a-z]\.)", r"\1."),  # i.e.
        (r"\b(\d{1,2})([.:]) (?=\d{1,2}\b)", r"\1\2"),  # 7.5, 7:30
        (r"\b(\d{1,3}), (?=\d{3}\b)", r"\1,"),  # 1,000
    )
]
_MAY_QUOTE = re.compile(r""" ?(?:(?<![\w"\]])|(?<=\ws)(?=' ))'(?:[^']|(?<=\w)'(?=\w))*('(?!\Z))?""")
_MAY_LINK = re.compile(
    rf"(?i)\b(?:(?:https?|ftp) ?:? ?/? ?/? ?|www)(?:{_WORD})?(?: ?[.-] ?{_WORD})*\W*\Z"
)
_IN_LINK = r"(?:https?://|ftp://|www\.)"
# An ellipsis or an abbreviation such as i.e. does not always end a sentence.
_SENTENCE_START = re.compile(
    rf"""(^\W*|(?<!\.)(?<!\.\w)[.!?]["')\]’”“»]* ["'(\[‘“„«»¿¡]*)(?!{_IN_LINK})(\w)"""
)
_PRONOUN = re.compile(rf"{_IN_LINK}\S*|(?<![\w-])i(?![\w-]|\.\w)")


def tokenise(texts: pa.Array | pa.ChunkedArray, style: str) -> pa.ListArray:
    r"""Standardises texts and splits them at white space and punctuation.

    `published` does what the published script's `custom_standardization` and the split of
    `keras.layers.TextVectorization` do: ASCII letters to lower case, `<br />` to a space, a space
    before each ASCII punctuation character but the backslash, then a split at runs of ASCII white
    space (space, \t, \n, \v, \f, \r and nothing else). `spaced` also puts a space after each
    of those characters, so that `"hello` and `.i` fall apart.

    `words` does what `spaced` does, for any script: all letters become lower case (by Unicode's
    mapping of one character to one), all punctuation of Unicode's categories P stands alone,
    Unicode's white space separates, and so do `<br>` and `<br/>`.

    Args:
        texts: (N,) strings, none of them null.
        style: One of `STYLES`.

    Returns:
        (N,) lists of string tokens; a text without any gives an empty list.

    Raises:
        ValueError: The style is unknown.
    """
    # No letter's lower case is a mark or white space, so this is the lower case of the surfaces.
    return surfaces(lower(texts.cast(pa.string()), style), style)


def lower(texts: pa.Array | pa.ChunkedArray, style: str) -> pa.Array | pa.ChunkedArray:
    """Returns texts, or the `surfaces` of their tokens, with the letters that a style lowers."""
    return pc.utf8_lower(texts) if style == "words" else pc.ascii_lower(texts)


def surfaces(texts: pa.Array | pa.ChunkedArray, style: str) -> pa.ListArray:
    """Splits texts into tokens as they are typed, before letters become lower case.

    Args:
        texts: (N,) strings, none of them null.
        style: One of `STYLES`.

    Returns:
        (N,) lists of strings, one for each token of `tokenise`, in the same order.

    Raises:
        ValueError: The style is unknown.
    """
    bounds, letters, begins, kept = _split(texts, style)
    letters = letters.compress(kept)
    offsets = np.append(np.flatnonzero(begins.compress(kept)), len(letters))
    return _lists(np.flatnonzero(begins).searchsorted(bounds), offsets, letters)


def gaps(texts: pa.Array | pa.ChunkedArray, style: str) -> pa.ListArray:
    """Returns the white space and line breaks before, between and behind the tokens of texts.

    Args:
        texts: (N,) strings, none of them null.
        style: One of `STYLES`.

    Returns:
        (N,) lists of strings, n + 1 for a text of n tokens; "" where nothing lies between two.

    Raises:
        ValueError: The style is unknown.
    """
    bounds, letters, begins, kept = _split(texts, style)
    places = np.flatnonzero(~kept)
    text_of = bounds.searchsorted(places, side="right") - 1
    gap_of = np.cumsum(begins)[places] + text_of
    offsets = np.flatnonzero(begins).searchsorted(bounds) + np.arange(len(bounds))
    sizes = np.bincount(gap_of, minlength=offsets[-1])
    return _lists(offsets, np.append(0, np.cumsum(sizes)), letters[places])


def _split(
    texts: pa.Array | pa.ChunkedArray, style: str
) -> tuple[
    npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.bool_], npt.NDArray[np.bool_]
]:
    """Finds the tokens of (N,) texts.

    Returns:
        (N + 1,) where each text begins and the last one ends, in bytes; the bytes of all texts in
        a row; which of them begin a token, and which of them belong to one.
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r} is not one of {STYLES}")
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    texts = texts.cast(pa.string())
    _, ends, data = texts.buffers()
    bounds = np.zeros(1, np.int32)
    if len(texts):
        bounds = np.frombuffer(ends, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    letters = np.frombuffer(data or b"", np.uint8)[bounds[0] : bounds[-1]]
    bounds = bounds - bounds[0]
    # No space is inserted: a token begins where a space is or would be, and once white space is
    # dropped it ends where the next one begins. take and compress are twice as fast as indexing.
    kinds = _KINDS.take(letters)
    for tag in _TAGS[style]:
        kinds[_places(tag, letters, bounds)] = _SPACE
    begins = kinds == _MARK
    ends = kinds == _SPACE if style == "published" else kinds != _OTHER
    kept = kinds != _SPACE
    if style == "words":
        _outside_ascii(letters, begins, ends, kept)
    begins[1:] |= ends[:-1]
    begins[bounds[bounds < len(letters)]] = True
    begins &= kept
    return bounds, letters, begins, kept


def _places(
    tag: npt.NDArray[np.uint8], letters: npt.NDArray[np.uint8], bounds: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """Returns the places of the bytes of each tag such as `<br />`, in any case, within a text."""
    first = np.flatnonzero(letters == tag[0])
    first = first[first + len(tag) <= bounds[bounds.searchsorted(first, side="right")]]
    places = first[:, None] + np.arange(len(tag))
    found = _LOWER.take(letters[places]) == tag
    return places[found.all(axis=1)]


def _lists(counts: npt.NDArray[Any], offsets: npt.NDArray[Any], letters: Any) -> pa.ListArray:
    strings = pa.StringArray.from_buffers(
        len(offsets) - 1, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(letters)
    )
    return pa.ListArray.from_arrays(pa.array(counts.astype(np.int32)), strings)


def _outside_ascii(
    letters: npt.NDArray[np.uint8],
    begins: npt.NDArray[np.bool_],
    ends: npt.NDArray[np.bool_],
    kept: npt.NDArray[np.bool_],
) -> None:
    """Marks, byte by byte, the punctuation and white space outside ASCII of UTF-8.

    Args:
        letters: The bytes of all texts in a row.
        begins: Where a token begins; set at the first byte of a mark.
        ends: Behind which byte a token ends; set at the last byte of a mark or a space.
        kept: What belongs to a token; cleared at each byte of a space.
    """
    # Characters of four bytes hold no punctuation of a living script, and no white space.
    first = np.flatnonzero((letters >= 0xC2) & (letters < 0xF0))
    size = np.where(letters[first] < 0xE0, 2, 3)
    second, third = (letters.take(first + i, mode="clip").astype(np.int32) & 0x3F for i in (1, 2))
    lead = letters[first].astype(np.int32)
    codes = np.where(
        size == 2, (lead & 0x1F) << 6 | second, (lead & 0x0F) << 12 | second << 6 | third
    )
    kinds = _wide_kinds().take(codes)
    begins[first[kinds == _MARK]] = True
    ends[(first + size - 1)[kinds != _OTHER]] = True
    spaces = kinds == _SPACE
    for i in range(3):
        kept[(first + i)[spaces & (size > i)]] = False


@functools.cache
def _wide_kinds() -> npt.NDArray[np.uint8]:
    """The kinds of the characters of the Basic Multilingual Plane, by code point."""
    kinds = [
        _MARK if unicodedata.category(char)[0] == "P" else _SPACE if char.isspace() else _OTHER
        for char in map(chr, range(0x10000))
    ]
    return np.array(kinds, np.uint8)


def detokenise(tokens: Iterable[str]) -> str:
    """Turns tokens of any style into readable text, for display.

    Closes up punctuation, quotes, contractions, ellipses, hyphens, fractions, numbers, links and
    entities such as `&amp;`, and capitalises sentences and the pronoun I. Nothing but spaces and
    upper case changes.

    Args:
        tokens: The tokens in order. Padding is left out, `[UNK]` stays as it is.

    Returns:
        One line of text.
    """
    text = " ".join(token for token in tokens if token)
    for pattern, replacement in _CLOSE_UP:
        text = pattern.sub(replacement, text)
    text = _PRONOUN.sub(lambda match: "I" if match[0] == "i" else match[0], text)
    return _SENTENCE_START.sub(lambda match: match[1] + _upper(match[2]), text)


def settled(text: str) -> int:
    """Returns how many characters of a text stay as they are when more tokens follow.

    The next word may close up with the last two. A `'` is an apostrophe or, once another one
    closes it, a quotation mark. What begins like a link may become one.

    Args:
        text: What `detokenise` returned.
    """
    words = [match.start() for match in re.finditer(r"\s\S", text)]
    end = words[-2] if len(words) > 1 else 0
    opened = (match.start() for match in _MAY_QUOTE.finditer(text) if not match[1])
    return min([end, *opened, *(match.start() for match in _MAY_LINK.finditer(text))])


def _upper(letter: str) -> str:
    """Returns the capital of a letter, unless its lower case is another letter (the dotless i)."""
    return letter.upper() if letter.upper().lower() == letter else letter

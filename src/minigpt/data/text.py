"""Splits text into tokens, and turns tokens back into readable English."""

import re
import string
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

STYLES = ("published", "spaced")

# In the published script's character class, f"[{string.punctuation}]", the backslash escapes the
# bracket behind it. So it is the only one of the 32 ASCII punctuation characters without a match.
PUNCTUATION = string.punctuation.replace("\\", "")
WHITE_SPACE = " \t\n\v\f\r"

_OTHER, _SPACE, _MARK = range(3)
# By byte; all bytes of a character outside ASCII are above 127 and count as _OTHER.
_KINDS = np.full(256, _OTHER, np.uint8)
_KINDS[list(WHITE_SPACE.encode())] = _SPACE
_KINDS[list(PUNCTUATION.encode())] = _MARK

# Applied in order. Each changes nothing but spaces, and fits the tokens of both styles.
_CLOSE_UP = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"([-*=_~]) (?=\1)", r"\1"),
        (r"(?<=[\w\]]) ' ?(?=(?:s|t|d|m|re|ve|ll|clock)\b)", "'"),  # isn't
        (r'" ?([^"]*?) ?"', r'"\1"'),
        (r'(?<!\S)" (?=[\w\[])', '"'),  # a quote without a partner opens
        (r"(?<!\S)' ?((?:[^']|(?<=\w)'(?=\w))*?) '(?!\w)", r"'\1'"),
        (r"(?<=s) '(?= \w)", "'"),  # the actors' names
        (r" +(?=[.,;:!?)\]}%])", ""),
        (r"(?<=[(\[{]) +", ""),
        (r"(?<=[\w\]]) ([-/]) ?(?=[\w\[])", r"\1"),  # well-known, 7/10
        (r"([$#]) (?=\d)", r"\1"),
        (r"\b([a-z])\. (?=[a-z]\.)", r"\1."),  # i.e.
        (r"\b(\d{1,2})([.:]) (?=\d{1,2}\b)", r"\1\2"),  # 7.5, 7:30
        (r"\b(\d{1,3}), (?=\d{3}\b)", r"\1,"),  # 1,000
    )
]
# An ellipsis or an abbreviation such as i.e. does not always end a sentence.
_SENTENCE_START = re.compile(r"""(^\W*|(?<!\.)(?<!\.\w)[.!?]["')\]]* ["'(\[]*)(\w)""")
_PRONOUN = re.compile(r"(?<![\w-])i(?![\w-]|\.\w)")


def tokenise(texts: pa.Array | pa.ChunkedArray, style: str) -> pa.ListArray:
    r"""Standardises texts and splits them at white space.

    `published` does what the published script's `custom_standardization` and the split of
    `keras.layers.TextVectorization` do: ASCII letters to lower case, `<br />` to a space, a space
    before each ASCII punctuation character but the backslash, then a split at runs of ASCII white
    space (space, \t, \n, \v, \f, \r and nothing else). `spaced` also puts a space after each
    of those characters, so that `"hello` and `.i` fall apart.

    Args:
        texts: (N,) strings, none of them null.
        style: One of `STYLES`.

    Returns:
        (N,) lists of string tokens; a text without any gives an empty list.

    Raises:
        ValueError: The style is unknown.
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r} is not one of {STYLES}")
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    texts = pc.replace_substring(pc.ascii_lower(texts.cast(pa.string())), "<br />", " ")
    if not len(texts):
        return pa.array([], pa.list_(pa.string()))
    _, ends, data = texts.buffers()
    bounds = np.frombuffer(ends, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    letters = np.frombuffer(data or b"", np.uint8)[bounds[0] : bounds[-1]]
    bounds = bounds - bounds[0]
    # No space is inserted: a token begins where a space is or would be, and once white space is
    # dropped it ends where the next one begins. take and compress are twice as fast as indexing.
    kinds = _KINDS.take(letters)
    begins = kinds == _MARK
    begins[1:] |= kinds[:-1] == _SPACE if style == "published" else kinds[:-1] != _OTHER
    begins[bounds[bounds < len(letters)]] = True
    kept = kinds != _SPACE
    begins &= kept
    letters = letters.compress(kept)
    offsets = np.append(np.flatnonzero(begins.compress(kept)), len(letters)).astype(np.int32)
    counts = np.flatnonzero(begins).searchsorted(bounds).astype(np.int32)
    tokens = pa.StringArray.from_buffers(
        len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(letters)
    )
    return pa.ListArray.from_arrays(pa.array(counts), tokens)


def detokenise(tokens: Iterable[str]) -> str:
    """Turns tokens of either style into readable English, for display.

    Closes up punctuation, quotes, contractions, ellipses, hyphens, fractions and numbers, and
    capitalises sentences and the pronoun I. Nothing but spaces and upper case changes.

    Args:
        tokens: The tokens in order. Padding is left out, `[UNK]` stays as it is.

    Returns:
        One line of text.
    """
    text = " ".join(token for token in tokens if token)
    for pattern, replacement in _CLOSE_UP:
        text = pattern.sub(replacement, text)
    text = _PRONOUN.sub("I", text)
    return _SENTENCE_START.sub(lambda match: match[1] + _upper(match[2]), text)


def _upper(letter: str) -> str:
    """Returns the capital of a letter, unless its lower case is another letter (the dotless i)."""
    return letter.upper() if letter.upper().lower() == letter else letter

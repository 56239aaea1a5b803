"""Reviews to tokens, and tokens back to English that reads well."""

import re
import string
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

STYLES = ("published", "spaced")

# In the published script's class of characters, f"[{string.punctuation}]", the `\]` is an escaped
# bracket: of the 32 ASCII punctuation characters the backslash alone is not matched.
PUNCTUATION = string.punctuation.replace("\\", "")
WHITE_SPACE = " \t\n\v\f\r"

_OTHER, _SPACE, _MARK = range(3)
# Of each byte; those of a character outside ASCII are all above it.
_KINDS = np.full(256, _OTHER, np.uint8)
_KINDS[list(WHITE_SPACE.encode())] = _SPACE
_KINDS[list(PUNCTUATION.encode())] = _MARK

# In order.  Each changes nothing but spaces, and matches the tokens of either style.
_CLOSE_UP = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"([-*=_~]) (?=\1)", r"\1"),
        (r"(?<=[\w\]]) ' ?(?=(?:s|t|d|m|re|ve|ll|clock)\b)", "'"),  # isn't
        (r'" ?([^"]*?) ?"', r'"\1"'),
        (r'(?<!\S)" (?=[\w\[])', '"'),  # one that has no partner opens
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
# Neither an ellipsis nor the end of an abbreviation like i.e. ends a sentence for certain.
_SENTENCE_START = re.compile(r"""(^\W*|(?<!\.)(?<!\.\w)[.!?]["')\]]* ["'(\[]*)(\w)""")
_PRONOUN = re.compile(r"(?<![\w-])i(?![\w-]|\.\w)")


def tokenise(texts: pa.Array | pa.ChunkedArray, style: str) -> pa.ListArray:
    r"""Standardise texts and split them at white space.

    `published` does what the published script's `custom_standardization` and the split of
    `keras.layers.TextVectorization` do: ASCII letters to lower case, `<br />` to a space, a space
    before each ASCII punctuation character but the backslash, then a split at runs of ASCII white
    space (space, \t, \n, \v, \f, \r and nothing else).  `spaced` also puts a space after each
    of those characters, so that `"hello` and `.i` fall apart.

    Args:
        texts: (N,) strings, none of them null.
        style: One of `STYLES`.

    Returns:
        (N,) lists of string tokens; a text that holds none gives an empty list.

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
    # No space is put anywhere: a token begins where one would be, or was, and ends where the next
    # one begins, once white space is left out.
    # take and compress: twice as fast as the same by index.
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
    """Turn tokens of either style into readable English, for display.

    Punctuation, quotes, contractions, ellipses, hyphens, fractions and numbers are closed up;
    sentences and the pronoun I get their capitals.  Only spaces and upper case change: no other
    character is lost or moved.

    Args:
        tokens: The tokens in order; padding is left out, `[UNK]` stays as it is.

    Returns:
        One line of text.
    """
    text = " ".join(token for token in tokens if token)
    for pattern, replacement in _CLOSE_UP:
        text = pattern.sub(replacement, text)
    text = _PRONOUN.sub("I", text)
    return _SENTENCE_START.sub(lambda match: match[1] + _upper(match[2]), text)


def _upper(letter: str) -> str:
    """Upper-case a letter where lower-casing gives it back (it would not for the dotless i)."""
    return letter.upper() if letter.upper().lower() == letter else letter

"""Reviews to tokens, and tokens back to English that reads well."""

import re
import string
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

STYLES = ("published", "spaced")

# As the published script writes it.  In its class `\]` is an escaped bracket, so of the 32 ASCII
# punctuation characters the backslash alone is not matched.
PUNCTUATION = f"([{string.punctuation}])"

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
    apart = r" \1" if style == "published" else r" \1 "
    texts = pc.ascii_lower(texts.cast(pa.string()))
    texts = pc.replace_substring(texts, "<br />", " ")
    texts = pc.replace_substring_regex(texts, PUNCTUATION, apart)
    texts = pc.ascii_trim_whitespace(texts)
    # Arrow splits an empty string into one empty token, but a null into none.
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    lists = pc.ascii_split_whitespace(texts)
    return pa.ListArray.from_arrays(lists.offsets, lists.values)


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

"""Tokenizers: those of words, and what opens a stored tokenizer of any kind."""

import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from minigpt.common.errors import InputError
from minigpt.data import bpe, text
from minigpt.data.interface import SETTINGS, VOCABULARY, Texts, Tokenizer, in_threads
from minigpt.data.text import settled

log = logging.getLogger(__name__)

PADDING = 0
UNKNOWN = 1
SPECIAL_TOKENS = ("", "[UNK]")
SEPARATOR = 2  # where there is one; no style makes a token of its text, which begins with a mark
SEPARATOR_TOKEN = "<|endoftext|>"

WORDS = "words"  # the kind of tokenizer; the other is `bpe.KIND`

_NOTHING = pa.table({"token": pa.array([], pa.string()), "count": pa.array([], pa.int64())})

# An Arrow array of strings holds 2 GiB at most, and punctuation is set apart by up to two spaces.
_PIECE_BYTES = 2**28
_LONG_TOKEN_BYTES = 40  # on average; a word of English has 4, one of Hindi 13
_FEW_TOKENS = 1_000  # Arrow reads the whole vocabulary each time, which takes 0.7 ms
_PIECES_TO_ADD = 32  # counts of so many pieces are added up at once, since most words are in each


@dataclass(frozen=True)
class WordTokenizer(Tokenizer):
    """Splits text into words and marks, and looks them up.

    Attributes:
        tokens: All tokens; the id of a token is its place. The first two are `SPECIAL_TOKENS`,
            and the third is `SEPARATOR_TOKEN` if documents are separated.
        style: How text is split, one of `minigpt.data.text.STYLES`.
    """

    tokens: tuple[str, ...]
    style: str

    padding = PADDING
    unknown = UNKNOWN

    @property
    def separator(self) -> int | None:
        """The id that stands before each document, if one does."""
        return SEPARATOR if self.tokens[SEPARATOR : SEPARATOR + 1] == (SEPARATOR_TOKEN,) else None

    def __len__(self) -> int:
        """Returns the number of tokens, the special ones included."""
        return len(self.tokens)

    def split(self, texts: Texts) -> pa.ListArray:
        """Splits (N,) texts into (N,) lists of tokens, whether known or not."""
        return text.tokenise(texts, self.style)

    def surfaces(self, texts: Texts) -> pa.ListArray:
        """Returns the tokens of (N,) texts as they are typed, one for each of `split`."""
        return text.surfaces(texts, self.style)

    def ids(self, tokens: pa.Array) -> npt.NDArray[np.int32]:
        """Returns the ids of (N,) tokens; unknown ones have `UNKNOWN`."""
        if len(tokens) < _FEW_TOKENS:
            return np.array(
                [self._ids.get(token, UNKNOWN) for token in tokens.to_pylist()], "int32"
            )
        return pc.fill_null(pc.index_in(tokens, value_set=self._entries), UNKNOWN).to_numpy()

    def encode(self, texts: Texts) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Splits texts and looks up their tokens, in threads; see `Tokenizer.encode`."""

        def encode_piece(piece: pa.Array) -> tuple[np.ndarray, np.ndarray]:
            lists = self.split(piece)
            return self.ids(lists.values), lists.value_lengths().to_numpy()

        pieces = list(in_threads(encode_piece, [texts], _PIECE_BYTES))
        lengths = np.concatenate([np.zeros(1, np.int64), *(piece[1] for piece in pieces)])
        ids = np.concatenate([np.zeros(0, np.int32), *(piece[0] for piece in pieces)])
        return ids, np.cumsum(lengths, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Returns the tokens of ids."""
        return [self.tokens[i] for i in ids]

    def typed(self, prompt: str) -> list[str]:
        """Returns the tokens of a prompt, whether known or not."""
        found: list[str] = self.split(pa.array([prompt], pa.string())).values.to_pylist()
        return found

    def completer(self, prompt: str) -> Callable[[Iterable[int], bool], str]:
        """Returns what puts texts behind a prompt; see `Tokenizer.complete`.

        What the prompt holds is shown in lower case like the rest, also where it is not known.
        """
        typed = self.typed(prompt)
        return lambda ids, ended: text.detokenise([*typed, *self.decode(ids)])

    def settled(self, text: str) -> int:
        """Returns how many characters more ids can't change; see `Tokenizer.settled`."""
        return settled(text)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    @functools.cached_property
    def _entries(self) -> pa.Array:
        return pa.array(self.tokens, pa.string())

    @property
    def settings(self) -> dict[str, Any]:
        """What tokenizer.json holds."""
        return {"kind": WORDS, "style": self.style}

    @property
    def vocabulary(self) -> bytes:
        """What vocabulary.txt holds: a token on each line."""
        return "".join(f"{token}\n" for token in self.tokens).encode()


def load(folder: Path) -> Tokenizer:
    """Reads a folder that `Tokenizer.save` wrote, of either kind.

    Raises:
        InputError: A file is missing or is not what `save` writes.
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_bytes())
        known = [{"kind": WORDS, "style": style} for style in text.STYLES] + [{"kind": bpe.KIND}]
        if settings not in known:
            raise ValueError(f"it holds {settings!r}, where one of {known} is known")
        path = folder / VOCABULARY
        data = path.read_bytes()
        if settings["kind"] == bpe.KIND:
            return bpe.parse(data)
        return WordTokenizer(_parse(data), settings["style"])
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise InputError(f"tokenizer {path}: {error}; make it again: dvc repro vocab") from error


def _parse(data: bytes) -> tuple[str, ...]:
    """Reads vocabulary.txt of words.

    Raises:
        ValueError: It is not what `WordTokenizer.vocabulary` writes.
    """
    # Not splitlines(), since a token may hold other characters that end a line in Unicode.
    *lines, rest = data.split(b"\n")
    tokens = tuple(line.decode() for line in lines)
    if tokens[:2] != SPECIAL_TOKENS or rest:
        raise ValueError("it must begin with an empty line and [UNK], and end with a line feed")
    if not all(line.split() == [line] for line in lines[1:]):
        raise ValueError("a line is empty or holds white space, where one token is allowed")
    if len(set(tokens)) < len(tokens):
        raise ValueError("a token occurs twice")
    return tokens


def count(texts: Texts | Iterable[Texts], style: str) -> pa.Table:
    """Counts the tokens of texts.

    Args:
        texts: (N,) strings, or batches of them, of which a few are in memory at a time.
        style: How to split them, one of `minigpt.data.text.STYLES`.

    Returns:
        A row for each distinct token, `token` and `count`, in the order in which
        `keras.layers.TextVectorization.adapt` numbers them: the most frequent first, and among
        equally frequent ones the one whose bytes sort last.

    Raises:
        InputError: There is no token at all.
    """
    seen, counts = tally(texts, style)
    check(seen, totals(counts))
    return in_order(counts)


class Totals(NamedTuple):
    """Sums over the tokens of texts.

    Attributes:
        tokens: All tokens.
        types: The distinct ones.
        bytes: Of all tokens, in UTF-8.
    """

    tokens: int
    types: int
    bytes: int


def totals(counts: pa.Table) -> Totals:
    """Sums up what `count` or `tally` returned."""
    size = pc.sum(pc.multiply(counts["count"], pc.binary_length(counts["token"]))).as_py()
    return Totals(pc.sum(counts["count"]).as_py() or 0, len(counts), size or 0)


def tally(texts: Texts | Iterable[Texts], style: str) -> tuple[int, pa.Table]:
    """Counts the tokens of texts as `count` does.

    Returns:
        The number of texts, and the rows of `count` in no order. Those of the parts of a corpus,
        added up, are those of the whole.
    """

    def count_piece(piece: pa.Array) -> tuple[int, pa.Table]:
        counts = pc.value_counts(text.tokenise(piece, style).values)
        table = {"token": counts.field("values"), "count": counts.field("counts")}
        return len(piece), pa.table(table)

    batches = [texts] if isinstance(texts, Texts) else texts
    seen, tables = 0, []
    for size, table in in_threads(count_piece, batches, _PIECE_BYTES):
        seen += size
        tables.append(table)
        if len(tables) == _PIECES_TO_ADD:
            tables = [added(tables)]
    return seen, added(tables)


def check(seen: int, found: Totals) -> None:
    """Warns of long tokens, which a language without spaces has.

    Args:
        seen: The number of texts.
        found: What was counted in them.

    Raises:
        InputError: There is no token at all.
    """
    if not found.tokens:
        if seen:
            why = "they hold nothing but white space and <br />"
        else:
            why = (
                "the corpus is empty, or all of it is held out; divide long texts into shorter "
                "ones, or lower sequences.validation_fraction"
            )
        raise InputError(f"no token to count in {seen} texts: {why}")
    if (mean := found.bytes / found.tokens) > _LONG_TOKEN_BYTES:
        log.warning(
            "a token has %.0f bytes on average: text is split at white space and punctuation, so "
            "where a language has no spaces, such as Chinese, choose groups.vocabulary=bpe",
            mean,
        )


def added(tables: Sequence[pa.Table]) -> pa.Table:
    """Adds up the counts of several tables."""
    counts = pa.concat_tables([_NOTHING, *tables]).group_by("token").aggregate([("count", "sum")])
    return counts.rename_columns(["token", "count"])


def in_order(counts: pa.Table) -> pa.Table:
    """Returns counts in the order of `count`."""
    return counts.sort_by([("count", "descending"), ("token", "descending")])


def build(
    counts: pa.Table, max_tokens: int, style: str, separated: bool = False, min_count: int = 1
) -> WordTokenizer:
    """Builds the tokenizer of the most frequent tokens.

    Args:
        counts: What `count` returned, or its first `max_tokens` rows.
        max_tokens: The most tokens to keep, the special ones among them.
        style: How the texts were split.
        separated: Whether a separator stands before each document.
        min_count: How often a token must occur.
    """
    special = (*SPECIAL_TOKENS, SEPARATOR_TOKEN) if separated else SPECIAL_TOKENS
    enough = counts.slice(0, max_tokens).filter(pc.field("count") >= min_count)
    frequent = enough["token"].to_pylist()
    learned = [token for token in frequent if token not in SPECIAL_TOKENS]
    return WordTokenizer((*special, *learned[: max_tokens - len(special)]), style)


def metrics(tokenizer: WordTokenizer, counts: pa.Table, found: Totals) -> dict[str, int | float]:
    """Summarises a tokenizer on the texts that were counted.

    Args:
        tokenizer: Any tokenizer of the same style, whose tokens are all in `counts`, if they occur.
        counts: What `count` returned, or its first rows.
        found: The totals of all rows.

    Returns:
        tokens: all tokens of the texts; types: the distinct ones; entries: those that the
        tokenizer knows, the special ones included; unk_share: the share of all tokens, 0 to 1,
        that are encoded as unknown.
    """
    learned = pa.array(tokenizer.tokens[len(SPECIAL_TOKENS) :], pa.string())
    known = counts.filter(pc.is_in(counts["token"], value_set=learned))
    return {
        "tokens": found.tokens,
        "types": found.types,
        "entries": len(tokenizer),
        "unk_share": 1 - (pc.sum(known["count"]).as_py() or 0) / found.tokens,
    }


def unknown(tokenizer: Tokenizer, texts: Iterable[Texts]) -> tuple[int, int]:
    """Returns how many tokens of batches of texts are unknown, and how many there are in all."""
    unknown = total = 0
    for batch in texts:
        ids, _ = tokenizer.encode(batch)
        unknown += int(np.count_nonzero(ids == tokenizer.unknown))
        total += len(ids)
    return unknown, total

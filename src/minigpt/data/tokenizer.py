"""The vocabulary: counted from texts, kept in a text file, from tokens to ids and back."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.data.text import tokenise

PADDING = 0
UNKNOWN = 1
SPECIAL_TOKENS = ("", "[UNK]")

# Texts to a task: enough that starting one costs nothing, few enough for the processor's cache.
_PIECE = 2000
_PIECES_TO_ADD = 32  # counts of so many are added up at once, for each has most words anew
# And their bytes: an Arrow array of strings has 2 GiB at most.
_PIECE_BYTES = 2**28


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a model knows; a token's id is its place.

    Attributes:
        tokens: All entries, the first two being those of `SPECIAL_TOKENS`.
    """

    tokens: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of entries, padding and unknown included."""
        return len(self.tokens)

    def encode(
        self, texts: pa.Array | pa.ChunkedArray, style: str
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Tokenise texts and look their tokens up.

        Args:
            texts: (N,) strings.
            style: One of `minigpt.text.STYLES`.

        Returns:
            The ids of all texts in a row, and (N + 1,) offsets: those of text r are
            `ids[offsets[r]:offsets[r + 1]]`.
        """
        entries = pa.array(self.tokens, pa.string())

        def look_up(piece: pa.Array) -> tuple[np.ndarray, np.ndarray]:
            lists = tokenise(piece, style)
            ids = pc.fill_null(pc.index_in(lists.values, value_set=entries), UNKNOWN)
            return ids.to_numpy(), lists.value_lengths().to_numpy()

        pieces = list(_in_threads(look_up, [texts]))
        lengths = np.concatenate([np.zeros(1, np.int64), *(piece[1] for piece in pieces)])
        ids = np.concatenate([np.zeros(0, np.int32), *(piece[0] for piece in pieces)])
        return ids, np.cumsum(lengths, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the tokens of ids."""
        return [self.tokens[i] for i in ids]

    def save(self, path: Path) -> None:
        """Write the file that `load` reads: UTF-8, one entry a line, the first one empty."""
        with files.replacing(path) as beside:
            beside.write_bytes(self._bytes())

    @property
    def sha256(self) -> str:
        """The checksum of the bytes that `save` writes, in hexadecimal."""
        return hashlib.sha256(self._bytes()).hexdigest()

    def _bytes(self) -> bytes:
        return "".join(f"{token}\n" for token in self.tokens).encode()


def count(
    texts: pa.Array | pa.ChunkedArray | Iterable[pa.Array | pa.ChunkedArray], style: str
) -> pa.Table:
    """Count the tokens of texts.

    Args:
        texts: (N,) strings, or batches of them, which are taken a few at a time.
        style: One of `minigpt.text.STYLES`.

    Returns:
        One row a distinct token, `token` and `count`, in the order in which
        `keras.layers.TextVectorization.adapt` numbers them: the most frequent first, and of
        equally frequent ones the one whose bytes sort last.

    Raises:
        InputError: There is no token at all.
    """

    def count_piece(piece: pa.Array) -> tuple[int, pa.Table]:
        counts = pc.value_counts(tokenise(piece, style).values)
        table = {"token": counts.field("values"), "count": counts.field("counts")}
        return len(piece), pa.table(table)

    batches = [texts] if isinstance(texts, pa.Array | pa.ChunkedArray) else texts
    seen, tables = 0, []
    for size, table in _in_threads(count_piece, batches):
        seen += size
        tables.append(table)
        if len(tables) == _PIECES_TO_ADD:
            tables = [_added(tables)]
    if not any(tables):
        raise InputError(
            f"no token to count in {seen} texts: the corpus (or the split of it that the "
            "vocabulary is made from) is empty; look at `corpus` in the configuration"
        )
    counts = _added(tables)
    return counts.sort_by([("count", "descending"), ("token", "descending")])


def _added(tables: list[pa.Table]) -> pa.Table:
    counts = pa.concat_tables(tables).group_by("token").aggregate([("count", "sum")])
    return counts.rename_columns(["token", "count"])


def build(counts: pa.Table, max_tokens: int) -> Vocabulary:
    """Make the vocabulary of the most frequent tokens.

    Args:
        counts: What `count` returned.
        max_tokens: The most entries to keep, padding and unknown among them.
    """
    tokens = counts["token"].slice(0, max_tokens).to_pylist()
    learned = [token for token in tokens if token not in SPECIAL_TOKENS]
    return Vocabulary((*SPECIAL_TOKENS, *learned[: max_tokens - len(SPECIAL_TOKENS)]))


def load(path: Path) -> Vocabulary:
    """Read a file that `Vocabulary.save` wrote.

    Raises:
        InputError: The file is missing or is not such a file.
    """
    try:
        # Not splitlines(): tokens may hold what else Unicode takes for the end of a line.
        lines = path.read_bytes().split(b"\n")
        tokens = tuple(line.decode() for line in lines[:-1])
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"vocabulary {path}: {error}; make it again: dvc repro vocab") from error
    if tokens[:2] != SPECIAL_TOKENS or lines[-1]:
        wrong = "it must begin with an empty line and [UNK], and end with a line feed"
    elif not all(line.split() == [line] for line in lines[1:-1]):
        wrong = "a line is empty or holds white space, where one token is allowed"
    elif len(set(tokens)) < len(tokens):
        wrong = "an entry stands there twice"
    else:
        return Vocabulary(tokens)
    raise InputError(f"vocabulary {path}: {wrong}; make it again: dvc repro vocab")


def metrics(vocabulary: Vocabulary, counts: pa.Table) -> dict[str, int | float]:
    """Summarise a vocabulary over the texts that were counted.

    Returns:
        tokens: All tokens of the texts; types: the distinct ones; entries: those of the
        vocabulary, padding and unknown included; unk_share: the part of all tokens, 0 to 1, that
        is encoded as unknown.
    """
    learned = pa.array(vocabulary.tokens[len(SPECIAL_TOKENS) :], pa.string())
    known = counts.filter(pc.is_in(counts["token"], value_set=learned))
    total = pc.sum(counts["count"]).as_py()
    return {
        "tokens": total,
        "types": len(counts),
        "entries": len(vocabulary),
        "unk_share": 1 - (pc.sum(known["count"]).as_py() or 0) / total,
    }


def _in_threads(
    function: Callable[[pa.Array], Any], batches: Iterable[pa.Array | pa.ChunkedArray]
) -> Iterator[Any]:
    """Apply a function to pieces of the texts, in order; Arrow releases the interpreter lock."""
    pieces = (piece for batch in batches for piece in _pieces(batch))
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Any]] = deque()
        for piece in pieces:
            waiting.append(pool.submit(function, piece))
            if len(waiting) > 2 * threads:  # no more at once than keeps all of them busy
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _pieces(texts: pa.Array | pa.ChunkedArray) -> Iterator[pa.Array | pa.ChunkedArray]:
    ends = np.cumsum(pc.binary_length(texts).to_numpy(), dtype=np.int64)
    start = 0
    while start < len(texts):
        most = ends[start] + _PIECE_BYTES  # the first text may be as long as it likes
        stop = min(start + _PIECE, int(ends.searchsorted(most, side="right")))
        yield texts.slice(start, stop - start)
        start = stop

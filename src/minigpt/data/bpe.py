"""Byte-level byte-pair encoding: text of any language as tokens, without loss and without [UNK].

The algorithm is that of Sennrich et al. (2016, Neural Machine Translation of Rare Words with
Subword Units), on bytes, as in GPT-2 (Radford et al., 2019). The library `tokenizers` learns the
merges and applies them. Text is cut into pretokens first, since no merge reaches across one: a
word, a number or a run of marks, each with the space before it.
"""

import codecs
import functools
import itertools
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from minigpt.data.interface import Texts, Tokenizer, in_threads

if TYPE_CHECKING:
    import tokenizers

KIND = "bpe"
SEPARATOR = 0
BYTES = range(1, 257)  # the ids of the single bytes

# Characters of a pretoken. More would let a text without spaces take memory without bound.
LONGEST = 32
_LONGEST_LEARNED = 16  # the trainer keeps all different pretokens: shorter ones are fewer
_MOST_BYTES = 4 * LONGEST  # of a token: a character has at most four
# A text is cut at every multiple of it, so that one of 100 MB takes no more memory than short ones.
_SEGMENT_BYTES = 2**20
_BATCH_BYTES = 2**21
_MOST_CACHED = 2**18

_OTHER, _LETTER, _DIGIT, _SPACE, _EXTENDS = range(5)
_APOSTROPHES = (0x27, 0x2019)


@dataclass(frozen=True)
class BytePairTokenizer(Tokenizer):
    """Maps text to ids and back, byte for byte.

    Attributes:
        merges: The learned tokens, from id 257 on: each is the pair of the ids that it joins.
    """

    merges: tuple[tuple[int, int], ...]

    padding = None
    unknown = None

    @property
    def separator(self) -> int:
        """The id that stands before each document."""
        return SEPARATOR

    def __len__(self) -> int:
        """Returns the number of tokens: the separator, 256 bytes and what was learned."""
        return BYTES.stop + len(self.merges)

    def encode(self, texts: Texts) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Encodes texts, in threads; see `Tokenizer.encode`. The separator never occurs."""
        ids, lengths = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
        segments, firsts = _segments(texts)
        for found, sizes in in_threads(self._encode_batch, [segments], _BATCH_BYTES):
            ids.append(found)
            lengths.append(sizes)
        return np.concatenate(ids), np.cumsum(np.concatenate(lengths))[firsts]

    def _encode_batch(self, segments: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of all segments in a row, and the number of ids of each."""
        pieces, bounds = pretokens(segments)
        indexed = pieces.dictionary_encode()
        rows = self._lookup(indexed.dictionary.to_pylist())
        sizes = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = np.fromiter(itertools.chain.from_iterable(rows), np.int32, sizes.sum())
        which = indexed.indices.to_numpy()
        ends = np.append(0, np.cumsum(sizes[which]))
        starts = (np.cumsum(sizes) - sizes)[which]
        places = np.repeat(starts - ends[:-1], sizes[which]) + np.arange(ends[-1])
        return flat[places], np.diff(ends[bounds])

    def _lookup(self, pieces: list[str]) -> list[list[int]]:
        """Returns the ids of different pretokens, most of which earlier texts have had."""
        rows = [self._cache.get(piece) for piece in pieces]
        new = [piece for piece, row in zip(pieces, rows, strict=True) if row is None]
        made = iter(self._library.encode_batch_fast(new, add_special_tokens=False))
        found = [next(made).ids if row is None else row for row in rows]
        if len(self._cache) < _MOST_CACHED:
            self._cache.update(zip(pieces, found, strict=True))
        return found

    @functools.cached_property
    def _cache(self) -> dict[str, list[int]]:
        return {}

    @functools.cached_property
    def _tokens(self) -> list[bytes]:
        """The bytes of each token; none of the separator."""
        tokens = [b"", *(bytes([byte]) for byte in range(256))]
        for left, right in self.merges:
            tokens.append(tokens[left] + tokens[right])
        return tokens

    @functools.cached_property
    def _library(self) -> "tokenizers.Tokenizer":
        """The library's tokenizer, which knows the bytes and the merges, and no special token."""
        names = [_named(token) for token in self._tokens]
        vocabulary = {name: number for number, name in enumerate(names) if number != SEPARATOR}
        merges = [(names[left], names[right]) for left, right in self.merges]
        return _library_tokenizer(vocabulary, merges)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Returns the tokens of ids as text; bytes that are no whole character are shown as U+FFFD.

        The separator is shown as empty.
        """
        return [self._tokens[i].decode("utf-8", "replace") for i in ids]

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of ids. They are UTF-8 unless the ids begin or end in a character."""
        return b"".join(self._tokens[i] for i in ids)

    def typed(self, prompt: str) -> list[str]:
        """Returns what each token of a prompt adds to it."""
        return self.parts(self.encode(pa.array([prompt], pa.string()))[0])

    def parts(self, ids: Iterable[int]) -> list[str]:
        """Returns what each token adds to a text; the last token of a character adds it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(self._tokens[i]) for i in ids]

    def completer(self, prompt: str) -> Callable[[Iterable[int], bool], str]:
        """Returns what puts texts behind a prompt; see `Tokenizer.complete`."""

        def complete(ids: Iterable[int], ended: bool) -> str:
            data = self.to_bytes(ids)
            if not ended:
                data = data[: len(data) - _unfinished(data)]
            return prompt + data.decode("utf-8", "replace")

        return complete

    @property
    def settings(self) -> dict[str, Any]:
        """What tokenizer.json holds."""
        return {"kind": KIND}

    @property
    def vocabulary(self) -> bytes:
        """What vocabulary.txt holds: a merge on each line, as the two ids that it joins."""
        return "".join(f"{left} {right}\n" for left, right in self.merges).encode()


def parse(data: bytes) -> BytePairTokenizer:
    """Reads vocabulary.txt of a byte-level BPE.

    Raises:
        ValueError: A line is not what `BytePairTokenizer.vocabulary` writes.
    """
    *lines, rest = data.split(b"\n")
    if rest:
        raise ValueError("it must end with a line feed")
    sizes = [0] + [1] * len(BYTES)
    merges: list[tuple[int, int]] = []
    for number, line in enumerate(lines, 1):
        pair = re.fullmatch(rb"([1-9]\d{0,7}) ([1-9]\d{0,7})", line)
        left, right = map(int, pair.groups()) if pair else (0, 0)
        if not (0 < left < len(sizes) and 0 < right < len(sizes)):
            raise ValueError(f"line {number} must hold the ids of two tokens before it")
        # A few lines that double each other could ask for any amount of memory.
        if sizes[left] + sizes[right] > _MOST_BYTES:
            raise ValueError(f"line {number} makes a token of more than {_MOST_BYTES} bytes")
        sizes.append(sizes[left] + sizes[right])
        merges.append((left, right))
    made = BytePairTokenizer(tuple(merges))
    if len(set(made._tokens)) < len(made):
        raise ValueError("a token occurs twice")
    return made


def train(texts: Iterable[str], max_tokens: int) -> BytePairTokenizer:
    """Learns the merges of texts, in this process.

    Args:
        texts: The sample to learn from. Long runs without spaces are cut into pretokens of a few
            characters, since the trainer's memory grows with the different ones.
        max_tokens: Most tokens, the separator and the 256 bytes among them.

    Returns:
        The tokenizer; the same texts give the same one.
    """
    from tokenizers import pre_tokenizers, trainers

    library = _library_tokenizer({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=max_tokens - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    library.train_from_iterator(_learned(texts), trainer)
    ids = {_named(bytes([byte])): number for number, byte in zip(BYTES, range(256), strict=True)}
    merges = []
    for left, right in _merges_of(library):
        # Two pairs may make one token; the first is enough to write it.
        if left + right not in ids:
            ids[left + right] = len(ids) + 1
            merges.append((ids[left], ids[right]))
    return BytePairTokenizer(tuple(merges))


def metrics(tokenizer: BytePairTokenizer, texts: list[str]) -> dict[str, int | float]:
    """Summarises a tokenizer on the texts that it was learned from.

    Returns:
        tokens and bytes of the texts, bytes_per_token, and entries: the number of the tokenizer's
        tokens, the separator included.
    """
    array = pa.array(texts, pa.string())
    size, tokens = sum(len(text.encode()) for text in texts), len(tokenizer.encode(array)[0])
    return {
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / max(tokens, 1),
        "entries": len(tokenizer),
    }


def _learned(texts: Iterable[str]) -> Iterator[list[str]]:
    for text in texts:
        segments, _ = _segments(pa.array([text], pa.string()))
        for i in range(len(segments)):
            yield pretokens(segments[i : i + 1], _LONGEST_LEARNED)[0].to_pylist()


def pretokens(texts: pa.Array, longest: int = LONGEST) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """Cuts texts into words, numbers, runs of marks and white space; joined, they are the texts.

    A single space belongs to what it stands before; a mark that combines, or a joiner, to the
    character before it; an apostrophe between two letters to their word.

    Args:
        texts: (N,) strings.
        longest: Most characters of a pretoken.

    Returns:
        (P,) the pretokens of all texts in a row, and (N + 1,) the places where each text begins.
    """
    _, places, data = texts.buffers()
    bounds = np.frombuffer(places, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    whole = (data or pa.py_buffer(b"")).slice(bounds[0], bounds[-1] - bounds[0])
    codes = np.frombuffer(whole.to_pybytes().decode().encode("utf-32-le"), np.uint32)
    if not len(codes):
        return pa.array([], pa.string()), np.zeros(len(bounds), np.int64)
    widths = 1 + (codes >= 0x80).astype(np.int32) + (codes >= 0x800) + (codes >= 0x10000)
    starts = np.append(0, np.cumsum(widths, dtype=np.int32))
    first = np.zeros(len(codes) + 1, np.bool_)  # where a text begins, or all of them end
    first[starts.searchsorted(bounds - bounds[0])] = True

    kinds = _kinds().take(codes)
    kinds[first[:-1] & (kinds == _EXTENDS)] = _OTHER
    own = np.where(kinds == _EXTENDS, 0, np.arange(len(codes), dtype=np.int32))
    kinds = kinds.take(np.maximum.accumulate(own))
    inner = np.flatnonzero((codes == _APOSTROPHES[0]) | (codes == _APOSTROPHES[1]))
    inner = inner[~first[inner] & ~first[inner + 1]]
    letter = kinds == _LETTER
    kinds[inner[letter[inner - 1] & letter[inner + 1]]] = _LETTER

    begins = first[:-1].copy()
    begins[1:] |= kinds[1:] != kinds[:-1]
    led = np.flatnonzero((codes[:-1] == 0x20) & (kinds[1:] != _SPACE) & ~first[1:-1])
    begins[led + 1] = False
    begins[led] = True
    at = np.arange(len(codes), dtype=np.int32)
    begins |= (at - np.maximum.accumulate(np.where(begins, at, 0))) % longest == 0

    cuts = np.append(starts[:-1][begins], starts[-1]).astype(np.int32)
    pieces = pa.StringArray.from_buffers(len(cuts) - 1, pa.py_buffer(cuts), whole)
    return pieces, cuts.searchsorted(bounds - bounds[0])


@functools.cache
def _kinds() -> npt.NDArray[np.uint8]:
    """The kind of each character of Unicode, by code point."""
    by_category = {"L": _LETTER, "M": _EXTENDS, "N": _DIGIT}
    kinds = [
        _SPACE if char.isspace() else by_category.get(unicodedata.category(char)[0], _OTHER)
        for char in map(chr, range(sys.maxunicode + 1))
    ]
    for joiner in (0x200C, 0x200D):
        kinds[joiner] = _EXTENDS
    return np.array(kinds, np.uint8)


def _segments(texts: Texts) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """Cuts long texts.

    Returns:
        The segments of all texts in a row, and (N + 1,) the places where each text begins.
    """
    whole = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    whole = whole.cast(pa.string())
    _, places, data = whole.buffers()
    if not len(whole) or data is None:
        return whole, np.arange(len(whole) + 1)
    bounds = np.frombuffer(places, np.int32)[whole.offset : whole.offset + len(whole) + 1]
    letters = np.frombuffer(data, np.uint8)
    cuts = []
    for i in np.flatnonzero(np.diff(bounds) > _SEGMENT_BYTES).tolist():
        for cut in range(bounds[i] + _SEGMENT_BYTES, bounds[i + 1], _SEGMENT_BYTES):
            while letters[cut] & 0xC0 == 0x80:  # inside a character
                cut -= 1
            cuts.append(cut)
    # Behind equal bounds: a cut is no bound, and an empty text keeps its place.
    after = bounds.searchsorted(cuts, "right")
    offsets = np.insert(bounds, after, cuts).astype(np.int32)
    firsts = np.arange(len(bounds)) + np.searchsorted(cuts, bounds, "right")
    segments = pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), data)
    return segments, firsts


def _unfinished(data: bytes) -> int:
    """Returns how many of the last bytes begin a character that is not complete."""
    for size in range(1, min(3, len(data)) + 1):
        byte = data[-size]
        if byte >= 0xC0:  # the first byte of a character tells how many it has
            return size if size < 2 + (byte >= 0xE0) + (byte >= 0xF0) else 0
        if byte < 0x80:
            return 0
    return 0


@functools.cache
def _alphabet() -> list[str]:
    """The printable characters that stand for the bytes in the library, as in GPT-2."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _named(token: bytes) -> str:
    return "".join(_alphabet()[byte] for byte in token)


def _library_tokenizer(
    vocabulary: dict[str, int], merges: list[tuple[str, str]]
) -> "tokenizers.Tokenizer":
    # Its own threads would warn in each process that is forked later; ours work on other batches.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers
    from tokenizers import models, pre_tokenizers

    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return library


def _merges_of(library: "tokenizers.Tokenizer") -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(library.to_str())["model"]["merges"]]

"""What a tokenizer throws away, in nats: what bits per byte charge besides the tokens.

A tokenizer of words lowers case, loses the white space between tokens, and has one [UNK] for all
words that it doesn't know. Whoever has only the token ids of a text needs more bits to write the
text again, byte by byte. `Charges` counts these bits with small models of the training texts. Each
is a proper probability, so a decoder with the same models could read them, in this order:

1. the first token of each text, unless a separator makes it a target: how often texts begin so;
2. the spelling of each [UNK] as it is typed: the n-grams of bytes in the different words;
3. what stands before each token and behind the last one, from left to right: given the tokens on
   both sides, and what stood before the left one;
4. the case of each other token, from left to right: given the token, the case of the last token
   with letters, and which two marks (or words) stand before.

Nothing is charged for byte-level BPE, from whose tokens the bytes follow, nor for the separators.

Case is one of `PATTERNS`. A token in another case, and white space that isn't among the `GAPS`
known ones, are spelled like an [UNK].
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from minigpt.data import text
from minigpt.data.interface import pieces
from minigpt.data.tokenizer import PADDING, UNKNOWN, Texts, Tokenizer, WordTokenizer

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int | None], None]

PATTERNS = ("as the token is", "First letter a capital", "ALL CAPITALS", "spelled")
SPELLED = len(PATTERNS) - 1
GAPS = 63  # the first different ones of the training texts; the next number stands for all others
_CLASSES = 256
_WORD, _BOUND, _FIRST_MARK = range(3)  # classes of tokens: words, the bounds of a text, each mark
_BYTES = 257  # symbols of the spelling: the end, then each byte
_SPELLING_ORDER = 6  # symbols in an n-gram

_PIECE_BYTES = 2**22  # of texts at a time
_PIECES_TO_ADD = 32


class WittenBell:
    """Predicts symbols from contexts, by counts that are interpolated from level to level.

    A context that was seen n times, with k different symbols, leaves the share k / (n + k) to the
    prediction of the level before; the first level leaves it to the uniform distribution. So the
    probabilities of all symbols add up to 1, and none is 0. This is method C of Witten and Bell
    (1991), "The zero-frequency problem".
    """

    def __init__(self, contexts: Sequence[Ints], symbols: Ints, times: Ints, kinds: int) -> None:
        """Counts events.

        Args:
            contexts: For each level, the number of each event's context, below 2^63 / kinds.
            symbols: (E,) what followed, from 0 to kinds - 1.
            times: (E,) how often it did.
            kinds: The number of symbols.
        """
        self._kinds, self._levels = kinds, []
        for context in contexts:
            keys, counts = _added(context * kinds + symbols, times)
            known, first, different = np.unique(
                keys // kinds, return_index=True, return_counts=True
            )
            totals = np.add.reduceat(counts, first) if len(keys) else counts
            self._levels.append((keys, counts, known, totals, different))

    def nats(self, contexts: Sequence[Ints], symbols: Ints) -> Floats:
        """Returns the nats of each of (E,) events, in contexts of the same levels."""
        found = np.full(len(symbols), 1 / self._kinds)
        for context, level in zip(contexts, self._levels, strict=True):
            keys, counts, known, totals, different = level
            seen = _look_up(keys, counts, context * self._kinds + symbols)
            n, k = (_look_up(known, values, context) for values in (totals, different))
            found = np.where(n > 0, (seen + k * found) / np.maximum(n + k, 1), found)
        return -np.log(found)


class Nats(NamedTuple):
    """Nats of what the tokens of some texts leave out.

    Attributes:
        first: Of the first token of each text.
        spelling: Of each [UNK].
        spacing: Of white space, and of line breaks in HTML.
        case: Of capital letters.
    """

    first: float
    spelling: float
    spacing: float
    case: float


class Charges:
    """Small models of the training texts, which predict what the tokens of a text leave out.

    Attributes:
        tokenizer: The tokenizer.
    """

    def __init__(
        self, batches: Iterable[Texts], tokenizer: Tokenizer, progress: Progress | None = None
    ) -> None:
        """Learns from training texts.

        Args:
            batches: (N,) texts each; they are read once, and one batch is in memory at a time.
            tokenizer: The tokenizer.
            progress: Called with the texts read so far, and at the end with the total.
        """
        self.tokenizer = tokenizer
        if isinstance(tokenizer, WordTokenizer):
            self._learn(batches, tokenizer, progress)

    def _learn(
        self, batches: Iterable[Texts], tokenizer: WordTokenizer, progress: Progress | None
    ) -> None:
        self._class_of, self._letters_of = _classes(tokenizer.tokens), _letters(tokenizer.tokens)
        self._gaps: dict[str, int] = {}
        first, spacing, case, spelled = _Tally(), _Tally(), _Tally(), set[str]()
        count = 0
        for piece in _pieces(batches):
            read = self._read(piece, tokenizer, learn=True)
            first.add(read.first)
            spacing.add(read.spacing)
            case.add(read.case)
            spelled.update(read.words, read.other_gaps)
            count += len(piece)
            if progress:
                progress(count, None)
        if progress:
            progress(count, count)
        self._first = WittenBell(*_of_first(first.keys), first.times, len(tokenizer))
        self._spacing = WittenBell(*self._of_spacing(spacing.keys), spacing.times, GAPS + 1)
        self._case = WittenBell(*self._of_case(case.keys), case.times, len(PATTERNS))
        contexts, symbols = _of_spelling(sorted(spelled))
        self._spelling = WittenBell(contexts, symbols, np.ones_like(symbols), _BYTES)

    def __call__(self, texts: Texts) -> Nats:
        """Returns the nats of what the tokens of (N,) texts leave out."""
        sums = np.zeros(len(Nats._fields))
        if not isinstance(self.tokenizer, WordTokenizer):
            return Nats(*sums.tolist())
        for piece in _pieces([texts]):
            read = self._read(piece, self.tokenizer, learn=False)
            spacing = self._spacing.nats(*self._of_spacing(read.spacing)).sum()
            case = self._case.nats(*self._of_case(read.case)).sum()
            sums += (
                self._first.nats(*_of_first(read.first)).sum(),
                self._spell(read.unknown),
                spacing + self._spell(read.other_gaps),
                case + self._spell(read.other_cases),
            )
        return Nats(*sums.tolist())

    def _spell(self, strings: Sequence[str]) -> float:
        return float(self._spelling.nats(*_of_spelling(strings)).sum())

    def _read(self, texts: pa.Array, tokenizer: WordTokenizer, learn: bool) -> "_Read":
        lists, between = tokenizer.surfaces(texts), text.gaps(texts, tokenizer.style)
        offsets = lists.offsets.to_numpy().astype(np.int64)
        typed = lists.values.dictionary_encode()
        words, word_of = typed.dictionary, typed.indices.to_numpy()
        lowered = text.lower(words, tokenizer.style)
        names, tokens = words.to_pylist(), lowered.to_pylist()
        patterns = np.fromiter(map(_pattern, names, tokens), np.int64, len(names))[word_of]
        ids = tokenizer.ids(lowered)[word_of].astype(np.int64)
        known = ids != UNKNOWN

        texts_of = np.repeat(np.arange(len(texts)), np.diff(offsets))
        places = np.arange(len(ids)) + texts_of + 1
        stream = np.full(len(ids) + len(texts) + 1, PADDING, np.int64)  # a bound on either side
        stream[places] = ids
        left, right = stream[:-1], stream[1:]

        found = between.values.dictionary_encode()
        gap_names = found.dictionary.to_pylist()
        numbers = np.array([self._gap(name, learn) for name in gap_names], np.int64)
        gaps = numbers[found.indices.to_numpy()]
        before = np.where(left == PADDING, 0, np.append(0, gaps)[:-1])
        size = len(tokenizer)
        spacing = ((before * size + left) * size + right) * (GAPS + 1) + gaps

        has_letters = pc.not_equal(pc.utf8_upper(lowered), lowered).to_numpy(False)[word_of]
        last = np.maximum.accumulate(np.where(has_letters, np.arange(len(ids)), -1))
        last = np.append(-1, last)[:-1]
        case_before = np.where(last >= offsets[texts_of], patterns[last], 0)
        classes = self._class_of[stream]
        one, two = classes[places - 1], classes[places - 2]
        two[one == _BOUND] = _BOUND
        case = ((ids * len(PATTERNS) + case_before) * _CLASSES + one) * _CLASSES + two
        case = case * len(PATTERNS) + patterns

        def spelled(chosen: npt.NDArray[np.bool_], strings: pa.Array) -> list[str]:
            return list(strings.filter(pa.array(chosen)).to_pylist())

        return _Read(
            first=ids[offsets[:-1][(np.diff(offsets) > 0) & (tokenizer.separator is None)]],
            spacing=spacing,
            case=case[known],
            unknown=spelled(~known, lists.values),
            other_gaps=spelled(gaps == GAPS, between.values),
            other_cases=spelled(known & (patterns == SPELLED), lists.values),
            words=names,
        )

    def _gap(self, name: str, learn: bool) -> int:
        if learn and name not in self._gaps and len(self._gaps) < GAPS:
            self._gaps[name] = len(self._gaps)
        return self._gaps.get(name, GAPS)

    def _of_spacing(self, keys: Ints) -> tuple[list[Ints], Ints]:
        contexts, gaps = np.divmod(keys, GAPS + 1)
        rest, right = np.divmod(contexts, len(self.tokenizer))
        before, left = np.divmod(rest, len(self.tokenizer))
        sides = self._class_of[left] * _CLASSES + self._class_of[right]
        return [np.zeros_like(keys), before * _CLASSES**2 + sides, contexts], gaps

    def _of_case(self, keys: Ints) -> tuple[list[Ints], Ints]:
        contexts, patterns = np.divmod(keys, len(PATTERNS))
        one_mark, two = np.divmod(contexts, _CLASSES)
        rest, one = np.divmod(one_mark, _CLASSES)
        ids, before = np.divmod(rest, len(PATTERNS))
        any_word = (self._letters_of[ids] * len(PATTERNS) + before) * _CLASSES + one
        levels = [self._letters_of[ids], any_word, any_word * _CLASSES + two, one_mark, contexts]
        return levels, patterns


@dataclass(frozen=True)
class _Read:
    """What some texts hold besides their tokens: numbers of events, and strings to spell."""

    first: Ints
    spacing: Ints
    case: Ints
    unknown: list[str]
    other_gaps: list[str]
    other_cases: list[str]
    words: list[str]


class _Tally:
    """Counts of numbers, which are added up now and then."""

    def __init__(self) -> None:
        self._parts: list[tuple[Ints, Ints]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]

    def add(self, numbers: Ints) -> None:
        self._parts.append(np.unique(numbers, return_counts=True))
        if len(self._parts) > _PIECES_TO_ADD:
            self._add_up()

    @property
    def keys(self) -> Ints:
        return self._add_up()[0]

    @property
    def times(self) -> Ints:
        return self._add_up()[1]

    def _add_up(self) -> tuple[Ints, Ints]:
        if len(self._parts) > 1:
            keys, times = zip(*self._parts, strict=True)
            self._parts = [_added(np.concatenate(keys), np.concatenate(times))]
        return self._parts[0]


def _added(keys: Ints, times: Ints) -> tuple[Ints, Ints]:
    """Returns the different keys in order, and the sum of each one's times."""
    order = np.argsort(keys, kind="stable")
    found, first = np.unique(keys[order], return_index=True)
    return found, np.add.reduceat(times[order], first) if len(found) else times


def _look_up(keys: Ints, values: Ints, asked: Ints) -> Ints:
    """Returns the value of each key that is asked for; 0 if there is none."""
    if not len(keys):
        return np.zeros_like(asked)
    places = np.minimum(keys.searchsorted(asked), len(keys) - 1)
    return np.where(keys[places] == asked, values[places], 0)


def _of_first(ids: Ints) -> tuple[list[Ints], Ints]:
    return [np.zeros_like(ids)], ids


def _of_spelling(strings: Sequence[str]) -> tuple[list[Ints], Ints]:
    """Returns the levels of contexts (the bytes before) and the symbols of strings and their ends.

    A context starts with the string, and as many zeros as are missing stand before it.
    """
    encoded = [string.encode() for string in strings]
    lengths = np.array([len(string) + 1 for string in encoded], np.int64)
    bytes_and_ends = np.frombuffer(b"\0".join([*encoded, b""]), np.uint8)
    ends = np.cumsum(lengths) - 1
    symbols = bytes_and_ends.astype(np.int64) + 1
    symbols[ends] = 0
    place = np.arange(len(symbols)) - np.repeat(ends + 1 - lengths, lengths)
    levels = [np.zeros_like(symbols)]
    for back in range(1, _SPELLING_ORDER):
        symbol = np.where(place >= back, np.roll(symbols, back), 0)
        levels.append(levels[-1] + symbol * _BYTES ** (back - 1))
    return levels, symbols


def _pattern(typed: str, token: str) -> int:
    """Returns the case in which a token is typed, which with the token tells what was typed."""
    if typed == token:
        return 0
    letter = next((i for i, char in enumerate(token) if char.upper() != char), 0)
    capital = token[:letter] + token[letter].upper() + token[letter + 1 :]
    return 1 if typed == capital else 2 if typed == token.upper() else SPELLED


def _letters(tokens: Sequence[str]) -> Ints:
    """Returns how many letters with a capital each token has: 0, 1 or 2 for more."""
    counts = (sum(char.upper() != char for char in token) for token in tokens)
    return np.minimum(np.fromiter(counts, np.int64, len(tokens)), 2)


def _classes(tokens: Sequence[str]) -> Ints:
    """Returns the class of each token: as many marks as there is room for have one of their own."""
    classes = np.full(len(tokens), _WORD, np.int64)
    marks = [i for i, token in enumerate(tokens) if not any(char.isalnum() for char in token)]
    classes[marks] = np.minimum(np.arange(_BOUND, _BOUND + len(marks)), _CLASSES - 1)
    assert classes[PADDING] == _BOUND
    return classes


def _pieces(batches: Iterable[Texts]) -> Iterator[Texts]:
    for texts in batches:
        yield from pieces(texts, _PIECE_BYTES, len(texts))

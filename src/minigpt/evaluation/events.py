"""What texts hold besides their tokens, as events: case, white space, and words to spell."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from minigpt.common.progress import Progress
from minigpt.data import text
from minigpt.data.interface import pieces
from minigpt.data.tokenizer import PADDING, UNKNOWN, Texts, WordTokenizer

Ints = npt.NDArray[np.int64]

PATTERNS = ("as the token is", "First letter a capital", "ALL CAPITALS", "spelled")
SPELLED = len(PATTERNS) - 1
GAPS = 63  # the first different ones of the training texts; the next number stands for all others
_CLASSES = 256
_WORD, _BOUND = range(2)  # classes of tokens: words, the bounds of a text; then each mark

_PIECE_BYTES = 2**22  # of texts at a time
_PIECES_TO_ADD = 8


class Events:
    """Counts of what training texts hold besides their tokens.

    The counts of the parts of a corpus add up to those of the whole.
    """

    def __init__(self, tokenizer: WordTokenizer, gaps: Iterable[str] = ()) -> None:
        """Begins with no texts.

        Args:
            tokenizer: The tokenizer.
            gaps: White space that is numbered already: for a part of a corpus, the `first_gaps` of
                the whole. Other white space gets the numbers that are left as it occurs.
        """
        self.reader = Reader(tokenizer, gaps)
        self.first, self.spacing, self.case = _Tally(), _Tally(), _Tally()
        self.spelled = set[str]()

    def count(self, batches: Iterable[Texts], progress: Progress | None = None) -> None:
        """Counts texts; `progress` is as for `learn`."""
        seen = 0
        for piece in text_pieces(batches):
            read = self.reader(piece, learn=True)
            self.first.add(*np.unique(read.first, return_counts=True))
            self.spacing.add(*np.unique(read.spacing, return_counts=True))
            self.case.add(*np.unique(read.case, return_counts=True))
            self.spelled.update(read.words, read.other_gaps)
            seen += len(piece)
            if progress:
                progress(seen, None)
        if progress:
            progress(seen, seen)

    def add(self, other: "Events") -> None:
        """Adds the counts of another part of the corpus, whose white space has the same numbers."""
        assert self.reader.gaps == other.reader.gaps
        self.first.add(other.first.keys, other.first.times)
        self.spacing.add(other.spacing.keys, other.spacing.times)
        self.case.add(other.case.keys, other.case.times)
        self.spelled |= other.spelled


def first_gaps(batches: Iterable[Texts], tokenizer: WordTokenizer) -> list[str]:
    """Returns the first different white space of texts, `GAPS` at most, in order.

    That of consecutive parts of a corpus, in a row, begins with that of the whole.
    """
    found: dict[str, None] = {}
    for piece in text_pieces(batches):
        if len(found) < GAPS:
            found |= dict.fromkeys(text.gaps(piece, tokenizer.style).values.unique().to_pylist())
    return list(found)[:GAPS]


class Reader:
    """Reads the events of texts.

    Attributes:
        tokenizer: The tokenizer.
        gaps: The numbers of white space; `GAPS` stands for what has none.
    """

    def __init__(self, tokenizer: WordTokenizer, gaps: Iterable[str]) -> None:
        """Numbers white space; see `Events`."""
        self.tokenizer = tokenizer
        self._class_of, self._letters_of = _classes(tokenizer.tokens), _letters(tokenizer.tokens)
        self.gaps = {name: number for number, name in enumerate(gaps)}

    def __call__(self, texts: pa.Array, learn: bool) -> "Read":
        """Returns the events of (N,) texts; what is learned numbers new white space too."""
        tokenizer = self.tokenizer
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

        return Read(
            first=ids[offsets[:-1][(np.diff(offsets) > 0) & (tokenizer.separator is None)]],
            spacing=spacing,
            case=case[known],
            unknown=spelled(~known, lists.values),
            other_gaps=spelled(gaps == GAPS, between.values),
            other_cases=spelled(known & (patterns == SPELLED), lists.values),
            words=names,
        )

    def _gap(self, name: str, learn: bool) -> int:
        if learn and name not in self.gaps and len(self.gaps) < GAPS:
            self.gaps[name] = len(self.gaps)
        return self.gaps.get(name, GAPS)

    def of_spacing(self, keys: Ints) -> tuple[list[Ints], Ints]:
        """Returns the contexts of events of white space, level by level, and their symbols."""
        contexts, gaps = np.divmod(keys, GAPS + 1)
        rest, right = np.divmod(contexts, len(self.tokenizer))
        before, left = np.divmod(rest, len(self.tokenizer))
        sides = self._class_of[left] * _CLASSES + self._class_of[right]
        return [np.zeros_like(keys), before * _CLASSES**2 + sides, contexts], gaps

    def of_case(self, keys: Ints) -> tuple[list[Ints], Ints]:
        """Returns the contexts of events of case, level by level, and their symbols."""
        contexts, patterns = np.divmod(keys, len(PATTERNS))
        one_mark, two = np.divmod(contexts, _CLASSES)
        rest, one = np.divmod(one_mark, _CLASSES)
        ids, before = np.divmod(rest, len(PATTERNS))
        any_word = (self._letters_of[ids] * len(PATTERNS) + before) * _CLASSES + one
        levels = [self._letters_of[ids], any_word, any_word * _CLASSES + two, one_mark, contexts]
        return levels, patterns


@dataclass(frozen=True)
class Read:
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

    def add(self, keys: Ints, times: Ints) -> None:
        """Counts numbers so many times each."""
        self._parts.append((keys, times))
        if len(self._parts) > _PIECES_TO_ADD:
            self._add_up()

    @property
    def keys(self) -> Ints:
        """The different numbers, in order."""
        return self._add_up()[0]

    @property
    def times(self) -> Ints:
        """How often each of `keys` was counted."""
        return self._add_up()[1]

    def _add_up(self) -> tuple[Ints, Ints]:
        if len(self._parts) > 1:
            keys, times = zip(*self._parts, strict=True)
            self._parts = [added(np.concatenate(keys), np.concatenate(times))]
        return self._parts[0]


def added(keys: Ints, times: Ints) -> tuple[Ints, Ints]:
    """Returns the different keys in order, and the sum of each one's times."""
    order = np.argsort(keys, kind="stable")
    found, first = np.unique(keys[order], return_index=True)
    return found, np.add.reduceat(times[order], first) if len(found) else times


def text_pieces(batches: Iterable[Texts]) -> Iterator[Texts]:
    """Yields texts, a few MB at a time."""
    for texts in batches:
        yield from pieces(texts, _PIECE_BYTES, len(texts))


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

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

Case is one of `events.PATTERNS`. A token in another case, and white space that isn't among the
`events.GAPS` known ones, are spelled like an [UNK].
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from minigpt.common.progress import Progress
from minigpt.data.tokenizer import Texts, Tokenizer, WordTokenizer
from minigpt.evaluation.events import GAPS, PATTERNS, Events, Ints, added, text_pieces

Floats = npt.NDArray[np.float64]

_BYTES = 257  # symbols of the spelling: the end, then each byte
_SPELLING_ORDER = 6  # symbols in an n-gram


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
            keys, counts = added(context * kinds + symbols, times)
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

    def __init__(self, tokenizer: Tokenizer, events: Events | None) -> None:
        """Makes the models.

        Args:
            tokenizer: The tokenizer.
            events: Those of the training texts; None: the tokens leave out nothing.
        """
        self.tokenizer, self._reader = tokenizer, events and events.reader
        if not events:
            return
        reader, first, spacing, case = events.reader, events.first, events.spacing, events.case
        self._first = WittenBell(*_of_first(first.keys), first.times, len(reader.tokenizer))
        self._spacing = WittenBell(*reader.of_spacing(spacing.keys), spacing.times, GAPS + 1)
        self._case = WittenBell(*reader.of_case(case.keys), case.times, len(PATTERNS))
        contexts, symbols = _of_spelling(sorted(events.spelled))
        self._spelling = WittenBell(contexts, symbols, np.ones_like(symbols), _BYTES)

    def __call__(self, texts: Texts) -> Nats:
        """Returns the nats of what the tokens of (N,) texts leave out."""
        sums = np.zeros(len(Nats._fields))
        if not (reader := self._reader):
            return Nats(*sums.tolist())
        for piece in text_pieces([texts]):
            read = reader(piece, learn=False)
            spacing = self._spacing.nats(*reader.of_spacing(read.spacing)).sum()
            case = self._case.nats(*reader.of_case(read.case)).sum()
            sums += (
                self._first.nats(*_of_first(read.first)).sum(),
                self._spell(read.unknown),
                spacing + self._spell(read.other_gaps),
                case + self._spell(read.other_cases),
            )
        return Nats(*sums.tolist())

    def _spell(self, strings: Sequence[str]) -> float:
        return float(self._spelling.nats(*_of_spelling(strings)).sum())


def learn(
    batches: Iterable[Texts], tokenizer: Tokenizer, progress: Progress | None = None
) -> Charges:
    """Learns from training texts.

    Args:
        batches: (N,) texts each; they are read once, and one batch is in memory at a time.
        tokenizer: The tokenizer.
        progress: Called with the texts read so far, and at the end with the total.
    """
    if not isinstance(tokenizer, WordTokenizer):
        return Charges(tokenizer, None)
    events = Events(tokenizer)
    events.count(batches, progress)
    return Charges(tokenizer, events)


class TextTotals(NamedTuple):
    """What bits per byte of some texts need besides the loss.

    Attributes:
        bytes: Of the texts.
        targets: Their tokens that are predicted, without separators.
        charged: Nats of what the tokens leave out.
    """

    bytes: int
    targets: int
    charged: float


def charge(texts: Texts, charges: Charges) -> TextTotals:
    """Returns what bits per byte of (N,) texts need besides the loss."""
    tokenizer = charges.tokenizer
    tokens = np.diff(tokenizer.encode(texts)[1])
    firsts = 0 if tokenizer.separator is not None else np.count_nonzero(tokens)
    size = pc.sum(pc.binary_length(texts)).as_py() or 0
    return TextTotals(size, int(tokens.sum() - firsts), sum(charges(texts)))


def total(parts: Iterable[TextTotals]) -> TextTotals:
    """Returns the sums of consecutive parts, which are added in their order."""
    size, targets, charged = 0, 0, 0.0
    for part in parts:
        size, targets, charged = size + part.bytes, targets + part.targets, charged + part.charged
    return TextTotals(size, targets, charged)


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

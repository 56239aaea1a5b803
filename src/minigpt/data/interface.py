"""What all tokenizers share: text as token ids and back, and a folder of two files."""

import abc
import functools
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from minigpt.common import files

VOCABULARY = "vocabulary.txt"
SETTINGS = "tokenizer.json"

# Texts per task: enough that starting one costs nothing, few enough for the processor's cache.
_PIECE = 2000

Texts: TypeAlias = pa.Array | pa.ChunkedArray


class Tokenizer(abc.ABC):
    """Maps text to token ids and back.

    Attributes:
        padding: The id that fills short sequences, which no text has; None: they can't be filled.
        unknown: The id of all tokens that are not known; None: there are none.
    """

    padding: ClassVar[int | None]
    unknown: ClassVar[int | None]

    @property
    @abc.abstractmethod
    def separator(self) -> int | None:
        """The id that stands before each document, which no text has; None: nothing does."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of ids."""

    @abc.abstractmethod
    def encode(self, texts: Texts) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Encodes texts.

        Args:
            texts: (N,) strings.

        Returns:
            The ids of all texts in a row, and (N + 1,) offsets: the ids of text n are
            `ids[offsets[n]:offsets[n + 1]]`.
        """

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> list[str]:
        """Returns the tokens of ids, each as text."""

    def complete(self, prompt: str, ids: Iterable[int], ended: bool = True) -> str:
        """Returns a prompt with what was written after it, as readable text.

        Args:
            prompt: A text, which may be empty.
            ids: What was written.
            ended: Whether no more ids follow. Otherwise the bytes of a character that is not
                complete are left out.
        """
        return self.completer(prompt)(ids, ended)

    @abc.abstractmethod
    def typed(self, prompt: str) -> list[str]:
        """Returns what each token of a prompt stands for, as `complete` shows it."""

    def parts(self, ids: Iterable[int]) -> list[str]:
        """Returns what each token adds to a text; the last token of a character adds it."""
        return self.decode(ids)

    @abc.abstractmethod
    def completer(self, prompt: str) -> Callable[[Iterable[int], bool], str]:
        """Returns `complete` for one prompt, which is looked at only once."""

    def settled(self, text: str) -> int:
        """Returns how many characters of what `complete` returned more ids can't change."""
        return len(text)

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What tokenizer.json holds."""

    @property
    @abc.abstractmethod
    def vocabulary(self) -> bytes:
        """What vocabulary.txt holds."""

    def save(self, folder: Path) -> None:
        """Writes the folder that `load` reads: vocabulary.txt and tokenizer.json."""
        with files.replacing(folder) as beside:
            beside.mkdir()
            (beside / VOCABULARY).write_bytes(self.vocabulary)
            (beside / SETTINGS).write_bytes(self._settings)

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of both files, one after the other, in hexadecimal."""
        return hashlib.sha256(self._settings + self.vocabulary).hexdigest()

    @property
    def _settings(self) -> bytes:
        return (json.dumps(self.settings, indent=2) + "\n").encode()


def in_threads(
    function: Callable[[pa.Array], Any], batches: Iterable[Texts], most_bytes: int
) -> Iterator[Any]:
    """Applies a function to a few texts at a time, in order.

    Args:
        function: Should release the interpreter lock, as Arrow does.
        batches: Texts.
        most_bytes: Bytes of the texts that are given at once, unless one text has more.
    """
    cut = (piece for batch in batches for piece in pieces(batch, most_bytes, _PIECE))
    first = list(itertools.islice(cut, 2))
    if len(first) < 2:  # a prompt, say: starting a thread takes longer
        yield from map(function, first)
        return
    threads = pa.cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Any]] = deque()
        for piece in itertools.chain(first, cut):
            waiting.append(pool.submit(function, piece))
            if len(waiting) > 2 * threads:  # enough to keep all of them busy
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def pieces(texts: Texts, most_bytes: int, most_texts: int) -> Iterator[Texts]:
    """Cuts (N,) texts into consecutive pieces of so many bytes, unless one text has more."""
    ends = np.cumsum(pc.binary_length(texts).to_numpy(), dtype=np.int64)
    start = 0
    while start < len(texts):
        most = ends[start] + most_bytes  # the first text may be of any length
        stop = min(start + most_texts, int(ends.searchsorted(most, side="right")))
        yield texts.slice(start, stop - start)
        start = stop

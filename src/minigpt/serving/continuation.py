"""The text behind a prompt, piece by piece as its tokens are written."""

import functools
import itertools
from collections.abc import Sequence

from minigpt.data.interface import Tokenizer
from minigpt.data.tokenizer import WordTokenizer


class Continuation:
    """What a text adds to its prompt. A piece that was returned once stays as it is.

    Where words are put together again, a token decides about the space before it and about quotes
    that were opened earlier. Nothing but spaces and capitals changes, so places are found by
    counting the other characters.

    Args:
        tokenizer: The model's.
        prompt: The prompt as it was given.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._complete = tokenizer.completer(prompt)
        self._words = isinstance(tokenizer, WordTokenizer)
        self._begins = self._count(self._complete([], True))

    def text(self, ids: Sequence[int], ended: bool, echo: bool = False) -> str:
        """Returns the text of new tokens, as far as later ones can't change it.

        Args:
            ids: The new tokens so far.
            ended: Whether there are no more, so that nothing can change.
            echo: Whether the prompt stands before it.
        """
        whole = self._complete(ids, ended)
        start = 0 if echo else self.begin(whole)
        return whole[start : None if ended else max(start, self._tokenizer.settled(whole))]

    def begin(self, whole: str) -> int:
        """Returns where the new text begins in a text with its prompt."""
        return _behind(whole, self._begins) if self._words else min(self._begins, len(whole))

    def offsets(self, ids: Sequence[int], text: str, echo: bool = False) -> list[int]:
        """Returns where the part of each token begins in a text that `text` returned.

        Args:
            ids: The new tokens so far.
            text: What `text` returned.
            echo: Whether the prompt stands before it; its tokens then come first.

        Returns:
            Places in `text`. Tokens whose part begins behind it are left out.
        """
        parts = [*(self._typed if echo else ()), *self._tokenizer.parts(ids)]
        counts = itertools.accumulate(map(len, parts[:-1]), initial=0)
        places: Sequence[int] = range(len(text))
        if self._words:  # where characters other than spaces have been counted
            places = [at for at in places if at == 0 or text[at - 1] != " "]
        return [places[count] for count in counts if count < len(places)][: len(parts)]

    @functools.cached_property
    def _typed(self) -> list[str]:
        return self._tokenizer.typed(self._prompt)

    def _count(self, text: str) -> int:
        return len(text) - text.count(" ") if self._words else len(text)


def _behind(text: str, letters: int) -> int:
    """Returns the place behind a number of characters that are no spaces."""
    if not letters:
        return 0
    for place, character in enumerate(text, 1):
        letters -= character != " "
        if not letters:
            return place
    return len(text)

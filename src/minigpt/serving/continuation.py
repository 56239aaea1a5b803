"""The text behind a prompt, piece by piece as its tokens are written."""

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
        self._tokenizer, self._complete = tokenizer, tokenizer.completer(prompt)
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
        return self._place(whole, self._begins)

    def offsets(self, ids: Sequence[int], text: str, echo: bool = False) -> list[int]:
        """Returns where the part of each token begins in a text that `text` returned.

        Tokens whose part begins behind the text are left out.
        """
        found, count = [], self._begins if echo else 0
        for number, token in enumerate(self._tokenizer.decode(ids), 1):
            at = self._place(text, count)
            if at >= len(text):
                break
            found.append(at)
            if self._words:
                count += len(token)
            else:  # a character may consist of several tokens
                so_far = self._complete(ids[:number], False)
                count = len(so_far) - (0 if echo else self._begins)
        return found

    def _count(self, text: str) -> int:
        return len(text) - text.count(" ") if self._words else len(text)

    def _place(self, text: str, count: int) -> int:
        return _behind(text, count) if self._words else min(count, len(text))


def _behind(text: str, letters: int) -> int:
    """Returns the place behind a number of characters that are no spaces."""
    if not letters:
        return 0
    for place, character in enumerate(text, 1):
        letters -= character != " "
        if not letters:
            return place
    return len(text)

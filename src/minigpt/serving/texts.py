"""One text of an answer: its pieces, its end and its log-probabilities, in OpenAI's format."""

from collections.abc import Sequence
from typing import Any

from minigpt.data.interface import Tokenizer
from minigpt.serving.continuation import Continuation
from minigpt.serving.engine import Logprobs


class Text:
    """A text as it is written. The pieces joined are the text, whether it is streamed or not.

    Args:
        tokenizer: The model's.
        continuation: Turns tokens into text.
        stops: Texts that end it.
        echo: Whether it begins with the prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer, continuation: Continuation, stops: Sequence[str], echo: bool
    ) -> None:
        self._tokenizer, self._continuation, self._stops = tokenizer, continuation, stops
        self._echo = echo
        self._sent, self._listed, self.stopped = 0, 0, False

    def piece(self, ids: Sequence[int], ended: bool) -> str:
        """Returns what is settled since the last call; `stopped` tells of a stop text.

        Args:
            ids: All new tokens so far.
            ended: Whether there are no more.
        """
        text = self._continuation.text(ids, ended, self._echo)
        start = self._continuation.begin(text) if self._echo else 0
        # The one that is complete first, so that the text does not depend on how much is there.
        places = [(p + len(stop), p) for stop in self._stops if (p := text.find(stop, start)) >= 0]
        if places:
            self.stopped, text = True, text[: min(places)[1]]
        elif not ended:
            text = text[: len(text) - max((_begun(text, stop) for stop in self._stops), default=0)]
        self._text = text
        piece = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return piece

    def written(self, ids: Sequence[int]) -> int:
        """Returns how many tokens the text consists of."""
        if not self.stopped:
            return len(ids)
        text = self._text[self._continuation.begin(self._text) :] if self._echo else self._text
        return len(self._continuation.offsets(ids, text))

    def logprobs(
        self, prompt: Sequence[int], ids: Sequence[int], listed: Sequence[Logprobs]
    ) -> dict[str, Any]:
        """Returns the log-probabilities of the tokens whose text `piece` has returned since.

        Args:
            prompt: The tokens of the prompt, if the text begins with it; else none.
            ids: All new tokens so far.
            listed: Those of each token, the prompt's first.
        """
        first = self._listed
        offsets = self._continuation.offsets(ids, self._text, self._echo)
        self._listed = len(offsets)
        names = self._tokenizer.decode([*prompt, *ids][first : self._listed])
        own = [value for value, _ in listed[first : self._listed]]
        return {
            "tokens": names,
            "token_logprobs": own,
            "top_logprobs": [
                None if value is None else {**self._named(candidates), name: value}
                for (_, candidates), name, value in zip(
                    listed[first : self._listed], names, own, strict=True
                )
            ],
            "text_offset": offsets[first:],
        }

    def _named(self, candidates: Sequence[tuple[int, float]]) -> dict[str, float]:
        names = self._tokenizer.decode([token for token, _ in candidates])
        return dict(zip(names, (value for _, value in candidates), strict=True))


def _begun(text: str, stop: str) -> int:
    """Returns the most characters at the end of a text with which a stop text begins."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)

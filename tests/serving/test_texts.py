"""The pieces of a text: joined they are the text, however many tokens come at once."""

import itertools
from typing import Any

import numpy as np
import pytest

from minigpt.data.tokenizer import WordTokenizer
from minigpt.serving.continuation import Continuation
from minigpt.serving.texts import Text

SPELLED = "this movie isn ' t the \" best . , ( ) ! ? i 7 / 10 - know $ a"
TOKENS = ("", "[UNK]", *SPELLED.split())
WORDS = WordTokenizer(TOKENS, "spaced")


def text(stops: list[str], echo: bool = False, prompt: str = "this movie") -> Text:
    return Text(WORDS, Continuation(WORDS, prompt), stops, echo)


def ids(words: str) -> list[int]:
    return [TOKENS.index(word) for word in words.split()]


def pieces(made: Text, tokens: list[int], steps: Any) -> list[str]:
    """Of a request that looks after some of the tokens, and at the end."""
    found = []
    for count in [*steps, len(tokens)]:
        found.append(made.piece(tokens[:count], count == len(tokens)))
        if made.stopped:
            break
    return found


@pytest.mark.parametrize("stops", [[], ["best"], ["!", "the b"], ["t best", "e be"], [" "]])
@pytest.mark.parametrize("echo", [False, True])
def test_pieces_joined_are_the_whole_text(stops: list[str], echo: bool) -> None:
    rng = np.random.default_rng(0)
    shown = 0
    for _ in range(60):
        tokens = rng.integers(1, len(TOKENS), 25).tolist()
        whole = pieces(text(stops, echo), tokens, [])
        streamed = pieces(text(stops, echo), tokens, range(1, 25))
        some = pieces(text(stops, echo), tokens, sorted(rng.choice(25, 5)))
        assert "".join(streamed) == "".join(some) == "".join(whole)
        assert not any(stop in "".join(whole) for stop in stops) or echo
        shown += sum(map(bool, streamed))
    assert stops == [" "] or shown > 60  # they do come as they are written


def test_a_text_begins_behind_its_prompt() -> None:
    tokens = ids("isn ' t the best . i know")
    assert text([]).piece(tokens, True) == " isn't the best. I know"
    assert text([], echo=True).piece(tokens, True) == "This movie isn't the best. I know"
    stopped = text(["the", "best"])
    assert stopped.piece(tokens, True) == " isn't " and stopped.stopped
    assert stopped.written(tokens) == 4  # the space is of `the`


def test_each_token_has_its_place() -> None:
    tokens = ids('isn \' t " the best " . 7 / 10')
    made = text([], prompt="this")
    whole = made.piece(tokens, True)
    assert whole == ' isn\'t "the best". 7/10'
    listed = [(-1.0, [(2, -0.5), (token, -1.0)]) for token in tokens]
    found = made.logprobs(tokens, listed)
    assert found["tokens"] == [TOKENS[token] for token in tokens]
    bounds = [*found["text_offset"], len(whole)]
    parts = [whole[start:end] for start, end in itertools.pairwise(bounds)]
    assert [part.strip() for part in parts] == found["tokens"]
    assert found["top_logprobs"][0] == {"this": -0.5, "isn": -1.0}
    assert found["token_logprobs"] == [-1.0] * len(tokens)

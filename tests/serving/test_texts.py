"""The pieces of a text: joined they are the text, however many tokens come at once."""

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
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
    found = made.logprobs([], tokens, listed)
    assert found["tokens"] == [TOKENS[token] for token in tokens]
    bounds = [*found["text_offset"], len(whole)]
    parts = [whole[start:end] for start, end in itertools.pairwise(bounds)]
    assert [part.strip() for part in parts] == found["tokens"]
    assert found["top_logprobs"][0] == {"this": -0.5, "isn": -1.0}
    assert found["token_logprobs"] == [-1.0] * len(tokens)


def test_an_echoed_prompt_has_its_places_too() -> None:
    """Also where a token is not known, whose text is as it was typed, and in several pieces."""
    given, tokens = "This  unheard-of movie isn't \"the", ids('best " . i know')
    made = text([], echo=True, prompt=given)
    prompt = WORDS.encode(pa.array([given]))[0].tolist()
    listed = [(None, []), *[(-1.0, [(2, -0.5)])] * (len(prompt) + len(tokens) - 1)]
    whole, found = "", {name: [] for name in ("tokens", "text_offset", "top_logprobs")}
    for count in range(1, len(tokens) + 1):
        whole += made.piece(tokens[:count], count == len(tokens))
        more = made.logprobs(prompt, tokens[:count], listed[: len(prompt) + count])
        for name, entries in found.items():
            entries += more[name]
    assert whole == 'This unheard-of movie isn\'t "the best". I know'
    bounds = [*found["text_offset"], len(whole)]
    parts = [whole[start:end].strip() for start, end in itertools.pairwise(bounds)]
    shown = 'This unheard - of movie isn \' t " the best " . I know'
    assert parts == shown.split()
    names = shown.lower().replace("unheard", "[UNK]").replace(" of ", " [UNK] ")
    assert found["tokens"] == names.split()
    assert found["top_logprobs"][:2] == [None, {"this": -0.5, "[UNK]": -1.0}]
    assert made.written(tokens) == len(tokens)

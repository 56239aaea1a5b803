"""Prompts that the model does not know are named before anything is computed."""

import logging

import pytest

from minigpt.common.errors import InputError
from minigpt.config import DEFAULT_PROMPTS
from minigpt.data.bpe import BytePairTokenizer
from minigpt.data.tokenizer import SEPARATOR_TOKEN, SPECIAL_TOKENS, WordTokenizer
from minigpt.generation import prompts

WORDS = WordTokenizer(("", "[UNK]", "the", "film", "movie"), "spaced")


def test_a_prompt_is_encoded() -> None:
    rows = prompts.encode(WORDS, ["The film!", "movie zyx"])
    assert [row.tolist() for row in rows] == [[2, 3, 1], [4, 1]]


def test_a_separator_stands_before_each_prompt_and_takes_an_empty_one() -> None:
    words = WordTokenizer((*SPECIAL_TOKENS, SEPARATOR_TOKEN, "film"), "words")
    rows = prompts.encode(words, ["Film <|endoftext|>", "", " \n"])
    assert [row.tolist() for row in rows] == [[2, 3, 1, 1, 1, 1, 1], [2], [2]]
    rows = prompts.encode(BytePairTokenizer(()), ["a<|endoftext|>", ""])
    assert rows[0].tolist() == [0, *(byte + 1 for byte in b"a<|endoftext|>")]
    assert rows[1].tolist() == [0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "sample.prompts: there is no prompt"),
        (["film", " "], "sample.prompts ' ' is empty"),
        (["zyx qwv"], "sample.prompts 'zyx qwv' has no word that the model knows"),
    ],
)
def test_a_prompt_that_can_not_be_used_is_named(given: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prompts.encode(WORDS, given, "sample.prompts")
    with pytest.raises(InputError):
        prompts.known(WORDS, given, "sample.prompts")


def test_a_default_prompt_that_the_corpus_does_not_know_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    assert prompts.known(WORDS, DEFAULT_PROMPTS, "sample.prompts") == [
        "this movie is",
        "the acting was",
    ]
    assert len(caplog.records) == 2
    assert "left out, set sample.prompts to your own" in caplog.text
    with pytest.raises(InputError, match="knows none of the default prompts"):
        prompts.known(
            WordTokenizer(("", "[UNK]", "bonjour"), "spaced"), DEFAULT_PROMPTS, "sample.prompts"
        )
    separated = WordTokenizer(("", "[UNK]", "<|endoftext|>", "bonjour"), "words")
    assert prompts.known(separated, DEFAULT_PROMPTS, "sample.prompts") == [""]
    assert "texts begin from nothing" in caplog.text

"""Texts that share a step, against the generator, which writes them alone."""

from typing import Any

import numpy as np
import pytest
from keras import ops

from minigpt.config import SamplingConfig
from minigpt.data.tokenizer import WordTokenizer
from minigpt.generation import sampling
from minigpt.generation.decoding import Generator
from minigpt.serving.requests import MOST_LOGPROBS
from minigpt.serving.slots import Slots

WORDS = WordTokenizer(("", "[UNK]", *(f"w{i}" for i in range(50))), "spaced")  # of 60 rows
LONGEST = 30


def sampled(max_tokens: int, **knobs: Any) -> SamplingConfig:
    return SamplingConfig(max_tokens=max_tokens, **knobs)


ROWS = [
    sampled(26, seed=3),
    sampled(26, temperature=0, repetition_penalty=1.5),
    sampled(9, seed=5, top_k=5, temperature=1.3),
    sampled(26, seed=6, top_p=0.7, min_p=0.02, repetition_penalty=1.1),
    sampled(3, seed=7, allow_unknown=True),
]
LENGTHS = (1, 3, 25, 20, 7)  # the context has 20


@pytest.fixture(scope="module")
def network(make_network: Any) -> Any:
    return make_network(num_blocks=1, positions="rotary", token_shift=True)


@pytest.fixture(scope="module")
def slots(network: Any) -> Slots:
    return Slots(network, WORDS, 6, LONGEST)


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(2, len(WORDS), length).astype("int32") for length in LENGTHS]


def numbers(row: SamplingConfig) -> np.ndarray:
    return sampling.uniforms(row, 0, row.max_tokens)


def test_texts_are_those_that_the_generator_writes_alone(network: Any, slots: Slots) -> None:
    """They come one after the other, in any slot, go away for a while, and leave at any time.

    Some end in the middle of a call.
    """
    generator = Generator(network, WORDS)
    expected = [
        generator.tokens([prompt], row)[0].tolist()
        for prompt, row in zip(prompts(), ROWS, strict=True)
    ]
    found: list[list[int]] = [[] for _ in ROWS]
    running: dict[int, int] = {}  # the row of a slot
    away: dict[int, Any] = {}
    waiting, coming = list(range(len(ROWS))), {0: (4,), 2: (1, 0), 3: (5, 2)}
    for step in range(60):
        if step in coming:
            taken = [(slot, waiting.pop()) for slot in coming[step]]
            slots.read([(slot, prompts()[row], ROWS[row]) for slot, row in taken])
            running.update(taken)
        if step == 4:
            slot = next(slot for slot, row in running.items() if len(found[row]) < 20)
            away[running.pop(slot)] = slots.take(slot)
        if step == 7:
            row, kept = away.popitem()
            slot = min({*range(6)} - {*running})
            slots.put(slot, kept, ROWS[row])
            running[slot] = row
        if not running:
            break
        given: list[Any] = [None] * (max(running) + 1)
        steps = step % 4 + 1
        for slot, row in running.items():
            given[slot] = numbers(ROWS[row])[len(found[row]) :][:steps]
        written = slots.write(given, steps, False)
        for slot, row in list(running.items()):
            found[row] += written.tokens[slot].tolist()
            if len(found[row]) >= ROWS[row].max_tokens:
                del found[row][ROWS[row].max_tokens :], running[slot]
    assert found == expected


def test_log_probabilities_are_those_of_the_model(network: Any, slots: Slots) -> None:
    prompt, row = prompts()[4], sampled(2, temperature=0.5, top_k=2, repetition_penalty=9.0)
    slots.read([(0, prompt, row)])
    written = slots.write([numbers(row)], 2, True)
    whole = np.append(prompt, written.tokens[0])
    for place in range(2):
        logits = ops.convert_to_numpy(network(whole[None, : len(prompt) + place]))[0, -1]
        expected = logits - np.log(np.exp(logits.astype("float64")).sum())
        own = expected[written.tokens[0, place]]
        assert written.own[0, place] == pytest.approx(own, abs=1e-5)
        best = np.argsort(-expected[1 : len(WORDS)])[:MOST_LOGPROBS] + 1  # those that have a name
        assert written.candidates[0, place].tolist() == best.tolist()
        np.testing.assert_allclose(written.logprobs[0, place], expected[best], atol=1e-5)


def test_a_network_with_learned_positions_ends_at_its_context(make_network: Any) -> None:
    learned = Slots(make_network(num_blocks=1), WORDS, 1, LONGEST)
    assert [learned.fits(length, 30) for length in (1, 15, 20, 21)] == [20, 6, 1, 0]
    assert learned.fits(1, 5) == 5
    row = sampled(6, seed=2)
    learned.read([(0, prompts()[3][:15], row)])
    written = learned.write([numbers(row)], 6, False).tokens[0].tolist()
    (expected,) = Generator(learned.network, WORDS).tokens([prompts()[3][:15]], row)
    assert written == expected.tolist()
    learned.write([None], 1, False)  # nothing is read behind the last position

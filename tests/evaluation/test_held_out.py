"""Held-out figures against sums over single tokens."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from keras import ops

from minigpt.data import bpe
from minigpt.data.tokenizer import SEPARATOR_TOKEN, SPECIAL_TOKENS, UNKNOWN, WordTokenizer
from minigpt.evaluation import held_out
from minigpt.evaluation.charges import Nats, learn
from minigpt.evaluation.held_out import HeldOut

NOTHING = Nats(0.0, 0.0, 0.0, 0.0)
LENGTH = 6  # the network's context
WORDS = WordTokenizer((*SPECIAL_TOKENS, "the", "a", "film", "was", "good", "bad", "."), "spaced")
TEXTS = pa.array(
    [
        "The film was good. The film was bad.<br /><br />A good, good film",
        "xyzzy",
        "A  bad film",
        "xyzzy was plugh . the good was good . a bad a bad a bad",
        "the film was good.",
    ]
)
CHARGES = learn([TEXTS], WORDS)


@pytest.fixture(scope="module")
def network(make_network: Any) -> Any:
    return make_network(vocabulary_size=12, context_length=LENGTH)


@pytest.fixture(scope="module")
def reviews() -> HeldOut:
    return held_out.read(TEXTS, CHARGES)


@pytest.fixture(scope="module")
def expected(network: Any, reviews: HeldOut, compiled: Any) -> list[tuple[float, bool, int]]:
    """Nats, hit and position of each target, from the logits of the tokens before it alone."""
    call, found = compiled(network.call), []
    for start, stop in zip(reviews.offsets[:-1], reviews.offsets[1:], strict=True):
        for target in range(start + 1, stop):
            position = (target - start - 1) % LENGTH + 1
            seen = reviews.ids[target - position : target]
            logits = ops.convert_to_numpy(call(seen[None]))[0, -1].astype("float64")
            logits -= logits.max()
            word = reviews.ids[target]
            nats = math.log(np.exp(logits).sum()) - logits[word]
            found.append((nats, int(logits.argmax()) == word, position))
    return found


@pytest.mark.backend
@pytest.mark.parametrize("batch_size", [3, 128])
def test_every_token_but_a_reviews_first_is_a_target_once(
    network: Any, reviews: HeldOut, expected: Any, batch_size: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(held_out, "BATCH_SIZE", batch_size)
    steps = []
    losses, right, positions = held_out.model_losses(
        network, reviews, progress=lambda *step: steps.append(step)
    )
    np.testing.assert_allclose(losses, [row[0] for row in expected], rtol=1e-4, atol=1e-5)
    assert right.tolist() == [row[1] for row in expected]
    assert positions.tolist() == [row[2] for row in expected]
    assert len(steps) == -(-steps[-1][1] // batch_size) and steps[-1][0] == steps[-1][1]


def test_the_figures_of_a_model(network: Any, reviews: HeldOut, expected: Any) -> None:
    measured = held_out.measure(network, CHARGES, TEXTS)
    nats = [row[0] for row in expected]
    targets = reviews.ids[reviews.targets]
    known = [row[0] for row, word in zip(expected, targets, strict=True) if word != UNKNOWN]
    assert len(nats) - len(known) == 2  # plugh and the comma; each xyzzy is a first token
    assert measured == pytest.approx(
        {
            "loss": np.mean(nats),
            "perplexity": math.exp(np.mean(nats)),
            "known_loss": np.mean(known),
            "known_perplexity": math.exp(np.mean(known)),
            "accuracy": np.mean([row[1] for row in expected]),
            "unk_share": 2 / len(nats),
            "bits_per_byte": (sum(nats) + sum(reviews.charged)) / math.log(2) / reviews.text_bytes,
        },
        rel=1e-5,
    )


def test_bits_per_byte_by_hand() -> None:
    charged = Nats(first=2.0, spelling=1.5, spacing=1.0, case=0.5)
    reviews = HeldOut(np.array([2, 3, 1], np.int32), np.array([0, 3]), np.array([1, 2]), charged, 7)
    found = held_out.figures(reviews, np.array([1.0, 2.0]))
    assert found["loss"] == 1.5 and found["perplexity"] == pytest.approx(math.exp(1.5))
    assert found["bits_per_byte"] == pytest.approx((1 + 2 + 5) / math.log(2) / 7)
    parts = held_out.charged(reviews)
    assert parts["spelling"] == pytest.approx(1.5 / math.log(2) / 7)
    assert sum(parts.values()) == pytest.approx(5 / math.log(2) / 7)


def test_a_smaller_vocabulary_gains_nothing() -> None:
    # Two models that know the same: one names the rare words, the other says [UNK] with the
    # probability of all of them together and then has to spell the one it meant.
    texts = pa.array(["the q", "the x", "the x", "the the"])
    large, small = (
        WordTokenizer((*SPECIAL_TOKENS, *words), "spaced") for words in (["the", "x", "q"], ["the"])
    )
    figures = {}
    for words in (large, small):
        reviews = held_out.read(texts, learn([texts], words))
        ids = reviews.ids[reviews.targets]
        shares = np.bincount(ids) / len(ids)
        figures[words] = held_out.figures(reviews, -np.log(shares[ids]))
    assert figures[small]["loss"] < figures[large]["loss"]
    assert figures[small]["bits_per_byte"] > figures[large]["bits_per_byte"]


def test_the_bytes_do_not_depend_on_the_tokenizer(reviews: HeldOut) -> None:
    few = WordTokenizer((*SPECIAL_TOKENS, "the"), "published")
    found = held_out.read(TEXTS, learn([TEXTS], few)).text_bytes
    assert found == reviews.text_bytes == len("".join(TEXTS.to_pylist()))


def test_behind_a_separator_the_first_token_is_a_target() -> None:
    words = WordTokenizer((*SPECIAL_TOKENS, SEPARATOR_TOKEN, "the", "film"), "spaced")
    reviews = held_out.read(pa.array(["The film", "", "film"]), learn([TEXTS], words))
    assert reviews.ids.tolist() == [2, 3, 4, 2, 2, 4]
    assert reviews.targets.tolist() == [1, 2, 5]
    assert reviews.charged.first == 0


def test_without_a_known_target() -> None:
    reviews = HeldOut(np.array([2, 1], np.int32), np.array([0, 2]), np.array([1]), NOTHING, 3)
    found = held_out.model_figures(reviews, np.array([1000.0]), np.array([False]))
    assert (found["known_loss"], found["unk_share"]) == (0, 1)
    assert math.isfinite(found["perplexity"])


def test_byte_level_bpe_has_no_unknown_targets() -> None:
    pairs = bpe.train(TEXTS.to_pylist(), 260)
    reviews = held_out.read(pa.array(["a\0b"]), learn([TEXTS], pairs))
    count = len(reviews.targets)
    found = held_out.model_figures(reviews, np.ones(count), np.ones(count, np.bool_))
    assert (found["unk_share"], found["known_loss"]) == (0, 1)


def test_loss_by_position() -> None:
    rows = held_out.loss_by_position(np.array([4.0, 1, 2, 6]), np.array([1, 2, 4, 1]))
    assert rows == [
        {"position": 1, "loss": 5, "targets": 2},
        {"position": 2, "loss": 1, "targets": 1},
        {"position": 4, "loss": 2, "targets": 1},
    ]


def test_loss_by_band() -> None:
    # Entry 2 is the commonest word, of rank 1.
    ids = np.array([0, 2, 11, 12, 101, 102, 1001, 1002, 10_001, 10_002, 50_000, 1], np.int32)
    targets = np.arange(1, len(ids))
    losses = np.arange(len(targets), dtype=float)
    reviews = HeldOut(ids, np.array([0, len(ids)]), targets, NOTHING, 1)
    rows = held_out.loss_by_band(reviews, {"loss": losses, "other": losses + 1})
    assert [(row["band"], row["loss"], row["other"], row["targets"]) for row in rows] == [
        ("1-10", 0.5, 1.5, 2),
        ("11-100", 2.5, 3.5, 2),
        ("101-1000", 4.5, 5.5, 2),
        ("1001-10000", 6.5, 7.5, 2),
        ("10001-", 8.5, 9.5, 2),
        ("[UNK]", 10, 11, 1),
    ]


def test_the_digest_is_of_ids_and_texts_in_any_order() -> None:
    table = pa.table({"id": ["b", "a"], "text": ["1", "2"], "label": ["x", "y"]})
    found = held_out.digest(table)
    assert held_out.digest(table.take([1, 0]).drop_columns("label")) == found
    others = [{"id": ["b", "a"], "text": ["1", "3"]}, {"id": ["b", "c"], "text": ["1", "2"]}]
    others += [{"id": ["b", "a2"], "text": ["1", ""]}, {"id": ["b"], "text": ["1"]}]
    assert found not in {held_out.digest(pa.table(other)) for other in others}

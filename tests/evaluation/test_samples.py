"""Texts that are sampled to be counted."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from minigpt.config import EvaluateConfig, SamplingConfig
from minigpt.data.tokenizer import WordTokenizer
from minigpt.evaluation import copying, samples
from minigpt.evaluation.copying import Copy
from minigpt.evaluation.samples import Sample
from minigpt.generation.decoding import Written

WORDS = WordTokenizer(("", "[UNK]", "the", "film", "was"), "spaced")
CONFIG = EvaluateConfig(
    max_tokens=3, prompts=["the film", "the"], reviews=5, ngram_order=3, seed=7, top_k=2
)


def test_prompts_take_turns_and_no_two_batches_draw_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[np.ndarray], SamplingConfig]] = []

    def written(prompts: list[np.ndarray], sampling: SamplingConfig) -> list[Written]:
        asked.append((prompts, sampling))
        ids = np.full(sampling.max_tokens, {7: 2, 9: 3, 11: 4}[sampling.seed])
        return [Written(ids, False, True)] * len(prompts)

    monkeypatch.setattr(samples, "TEXTS_AT_ONCE", 2)
    generator, steps = SimpleNamespace(tokenizer=WORDS, written=written), []
    reviews = copying.Reviews(pa.array(["Was the film was", "the"]))
    found = samples.write(
        generator,
        CONFIG.prompts,
        CONFIG,
        reviews,
        lambda *step: steps.append(step),  # type: ignore[arg-type]
    )
    assert [sample.prompt for sample in found] == ["the film", "the", "the film", "the", "the film"]
    assert [len(batch) for batch, _ in asked] == [2, 2, 1]
    assert [sampling.seed for _, sampling in asked] == [7, 9, 11]
    assert {(sampling.max_tokens, sampling.top_k) for _, sampling in asked} == {(3, 2)}
    assert [sample.text for sample in found[1:4]] == (
        ["The the the the", "The film film film film", "The film film film"]
    )
    words = [reviews.index.decode(sample.written) for sample in found]
    assert words == [["the"] * 3] * 2 + [["film"] * 3] * 2 + [["was"] * 3]
    assert [len(sample.words) for sample in found] == [5, 4, 5, 4, 5]
    assert [sample.copy.words for sample in found] == [2, 1, 2, 2, 3]
    assert steps == [(2, 5), (4, 5), (5, 5)]


def test_what_is_counted() -> None:
    written = [np.array(text, np.int32) for text in ([2, 3, 2, 3], [2, 3, 4, 4], [4, 4, 4, 4])]
    copies = [Copy(words, 0, 0, 0) for words in (1, 2, 6)]
    found = samples.count(
        [Sample("", "", True, text, text, copy) for text, copy in zip(written, copies, strict=True)]
    )
    assert found["reviews"] == 3
    assert found["distinct_1"] == 3 / 12 and found["distinct_2"] == 4 / 9
    assert 0 < found["self_bleu"] < 1 and found["repetition_rate"] == 0
    runs = [found[f"copied_run_{name}"] for name in ("median", "p95", "max")]
    assert runs == pytest.approx([2, 5.6, 6])

"""Texts that are sampled to be counted."""

from types import SimpleNamespace

import numpy as np
import pytest

from minigpt.config import EvaluateConfig, SamplingConfig
from minigpt.data.tokenizer import WordTokenizer
from minigpt.evaluation import samples
from minigpt.evaluation.copying import Copy
from minigpt.evaluation.samples import Sample

WORDS = WordTokenizer(("", "[UNK]", "the", "film", "was"), "spaced")
CONFIG = EvaluateConfig(
    max_tokens=3, prompts=["the film", "the"], reviews=5, ngram_order=3, seed=7, top_k=2
)


def test_prompts_take_turns_and_no_two_batches_draw_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[np.ndarray], SamplingConfig]] = []

    def tokens(prompts: list[np.ndarray], sampling: SamplingConfig) -> np.ndarray:
        asked.append((prompts, sampling))
        return np.full((len(prompts), sampling.max_tokens), sampling.seed, np.int32)

    monkeypatch.setattr(samples, "TEXTS_AT_ONCE", 2)
    generator, steps = SimpleNamespace(tokenizer=WORDS, tokens=tokens), []
    train = np.array([4, 2, 3, 4], np.int32), np.array([0, 4])
    found = samples.write(
        generator,
        CONFIG.prompts,
        CONFIG,
        train,
        lambda *step: steps.append(step),  # type: ignore[arg-type]
    )
    assert [sample.prompt for sample in found] == ["the film", "the", "the film", "the", "the film"]
    assert [len(batch) for batch, _ in asked] == [2, 2, 1]
    assert [sampling.seed for _, sampling in asked] == [7, 9, 11]
    assert {(sampling.max_tokens, sampling.top_k) for _, sampling in asked} == {(3, 2)}
    written = [sample.written.tolist() for sample in found]
    assert written == [[7] * 3] * 2 + [[9] * 3] * 2 + [[11] * 3]
    assert [sample.ids.tolist()[:2] for sample in found[:2]] == [[2, 3], [2, 7]]
    assert [sample.copy.words for sample in found] == [2, 1, 2, 1, 2]
    assert steps == [(2, 5), (4, 5), (5, 5)]


def test_what_is_counted() -> None:
    written = [np.array(text, np.int32) for text in ([2, 3, 2, 3], [2, 3, 4, 4], [4, 4, 4, 4])]
    copies = [Copy(words, 0, 0, 0) for words in (1, 2, 6)]
    found = samples.count(
        [Sample("", text, text, copy) for text, copy in zip(written, copies, strict=True)]
    )
    assert found["reviews"] == 3
    assert found["distinct_1"] == 3 / 12 and found["distinct_2"] == 4 / 9
    assert 0 < found["self_bleu"] < 1 and found["repetition_rate"] == 0
    runs = [found[f"copied_run_{name}"] for name in ("median", "p95", "max")]
    assert runs == pytest.approx([2, 5.6, 6])

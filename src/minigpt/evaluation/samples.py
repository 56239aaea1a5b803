"""Texts that are sampled to be counted: how varied they are, and how much of them is copied."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from minigpt.config import EvaluateConfig
from minigpt.evaluation import copying
from minigpt.generation.decoding import Generator
from minigpt.generation.prompts import encode

TEXTS_AT_ONCE = 64

Ids = npt.NDArray[np.int32]


def write(
    generator: Generator,
    asked: Sequence[str],
    config: EvaluateConfig,
    progress: Callable[[int, int | None], None] | None = None,
) -> tuple[list[Ids], list[Ids]]:
    """Samples `config.reviews` texts, taking the prompts in turn.

    Args:
        generator: The model's.
        asked: The prompts.
        config: The section `evaluate`.
        progress: Called with the texts done and the texts in all.

    Returns:
        The token ids of each text's prompt, and of what the model wrote after it.
    """
    encoded, _ = encode(generator.tokenizer, asked, "evaluate.prompts")
    prompts = [encoded[i % len(encoded)] for i in range(config.reviews)]
    written: list[Ids] = []
    batches = -(-len(prompts) // TEXTS_AT_ONCE)
    for batch in np.array_split(np.arange(len(prompts)), batches):  # one or two compiled shapes
        # Row b of a call draws from (seed, b): with one seed every batch would repeat the first.
        sampling = config.model_copy(update={"seed": config.seed + int(batch[0])})
        written += list(generator.tokens([prompts[i] for i in batch], sampling))
        if progress:
            progress(len(written), len(prompts))
    return prompts, written


def count(written: Sequence[Ids], copies: Sequence[copying.Copy]) -> dict[str, float]:
    """Counts what sampled texts repeat, of each other, of themselves and of the training reviews.

    Args:
        written: Token ids of each text without its prompt, since prompts recur.
        copies: The longest copied run of each text, its prompt included.

    Returns:
        reviews, distinct_1 to distinct_3, self_bleu, repetition_rate, and copied_run_median,
        copied_run_p95 and copied_run_max in words.
    """
    texts = [text.tolist() for text in written]
    runs = [copy.words for copy in copies]
    return {
        "reviews": len(texts),
        **{f"distinct_{n}": copying.distinct(texts, n) for n in (1, 2, 3)},
        "self_bleu": copying.self_bleu(texts),
        "repetition_rate": copying.repetition_rate(texts),
        "copied_run_median": float(np.median(runs)),
        "copied_run_p95": float(np.percentile(runs, 95)),
        "copied_run_max": max(runs),
    }

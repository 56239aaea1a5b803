"""Texts that are sampled to be counted: how varied they are, and how much of them is copied."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minigpt.common.progress import Progress
from minigpt.config import EvaluateConfig
from minigpt.evaluation import copying
from minigpt.generation.decoding import Generator, Written
from minigpt.generation.prompts import encode

TEXTS_AT_ONCE = 64

Ids = npt.NDArray[np.int32]


class Sample(NamedTuple):
    """A text that the model wrote.

    Attributes:
        prompt: The prompt, as it was typed.
        text: The prompt with what was written after it.
        ended: Whether the model has ended it.
        words: The ids of the words of `text`, in the numbering of the training reviews.
        written: Those of what was written.
        copy: The longest run of words that the text shares with a training review.
    """

    prompt: str
    text: str
    ended: bool
    words: Ids
    written: Ids
    copy: copying.Copy


def write(
    generator: Generator,
    prompts: Sequence[str],
    config: EvaluateConfig,
    reviews: copying.Reviews,
    progress: Progress | None = None,
) -> list[Sample]:
    """Samples `config.reviews` texts, taking the prompts in turn, and looks for copied runs.

    Args:
        generator: The model's.
        prompts: Texts with at least one token that the model knows.
        config: The section `evaluate`.
        reviews: The words of the training reviews.
        progress: Called with the texts done and the texts in all.
    """
    encoded = encode(generator.tokenizer, prompts, "evaluate.prompts")
    turns = [i % len(prompts) for i in range(config.reviews)]
    written: list[Written] = []
    batches = -(-len(turns) // TEXTS_AT_ONCE)
    for batch in np.array_split(np.arange(len(turns)), batches):  # one or two compiled shapes
        # Row b of a call draws from (seed, b): with one seed every batch would repeat the first.
        sampling = config.model_copy(update={"seed": config.seed + int(batch[0])})
        written.extend(generator.written([encoded[turns[i]] for i in batch], sampling))
        if progress:
            progress(len(written), len(turns))
    asked = [prompts[i] for i in turns]
    complete = generator.tokenizer.complete
    texts = [complete(prompt, ids) for prompt, (ids, _, _) in zip(asked, written, strict=True)]
    words = reviews.words_of(texts)
    new = reviews.words_of([complete("", ids) for ids, _, _ in written])
    ended = [text.ended for text in written]
    copies = reviews.longest_copies(words)
    parts = zip(asked, texts, ended, words, new, copies, strict=True)
    return [Sample(*part) for part in parts]


def count(samples: Sequence[Sample]) -> dict[str, float]:
    """Counts what sampled texts repeat, of each other, of themselves and of the training reviews.

    Prompts recur, so only the copied runs count them in.

    Returns:
        reviews, distinct_1 to distinct_3, self_bleu, repetition_rate, and copied_run_median,
        copied_run_p95 and copied_run_max in words.
    """
    texts = [sample.written.tolist() for sample in samples]
    runs = [sample.copy.words for sample in samples]
    return {
        "reviews": len(texts),
        **{f"distinct_{n}": copying.distinct(texts, n) for n in (1, 2, 3)},
        "self_bleu": copying.self_bleu(texts),
        "repetition_rate": copying.repetition_rate(texts),
        "copied_run_median": float(np.median(runs)),
        "copied_run_p95": float(np.percentile(runs, 95)),
        "copied_run_max": max(runs),
    }

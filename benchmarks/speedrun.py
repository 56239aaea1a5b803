"""The row `speedrun`: processor time until the default equals the published recipe's best.

The published recipe has all reviews but the one in twenty that is held out. The default has a part
of them, once, with a schedule that ends with it. Both are scored in bits per byte on what the
published 81 tokens cover of each held-out review.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from benchmarks import probe
from benchmarks.measure import Options, Result
from minigpt.common import paths
from minigpt.data import corpus, text, tokenizer
from minigpt.data.tokenizer import Texts
from minigpt.evaluation import charges, held_out

PUBLISHED = ["groups.experiment=seed", "sequences.validation_fraction=0.05"]
# The products of a step are in bfloat16 where the processor has them, on both sides.
PUBLISHED += ["model.dtype_policy=auto"]
DEFAULT = ["groups.train=fast"]
ALL = 10**9  # more tokens than there are
PART = 7_500_000  # more than half of them


@dataclass(frozen=True)
class Score:
    """A model in training: processor seconds of its steps, and bits per byte on the prefixes."""

    steps: int
    processor_s: float
    bits_per_byte: float


def speedrun(options: Options) -> Result:
    """Trains the published recipe until it gets worse, then the default until it is as good."""
    there = list(_until_worse(scores(PUBLISHED, ALL, options, parts=1)))
    best = min(there, key=lambda score: score.bits_per_byte)
    here = []
    for score in scores(DEFAULT, PART, options, parts=10):
        here.append(score)
        if score.bits_per_byte <= best.bits_per_byte:
            break
    else:
        raise RuntimeError(f"the default ended at {here[-1]}, the published recipe at {best}")
    facts = {"published": [asdict(s) for s in there], "default": [asdict(s) for s in here]}
    return Result([here[-1].processor_s], [best.processor_s], facts)


def _until_worse(found: Iterator[Score]) -> Iterator[Score]:
    least = np.inf
    for score in found:
        yield score
        if score.bits_per_byte > least:
            return
        least = score.bits_per_byte


def scores(settings: list[str], tokens: int, options: Options, parts: int) -> Iterator[Score]:
    """Trains a configuration, and scores it several times an epoch.

    Args:
        settings: KEY=VALUE, laid over the defaults.
        tokens: About as many to train on.
        options: Where the reviews are.
        parts: Scores in an epoch.
    """
    chosen = probe.compose(settings)
    folder = probe.prepared(chosen, options.archive, tokens)
    fraction = chosen.sequences.validation_fraction
    everything = probe.prepared(probe.compose(PUBLISHED), options.archive, ALL) / paths.REVIEWS
    kept = pa.chunked_array(corpus.texts(everything, fraction, held_out=True), pa.string())
    covered = prefixes(kept)
    words = tokenizer.load(folder / paths.TOKENIZER)
    learned = charges.learn(corpus.texts(folder / paths.REVIEWS, fraction), words)
    trainer, of_epoch, steps = probe.training(chosen, folder)
    timed = probe.ProcessorTime()
    part = -(-steps // parts)
    for epoch in range(chosen.train.epochs):
        dataset = of_epoch(epoch)
        for begin in range(0, steps, part):
            some = dataset.skip(begin).take(part)
            trainer.fit(some, verbose=0, shuffle=False, callbacks=[timed])
            bits = held_out.measure(trainer.network, learned, covered)["bits_per_byte"]
            score = Score(timed.steps, timed.seconds, bits)
            print(settings[0], score, flush=True)
            yield score


def prefixes(texts: Texts, tokens: int = 81) -> pa.Array:
    """Returns the beginnings of texts that the published sequences cover.

    Models that read whole reviews can be measured on the same bytes as one that was trained, as
    published, on the first 80 targets of each.

    Args:
        texts: (N,) reviews.
        tokens: The tokens of the style `published` to keep, with what stands before each.
    """
    words = text.surfaces(texts, "published").to_pylist()
    gaps = text.gaps(texts, "published").to_pylist()
    kept = (
        "".join(map("".join, zip(before, typed[:tokens], strict=False)))
        for before, typed in zip(gaps, words, strict=True)
    )
    return pa.array(kept, pa.string())

"""The row `speedrun`: processor time until the default equals the published recipe's best.

The published recipe has all reviews but the one in twenty that is held out. The default has a part
of them, once, with a schedule that ends with it. Both are scored in bits per byte on what the
published 81 tokens cover of each held-out review.

The recipe takes hours on two cores, so what it reaches is on record, and the row only times its
steps. To train it again until it gets worse, and write the record anew:

    python -m benchmarks.speedrun [--archive FILE]
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from benchmarks import probe
from benchmarks.measure import ARCHIVE, PROJECT, NotMeasuredError, Options, Result
from minigpt.common import files, paths
from minigpt.data import corpus, text, tokenizer
from minigpt.data.tokenizer import Texts
from minigpt.evaluation import charges, held_out

RECORD = PROJECT / "benchmarks/published_bits.csv"
PUBLISHED = ["groups.experiment=seed", "sequences.validation_fraction=0.05"]
# The products of a step are in bfloat16 where the processor has them, on both sides.
PUBLISHED += ["model.dtype_policy=auto"]
DEFAULT = ["groups.train=fast"]
ALL = 10**9  # more tokens than there are
PART = 5_000_000  # two fifths of them
STEPS = 5  # timed at a time, on batches of their own, since a batch decides the work of a step


class Score(NamedTuple):
    """A model in training.

    Attributes:
        bits_per_byte: On the prefixes.
        steps: How many it has been trained.
    """

    bits_per_byte: float
    steps: int


def main() -> None:
    """Trains the published recipe until it gets worse, and writes what it reached."""
    parser = argparse.ArgumentParser("python -m benchmarks.speedrun")
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    archive = parser.parse_args().archive
    found = _until_worse(scores(PUBLISHED, ALL, archive, parts=1))
    files.write_csv(RECORD, Score._fields, [score._asdict() for score in found])


def speedrun(options: Options) -> Result:
    """Trains the default until it equals the recipe's best, and times steps of both in turn."""
    archive, rows = options.archive, files.read_csv(RECORD)
    published = [Score(float(row["bits_per_byte"]), int(row["steps"])) for row in rows]
    best = min(published)
    reached = []
    for score in scores(DEFAULT, PART, archive, parts=4):
        reached.append(score)
        if score.bits_per_byte <= best.bits_per_byte:
            break
    else:
        raise NotMeasuredError(f"the default ended at {reached[-1]}, the recipe at {best}")
    sides = _steps(DEFAULT, PART, archive), _steps(PUBLISHED, ALL, archive)
    pairs = [[side() for side in sides] for _ in range(options.rounds + 1)][1:]  # after a warm-up
    here = [ours * reached[-1].steps for ours, _ in pairs]
    there = [theirs * best.steps for _, theirs in pairs]
    return Result(here, there, {"published": published, "default": reached, "step_s": pairs})


def _until_worse(found: Iterator[Score]) -> Iterator[Score]:
    least = np.inf
    for score in found:
        yield score
        if score.bits_per_byte > least:
            return
        least = score.bits_per_byte


def scores(settings: list[str], tokens: int, archive: Path, parts: int) -> Iterator[Score]:
    """Trains a configuration, and scores it several times an epoch.

    Args:
        settings: KEY=VALUE, laid over the defaults.
        tokens: About as many to train on.
        archive: The reviews.
        parts: Scores in an epoch.
    """
    import keras  # after probe, which chooses the backend

    chosen = probe.compose(settings)
    folder = probe.prepared(chosen, archive, tokens)
    fraction = chosen.sequences.validation_fraction
    everything = probe.prepared(probe.compose(PUBLISHED), archive, ALL) / paths.REVIEWS
    kept = pa.chunked_array(corpus.texts(everything, fraction, held_out=True), pa.string())
    covered = prefixes(kept)
    words = tokenizer.load(folder / paths.TOKENIZER)
    learned = charges.learn(corpus.texts(folder / paths.REVIEWS, fraction), words)
    trainer, of_epoch, steps = probe.training(chosen, folder)
    part = -(-steps // parts)
    with tqdm(total=steps * chosen.train.epochs, desc=settings[0], mininterval=10) as bar:
        count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: bar.update())
        for epoch in range(chosen.train.epochs):
            for begin in range(0, steps, part):
                some = of_epoch(epoch).skip(begin).take(part)
                trainer.fit(some, verbose=0, shuffle=False, callbacks=[count])
                bits = held_out.measure(trainer.network, learned, covered)["bits_per_byte"]
                score = Score(bits, min(begin + part, steps) + epoch * steps)
                bar.write(f"{settings[0]} {score}")
                yield score


def _steps(settings: list[str], tokens: int, archive: Path) -> Callable[[], float]:
    """Returns what takes STEPS steps of a new training and returns the processor seconds of one.

    The arguments are those of `scores`.
    """
    chosen = probe.compose(settings)
    trainer, of_epoch, _ = probe.training(chosen, probe.prepared(chosen, archive, tokens))
    batches = list(of_epoch(0).take(STEPS))

    def take() -> float:
        began = time.process_time()
        for batch in batches:
            trainer.train_on_batch(*batch)
        return (time.process_time() - began) / len(batches)

    return take


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


if __name__ == "__main__":
    main()

"""Builds the tokenizer: data/reviews.parquet -> data/tokenizer/."""

import logging
from dataclasses import dataclass

import pyarrow as pa

from minigpt import config
from minigpt.common import files, paths, progress
from minigpt.config import Config
from minigpt.data import bpe, corpus, subsampling, tokenizer
from minigpt.data.tokenizer import Tokenizer, Totals
from minigpt.engine import cluster
from minigpt.engine.data import Reviews

log = logging.getLogger(__name__)


def run() -> None:
    """Learns the tokenizer from the training reviews."""
    settings = config.load(paths.RESOLVED)
    fraction = settings.sequences.validation_fraction
    if settings.engine.kind == "ray":
        with cluster.connected(settings.engine):
            learn(settings, Reviews(paths.REVIEWS, fraction, settings.engine))
    else:
        corpus.fetch(paths.REVIEWS, progress.bar)
        learn(settings, _LocalReviews(fraction))


@dataclass(frozen=True)
class _LocalReviews:
    """The reviews as this process reads them; `engine.data.Reviews` gives the same."""

    fraction: float

    def sample(self, most_bytes: int) -> list[str]:
        drawn = subsampling.sample(paths.REVIEWS, self.fraction, most_bytes)
        return subsampling.cut(drawn.reviews, most_bytes)

    def count(self, style: str, most: int) -> tuple[pa.Table, Totals]:
        counts = tokenizer.count(corpus.texts(paths.REVIEWS, self.fraction), style)
        return counts.slice(0, most), tokenizer.totals(counts)

    def unknown(self, words: Tokenizer) -> tuple[int, int]:
        return tokenizer.unknown(words, corpus.texts(paths.REVIEWS, self.fraction, held_out=True))


def learn(settings: Config, reviews: _LocalReviews | Reviews) -> None:
    """Learns the tokenizer, and writes it and its metrics."""
    chosen = settings.vocabulary
    if chosen.style == "bpe":
        sample = reviews.sample(chosen.sample_bytes)
        size = sum(len(text.encode()) for text in sample)
        log.info("learning from %s bytes of %s reviews", f"{size:,}", f"{len(sample):,}")
        learned = bpe.train(sample, chosen.max_tokens)
        learned.save(paths.TOKENIZER)
        metrics = bpe.metrics(learned, sample)
    else:
        counts, totals = reviews.count(chosen.style, chosen.max_tokens)
        separated = chosen.style == "words" and settings.sequences.policy != "head"
        built = tokenizer.build(
            counts, chosen.max_tokens, chosen.style, separated, chosen.min_count
        )
        built.save(paths.TOKENIZER)
        metrics = tokenizer.metrics(built, counts, totals)
        if settings.sequences.validation_fraction:
            unknown, total = reviews.unknown(built)
            metrics["held_out_unk_share"] = unknown / max(total, 1)
    files.write_json(paths.VOCABULARY_METRICS, metrics)
    log.info("%s: %s", paths.TOKENIZER, metrics)

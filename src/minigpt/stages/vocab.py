"""Builds the tokenizer: data/reviews.parquet -> data/tokenizer/."""

import logging

from minigpt import config
from minigpt.common import files, paths
from minigpt.data import bpe, corpus, tokenizer

log = logging.getLogger(__name__)


def run() -> None:
    """Learns the tokenizer from the training reviews."""
    settings = config.load(paths.RESOLVED)
    chosen, fraction = settings.vocabulary, settings.sequences.validation_fraction
    if chosen.style == "bpe":
        sample = corpus.sample(paths.REVIEWS, fraction, chosen.sample_bytes)
        size = sum(len(text.encode()) for text in sample)
        log.info("learning from %s bytes of %s reviews", f"{size:,}", f"{len(sample):,}")
        learned = bpe.train(sample, chosen.max_tokens)
        learned.save(paths.TOKENIZER)
        metrics = bpe.metrics(learned, sample)
    else:
        counts = tokenizer.count(corpus.texts(paths.REVIEWS, fraction), chosen.style)
        separated = chosen.style == "words" and settings.sequences.policy != "head"
        built = tokenizer.build(counts, chosen.max_tokens, chosen.style, separated)
        built.save(paths.TOKENIZER)
        metrics = tokenizer.metrics(built, counts, tokenizer.totals(counts))
        if fraction:
            held = corpus.texts(paths.REVIEWS, fraction, held_out=True)
            unknown, total = tokenizer.unknown(built, held)
            metrics["held_out_unk_share"] = unknown / max(total, 1)
    files.write_json(paths.VOCABULARY_METRICS, metrics)
    log.info("%s: %s", paths.TOKENIZER, metrics)

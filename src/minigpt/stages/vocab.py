"""Builds the tokenizer: data/reviews.parquet -> data/tokenizer/."""

import logging

import pyarrow as pa

from minigpt import config
from minigpt.common import files, paths
from minigpt.data import corpus, tokenizer

log = logging.getLogger(__name__)


def run() -> None:
    """Counts the tokens of the training reviews and keeps the most frequent ones."""
    settings = config.load(paths.RESOLVED)
    fraction = settings.sequences.validation_fraction
    texts = (
        batch["text"].filter(pa.array(~corpus.is_validation(batch["id"], fraction)))
        for batch in corpus.read_batches(paths.REVIEWS, ["id", "text"])
    )
    counts = tokenizer.count(texts, settings.vocabulary.style)
    built = tokenizer.build(counts, settings.vocabulary.max_tokens, settings.vocabulary.style)
    built.save(paths.TOKENIZER)
    metrics = tokenizer.metrics(built, counts)
    files.write_json(paths.VOCABULARY_METRICS, metrics)
    log.info("%s: %s", paths.TOKENIZER, metrics)

"""data/reviews.parquet and data/vocabulary.txt -> data/sequences/."""

import logging

import tensorflow  # noqa: F401 - here, while what it prints as it loads is kept from the log

from minigpt import config
from minigpt.common import paths, progress
from minigpt.data import corpus, sequences, tokenizer

log = logging.getLogger(__name__)


def run() -> None:
    """Encodes the reviews and writes the windows of each split as TFRecord shards."""
    everything = config.load(paths.RESOLVED)
    settings = everything.sequences
    words = tokenizer.load(paths.VOCABULARY)
    batches = corpus.read_batches(paths.REVIEWS, ["id", "text"])
    encoded = (
        sequences.Encoded(
            batch["id"],
            *words.encode(batch["text"], everything.vocabulary.style),
            corpus.is_validation(batch["id"], settings.validation_fraction),
        )
        for batch in batches
    )
    manifest = sequences.write(
        paths.SEQUENCES,
        encoded,
        length=settings.length,
        policy=settings.policy,
        shards=settings.shards,
        validation_fraction=settings.validation_fraction,
        vocabulary_sha256=words.sha256,
        vocabulary_size=len(words),
        progress=progress.bar("sequences", "sequences"),
    )
    for name, split in manifest["splits"].items():
        log.info(
            "%s: %s sequences, %s targets", name, f"{split['sequences']:,}", f"{split['targets']:,}"
        )

"""Encodes the reviews: data/reviews.parquet and data/tokenizer/ -> data/sequences/."""

import logging

import tensorflow  # noqa: F401 - imported here, while the stage runner silences it

from minigpt import config
from minigpt.common import paths, progress
from minigpt.data import corpus, sequences, tokenizer

log = logging.getLogger(__name__)


def run() -> None:
    """Encodes the reviews and writes the windows of each split as TFRecord shards."""
    settings = config.load(paths.RESOLVED).sequences
    encoder = tokenizer.load(paths.TOKENIZER)
    encoded = (
        sequences.Encoded(
            batch["id"],
            *sequences.documents(*encoder.encode(batch["text"]), encoder.separator),
            corpus.is_validation(batch["id"], settings.validation_fraction),
        )
        for batch in corpus.read_batches(paths.REVIEWS, ["id", "text"])
    )
    manifest = sequences.write(
        paths.SEQUENCES,
        encoded,
        config=settings,
        tokenizer=encoder,
        progress=progress.bar("sequences", "sequences"),
    )
    for name, split in manifest["splits"].items():
        log.info(
            "%s: %s sequences, %s targets, %s of them [UNK]",
            name,
            *(f"{split[key]:,}" for key in ("sequences", "targets", "unknown_targets")),
        )

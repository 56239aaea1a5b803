"""Encodes the reviews: data/reviews.parquet and data/tokenizer/ -> data/sequences/."""

import logging

import tensorflow  # noqa: F401 - imported here, while the stage runner silences it

from minigpt import config
from minigpt.common import paths, progress
from minigpt.config import SequencesConfig
from minigpt.data import corpus, cutting, shards, tokenizer
from minigpt.evaluation import charges

log = logging.getLogger(__name__)


def run() -> None:
    """Encodes the reviews and writes the windows of each split as TFRecord shards."""
    settings = config.load(paths.RESOLVED).sequences
    encoder = tokenizer.load(paths.TOKENIZER)
    text = _text(settings, encoder)
    batches = corpus.read_batches(paths.REVIEWS, ["id", "text"])
    manifest = shards.write(
        paths.SEQUENCES,
        cutting.encode(batches, encoder, settings.validation_fraction),
        config=settings,
        tokenizer=encoder,
        text=text,
        progress=progress.bar("sequences", "sequences"),
    )
    for name, split in manifest["splits"].items():
        log.info(
            "%s: %s sequences, %s targets, %s of them [UNK]",
            name,
            *(f"{split[key]:,}" for key in ("sequences", "targets", "unknown_targets")),
        )


def _text(settings: SequencesConfig, encoder: tokenizer.Tokenizer) -> dict[str, float] | None:
    """What bits per byte of the held-out text need besides the loss."""
    if settings.policy == "head" or not settings.validation_fraction:
        return None
    fraction, bar = settings.validation_fraction, progress.bar("sequences: charges", "reviews")
    learned = charges.learn(corpus.texts(paths.REVIEWS, fraction), encoder, bar)
    held_out = corpus.texts(paths.REVIEWS, fraction, held_out=True)
    return charges.total(charges.charge(texts, learned) for texts in held_out)._asdict()

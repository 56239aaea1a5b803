"""Encodes the reviews: data/reviews.parquet and data/tokenizer/ -> data/sequences/."""

import logging
from typing import Any

from minigpt import config
from minigpt.common import backend, paths, progress
from minigpt.config import SequencesConfig
from minigpt.data import corpus, cutting, shards, tokenizer
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine import cluster
from minigpt.engine.data import Reviews
from minigpt.evaluation import charges

log = logging.getLogger(__name__)


def run() -> None:
    """Encodes the reviews and writes the windows of each split as TFRecord shards."""
    settings = config.load(paths.RESOLVED)
    encoder = tokenizer.load(paths.TOKENIZER)
    if settings.engine.kind == "ray":
        fraction = settings.sequences.validation_fraction
        with cluster.connected(settings.engine):
            reviews = Reviews(paths.REVIEWS, fraction, settings.engine)
            manifest = reviews.write_sequences(paths.SEQUENCES, settings.sequences, encoder)
    else:
        manifest = _write(settings.sequences, encoder)
    for name, split in manifest["splits"].items():
        log.info(
            "%s: %s sequences, %s targets, %s of them [UNK]",
            name,
            *(f"{split[key]:,}" for key in ("sequences", "targets", "unknown_targets")),
        )


def _write(chosen: SequencesConfig, encoder: Tokenizer) -> dict[str, Any]:
    backend.import_tensorflow()
    corpus.fetch(paths.REVIEWS, progress.bar)
    text, fraction = None, chosen.validation_fraction
    if chosen.has_text:
        bar = progress.bar("sequences: charges", "reviews")
        learned = charges.learn(corpus.texts(paths.REVIEWS, fraction), encoder, bar)
        held_out = corpus.texts(paths.REVIEWS, fraction, held_out=True)
        text = charges.total(charges.charge(texts, learned) for texts in held_out)._asdict()
    batches = corpus.read_batches(paths.REVIEWS, ["id", "text"])
    return shards.write(
        paths.SEQUENCES,
        cutting.encode(batches, encoder, fraction),
        config=chosen,
        tokenizer=encoder,
        text=text,
        progress=progress.bar("sequences", "sequences"),
    )

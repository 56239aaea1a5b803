"""Encodes the reviews: data/reviews.parquet and data/tokenizer/ -> data/sequences/."""

import logging
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow  # noqa: F401 - imported here, while the stage runner silences it

from minigpt import config
from minigpt.common import paths, progress
from minigpt.config import SequencesConfig
from minigpt.data import corpus, sequences, shards, tokenizer
from minigpt.evaluation.charges import Charges

log = logging.getLogger(__name__)


def run() -> None:
    """Encodes the reviews and writes the windows of each split as TFRecord shards."""
    settings = config.load(paths.RESOLVED).sequences
    encoder = tokenizer.load(paths.TOKENIZER)
    text = _text(settings, encoder)
    encoded = (
        shards.Encoded(
            batch["id"],
            *sequences.documents(*encoder.encode(batch["text"]), encoder.separator),
            corpus.is_validation(batch["id"], settings.validation_fraction),
        )
        for batch in corpus.read_batches(paths.REVIEWS, ["id", "text"])
    )
    manifest = shards.write(
        paths.SEQUENCES,
        encoded,
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

    def texts(held_out: bool) -> Iterator[pa.Array]:
        for batch in corpus.read_batches(paths.REVIEWS, ["id", "text"]):
            mask = corpus.is_validation(batch["id"], settings.validation_fraction)
            yield batch["text"].filter(pa.array(mask == held_out))

    charges = Charges(texts(False), encoder, progress.bar("sequences: charges", "reviews"))
    size, targets, charged = 0, 0, 0.0
    for held_out in texts(True):
        size += pc.sum(pc.binary_length(held_out)).as_py() or 0
        tokens = np.diff(encoder.encode(held_out)[1])
        firsts = 0 if encoder.separator is not None else np.count_nonzero(tokens)
        targets += int(tokens.sum() - firsts)
        charged += sum(charges(held_out))
    return {"bytes": size, "targets": targets, "charged": charged}

"""Builds the tokenizer: data/reviews.parquet -> data/tokenizer/."""

import logging
from collections.abc import Iterator

import pyarrow as pa

from minigpt import config
from minigpt.common import files, paths
from minigpt.data import corpus, tokenizer

log = logging.getLogger(__name__)


def run() -> None:
    """Counts the tokens of the training reviews and keeps the most frequent ones."""
    settings = config.load(paths.RESOLVED)
    fraction = settings.sequences.validation_fraction
    counts = tokenizer.count(_texts(fraction, held_out=False), settings.vocabulary.style)
    built = tokenizer.build(counts, settings.vocabulary.max_tokens, settings.vocabulary.style)
    built.save(paths.TOKENIZER)
    metrics = tokenizer.metrics(built, counts)
    if fraction:
        share = tokenizer.unk_share(built, _texts(fraction, held_out=True))
        metrics["held_out_unk_share"] = share
    files.write_json(paths.VOCABULARY_METRICS, metrics)
    log.info("%s: %s", paths.TOKENIZER, metrics)


def _texts(fraction: float, *, held_out: bool) -> Iterator[pa.Array]:
    for batch in corpus.read_batches(paths.REVIEWS, ["id", "text"]):
        is_held_out = corpus.is_validation(batch["id"], fraction)
        yield batch["text"].filter(pa.array(is_held_out == held_out))

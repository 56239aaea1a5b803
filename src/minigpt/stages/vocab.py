"""data/reviews.parquet -> data/vocabulary.txt."""

import logging

import pyarrow as pa

from minigpt import config, corpus, vocabulary
from minigpt.stages import output, paths

log = logging.getLogger(__name__)


def run() -> None:
    """Counts the tokens of the reviews that are not held out."""
    settings = config.load(paths.RESOLVED)
    fraction = settings.sequences.validation_fraction
    texts = (
        batch["text"].filter(pa.array(~corpus.is_validation(batch["id"], fraction)))
        for batch in corpus.read_batches(paths.REVIEWS, ["id", "text"])
    )
    counts = vocabulary.count(texts, settings.vocabulary.style)
    words = vocabulary.build(counts, settings.vocabulary.max_tokens)
    words.save(paths.VOCABULARY)
    metrics = vocabulary.metrics(words, counts)
    output.write_json(paths.VOCABULARY_METRICS, metrics)
    log.info("%s: %s", paths.VOCABULARY, metrics)

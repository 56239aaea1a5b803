"""data/reviews.parquet -> data/vocabulary.txt."""

import logging

from minigpt import config, corpus, vocabulary
from minigpt.stages import output, paths

log = logging.getLogger(__name__)


def run() -> None:
    """Counts the tokens of the reviews that are not held out."""
    settings = config.load(paths.RESOLVED)
    reviews = corpus.read_reviews(paths.REVIEWS, ["id", "text"])
    held_out = corpus.is_validation(reviews["id"], settings.sequences.validation_fraction)
    counts = vocabulary.count(reviews["text"].filter(~held_out), settings.vocabulary.style)
    words = vocabulary.build(counts, settings.vocabulary.max_tokens)
    words.save(paths.VOCABULARY)
    metrics = vocabulary.metrics(words, counts)
    output.write_json(paths.VOCABULARY_METRICS, metrics)
    log.info("%s: %s", paths.VOCABULARY, metrics)

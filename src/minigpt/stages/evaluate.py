"""Measures the model: model/ and data/reviews.parquet -> reports/evaluation.*, tables, charts."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from minigpt import config
from minigpt.common import files, paths, progress
from minigpt.data import corpus, sequences, subsampling
from minigpt.data.text import tokenise
from minigpt.evaluation import baselines, charges, charts, copying, held_out, pages, samples
from minigpt.evaluation.samples import Sample
from minigpt.generation.decoding import Generator
from minigpt.generation.prompts import known
from minigpt.model import directory
from minigpt.tracking.mirror import Mirror

log = logging.getLogger(__name__)

PUBLISHED = Path("benchmarks/published_losses.csv")

Encoded = tuple[np.ndarray, np.ndarray]  # the token ids of all reviews, and the reviews' offsets
Rows = list[dict[str, Any]]


def run() -> None:
    """Measures the model and its baselines on the held-out reviews, and counts texts it writes."""
    settings = config.load(paths.RESOLVED)
    trained = directory.load(paths.MODEL)
    asked = known(trained.tokenizer, settings.evaluate.prompts, "evaluate.prompts")
    fraction = trained.config["sequences"]["validation_fraction"]
    corpus.fetch(paths.REVIEWS, progress.bar)
    drawn, held_drawn = subsampling.samples(paths.REVIEWS, fraction, settings.evaluate.sample_bytes)
    learned, held = drawn.reviews, held_drawn.reviews
    encoded = trained.tokenizer.encode(learned["text"])
    train = sequences.documents(*encoded, trained.tokenizer.separator)

    read, figures, by_position, by_band = _measure(
        trained, learned, held, train, settings.evaluate.ngram_order
    )
    generator = Generator(trained.network, trained.tokenizer)
    bar = progress.bar("evaluate: texts", "texts")
    reviews = copying.Reviews(learned["text"])
    written = samples.write(generator, asked, settings.evaluate, reviews, bar)
    numbers = {
        "measure": held_out.MEASURE,
        **figures,
        "samples": samples.count(written),
        "training": drawn.counts(),
        "held_out": {**held_drawn.counts(), **_measured_on(read, learned, held)},
        "model": trained.sha256,
    }

    files.write_json(paths.EVALUATION, numbers)
    files.write_csv(paths.LOSS_BY_POSITION, ["position", "loss", "targets"], by_position)
    columns = ["band", "loss", "unigram_loss", "kneser_ney_loss", "targets"]
    files.write_csv(paths.LOSS_BY_BAND, columns, by_band)
    losses = [*files.read_csv(paths.LOSSES), *files.read_csv(PUBLISHED)]
    with files.replacing(paths.FIGURES) as beside:
        beside.mkdir()
        charts.draw_all(beside, losses, by_position, by_band)
    rows = _rows(learned, written)
    files.write_json_lines(paths.EVALUATION_SAMPLES, rows)

    page = pages.losses(numbers, settings.evaluate.ngram_order) if read else ""
    page += pages.samples(numbers["samples"])
    page += pages.sampled(numbers)
    page += _copied(reviews, learned, held, written)
    files.write_text(paths.EVALUATION_TEXT, page)
    for line in page.splitlines():
        log.info("%s", line)
    Mirror(Path.cwd(), settings).send()


def _measure(
    trained: directory.ModelDirectory,
    learned: pa.Table,
    held: pa.Table,
    train: Encoded,
    order: int,
) -> tuple[held_out.HeldOut | None, dict[str, Any], Rows, Rows]:
    """The held-out reviews as read by the model, the figures, and losses by position and band."""
    if not len(held):
        log.info("sequences.validation_fraction is 0, nothing is held out: no loss is measured")
        return None, {}, [], []
    bar = progress.bar("evaluate: what the tokens leave out", "reviews")
    read = held_out.read(held["text"], charges.learn([learned["text"]], trained.tokenizer, bar))
    bar = progress.bar("evaluate", "windows")
    losses, right, positions = held_out.model_losses(trained.network, read, progress=bar)
    words, ids = len(trained.tokenizer), read.ids
    if trained.tokenizer.padding is None:  # the baselines need the id 0 for themselves
        words, ids, train = words + 1, ids + 1, (train[0] + 1, train[1])
    unigram = baselines.word_unigram(train[0], words)[ids[read.targets]]
    bar = progress.bar("evaluate: n-grams", "orders")
    ngrams = baselines.kneser_ney(train, (ids, read.offsets), words, order, bar)[read.targets]
    figures = {
        **held_out.model_figures(read, losses, right),
        "charged": held_out.charged(read),
        "mixture": held_out.figures(read, baselines.mixture(losses, ngrams)),
        "unigram": held_out.figures(read, unigram),
        "kneser_ney": held_out.figures(read, ngrams),
    }
    columns = {"loss": losses, "unigram_loss": unigram, "kneser_ney_loss": ngrams}
    by_position = held_out.loss_by_position(losses, positions)
    tokenizer = trained.tokenizer
    if tokenizer.unknown is None:  # the ids of bpe are in the order of learning, not of frequency
        return read, figures, by_position, []
    special = 2 + (tokenizer.separator is not None)
    return read, figures, by_position, held_out.loss_by_band(read, columns, special)


def _measured_on(
    read: held_out.HeldOut | None, learned: pa.Table, held: pa.Table
) -> dict[str, Any]:
    return {
        "targets": len(read.targets) if read else 0,
        "digest": held_out.digest(held) if read else "",
        # Bits per byte depend on the training reviews too: the charges are learned from them.
        "learned": held_out.digest(learned) if read else "",
    }


def _rows(learned: pa.Table, written: list[Sample]) -> Rows:
    return [
        {
            "prompt": sample.prompt,
            "text": sample.text,
            "ended": sample.ended,
            "copied_run": sample.copy.words,
            "copied_from": learned["id"][sample.copy.review].as_py() if sample.copy.words else "",
        }
        for sample in written
    ]


def _copied(
    reviews: copying.Reviews, learned: pa.Table, held: pa.Table, written: list[Sample]
) -> str:
    """The part of the page on copied runs."""
    page = "Longest run of words that stands in a training review too\n"
    page += pages.runs("texts of the model", [sample.copy.words for sample in written])
    if len(held):  # how much people share without copying
        theirs = reviews.words_of(held["text"][: len(written)].to_pylist())
        cut = [words[: len(s.words)] for words, s in zip(theirs, written, strict=False)]
        others = reviews.longest_copies(cut)
        name = "held-out reviews, cut to the same lengths"
        page += pages.runs(name, [copy.words for copy in others])
    longest = max(written, key=lambda sample: sample.copy.words)
    copy = longest.copy
    if copy.words:
        source = learned.slice(copy.review, 1)
        page += pages.copied(
            pages.Passage(_words(longest.text), copy.start, copy.words),
            pages.Passage(_words(source["text"][0].as_py()), copy.place, copy.words),
            source["id"][0].as_py(),
        )
    return page


def _words(text: str) -> list[str]:
    words: list[str] = tokenise(pa.array([text]), "words").values.to_pylist()
    return words

"""model/ and data/reviews.parquet -> reports/evaluation.*, tables and charts of the losses."""

import csv
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from minigpt import config
from minigpt.common import files, paths, progress
from minigpt.data import corpus
from minigpt.data.text import detokenise, tokenise
from minigpt.data.tokenizer import UNKNOWN
from minigpt.evaluation import baselines, copying, held_out, pages
from minigpt.generation.decoding import Generator, Sampling
from minigpt.model import directory
from minigpt.tracking.mirror import Tracker

log = logging.getLogger(__name__)

PUBLISHED = Path("benchmarks/published_losses.csv")
TEXTS_AT_ONCE = 64

Encoded = tuple[np.ndarray, np.ndarray]  # token ids of reviews in a row, and the reviews' offsets


def run() -> None:
    """Measures the model and its baselines on the held-out reviews, and counts texts of its own."""
    everything = config.load(paths.RESOLVED)
    settings = everything.evaluate
    trained = directory.load(paths.MODEL)
    reviews = corpus.read_reviews(paths.REVIEWS, ["id", "text"])
    fraction = trained.config["sequences"]["validation_fraction"]
    mask = corpus.is_validation(reviews["id"], fraction)
    learned, held_out = reviews.filter(pa.array(~mask)), reviews.filter(pa.array(mask))
    style = trained.config["vocabulary"]["style"]
    train = trained.vocabulary.encode(learned["text"], style)
    numbers: dict[str, Any] = {}
    by_position: list[dict[str, Any]] = []
    by_band: list[dict[str, Any]] = []
    read = None
    if fraction:
        byte_nats = baselines.byte_unigram(held_out.plain(learned["text"]))
        read = held_out.held_out(held_out["text"], trained.vocabulary, style, byte_nats)
        numbers, by_position, by_band = _measure(trained, read, train, settings.ngram_order)
    else:
        log.info("sequences.validation_fraction is 0, nothing is held out: no loss is measured")
    prompts, written = _write(trained, settings)
    texts = [np.concatenate(pair) for pair in zip(prompts, written, strict=True)]
    copies = copying.longest_copies(texts, *train, UNKNOWN)
    numbers["samples"] = _count(written, copies)
    numbers["held_out"] = {
        "reviews": len(held_out),
        "targets": len(read.targets) if read else 0,
        "bytes": read.text_bytes if read else 0,
        "digest": held_out.digest(held_out) if read else "",
        # Bits per byte hang on the training reviews too: theirs is the byte unigram.
        "byte_unigram": held_out.digest(learned) if read else "",
    }

    files.write_json(paths.EVALUATION, numbers)
    _write_table(paths.LOSS_BY_POSITION, ["position", "loss", "targets"], by_position)
    names = ["band", "loss", "unigram_loss", "kneser_ney_loss", "targets"]
    _write_table(paths.LOSS_BY_BAND, names, by_band)
    _draw(by_position, by_band)
    rows = [
        {
            "prompt": settings.prompts[i % len(settings.prompts)],
            "text": detokenise(trained.vocabulary.decode(text)),
            "copied_run": copy.words,
            "copied_from": learned["id"][copy.review].as_py() if copy.words else "",
        }
        for i, (text, copy) in enumerate(zip(texts, copies, strict=True))
    ]
    files.write_json_lines(paths.EVALUATION_SAMPLES, rows)
    page = pages.losses(numbers, settings.ngram_order) if read else ""
    page += pages.samples(numbers["samples"])
    page += "Longest run of words that stands in a training review too\n"
    page += pages.runs("texts of the model", [copy.words for copy in copies])
    if read:  # so that a reader knows what people share without copying
        size = len(texts[0])
        cut = [read.ids[a : min(a + size, b)] for a, b in pairwise(read.offsets)][: len(texts)]
        others = copying.longest_copies(cut, *train, UNKNOWN)
        name = "held-out reviews, cut to the same length"
        page += pages.runs(name, [copy.words for copy in others])
    worst, text = max(zip(copies, texts, strict=True), key=lambda pair: pair[0].words)
    if worst.words:
        review = learned.slice(worst.review, 1)
        source = tokenise(review["text"], style)[0].as_py()
        page += (
            "\nThe longest, in a text of the model:\n"
            f"{pages.marked(trained.vocabulary.decode(text), worst.start, worst.words)}\n"
            f"and in the training review {review['id'][0]}:\n"
            f"{pages.marked(source, worst.place, worst.words)}\n"
        )
    files.write_text(paths.EVALUATION_TEXT, page)
    for line in page.splitlines():
        log.info("%s", line)
    train_id = json.loads(paths.RUN.read_text())["train_id"]
    Tracker(train_id, config.as_dict(everything), Path.cwd()).evaluation(paths.REPORTS)


def _measure(
    trained: directory.ModelDirectory, read: held_out.HeldOut, train: Encoded, order: int
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The figures of the model and its baselines, and the losses by position and by band."""
    bar = progress.bar("evaluate", "windows")
    losses, right, positions = held_out.model_losses(trained.network, read, progress=bar)
    words = len(trained.vocabulary)
    unigram = baselines.word_unigram(train[0], words)[read.ids[read.targets]]
    ngrams = baselines.kneser_ney(train, (read.ids, read.offsets), words, order)[read.targets]
    numbers = {
        **held_out.model_figures(read, losses, right),
        "unigram": held_out.figures(read, unigram),
        "kneser_ney": held_out.figures(read, ngrams),
    }
    columns = {"loss": losses, "unigram_loss": unigram, "kneser_ney_loss": ngrams}
    by_position = held_out.loss_by_position(losses, positions)
    return numbers, by_position, held_out.loss_by_band(read, columns)


def _write(
    trained: directory.ModelDirectory, settings: config.EvaluateConfig
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The prompts' token ids and what the model writes after each."""
    chosen = asdict(settings)
    chosen = {name: chosen[name] for name in Sampling.__dataclass_fields__}
    style = trained.config["vocabulary"]["style"]
    ids, offsets = trained.vocabulary.encode(pa.array(settings.prompts), style)
    spelled = [ids[start:stop] for start, stop in pairwise(offsets)]
    prompts = [spelled[i % len(spelled)] for i in range(settings.reviews)]
    write = Generator(trained.network, trained.vocabulary, style)
    show = progress.bar("evaluate: texts", "texts")
    written: list[np.ndarray] = []
    pieces = -(-len(prompts) // TEXTS_AT_ONCE)
    for piece in np.array_split(np.arange(len(prompts)), pieces):  # alike: one compilation or two
        # Text b of a call draws from (seed, b): with one seed every piece would be the same.
        seed = chosen["seed"] + int(piece[0])
        sampling = Sampling(**{**chosen, "seed": seed})
        written += list(write.tokens([prompts[i] for i in piece], sampling))
        show(len(written), len(prompts))
    return prompts, written


def _count(written: Sequence[np.ndarray], copies: Sequence[copying.Copy]) -> dict[str, float]:
    """Prompts are the same again and again: only the copied runs count them in."""
    texts = [text.tolist() for text in written]
    runs = [copy.words for copy in copies]
    return {
        "reviews": len(texts),
        **{f"distinct_{n}": copying.distinct(texts, n) for n in (1, 2, 3)},
        "self_bleu": copying.self_bleu(texts),
        "repetition_rate": copying.repetition_rate(texts),
        "copied_run_median": float(np.median(runs)),
        "copied_run_p95": float(np.percentile(runs, 95)),
        "copied_run_max": max(runs),
    }


def _write_table(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, table.getvalue())


def _draw(by_position: list[dict[str, Any]], by_band: list[dict[str, Any]]) -> None:
    def line(rows: list[dict[str, Any]], x: str, y: str) -> tuple[list[Any], list[Any]]:
        return [row[x] for row in rows], [row.get(y) for row in rows]

    epochs = [
        {"epoch": int(row.pop("epoch")), **row}
        for file in (paths.LOSSES, PUBLISHED)
        for row in csv.DictReader(file.read_text().splitlines())
    ]
    losses = {
        name: line([row for row in epochs if name in row], "epoch", name)
        for name in ("loss", "val_loss", "seed_loss", "published_loss")
    }
    position = {"model": line(by_position, "position", "loss")}
    bands = {
        name: line(by_band, "band", column)
        for name, column in (
            ("model", "loss"),
            ("Kneser-Ney", "kneser_ney_loss"),
            ("unigram", "unigram_loss"),
        )
    }
    nats, rank = "nats per token", "frequency rank of the target"
    with files.replacing(paths.FIGURES) as beside:
        beside.mkdir()
        pages.draw(beside / "loss_by_epoch.png", "epoch", nats, losses)
        pages.draw(beside / "loss_by_position.png", "tokens of context", nats, position)
        pages.draw(beside / "loss_by_band.png", rank, nats, bands)

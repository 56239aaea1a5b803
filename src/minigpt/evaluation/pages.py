"""What a person looks at after an evaluation: a page of text, and charts for who shows no vega."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WORDS_AROUND = 20  # of a copied run, shown on either side


def draw(
    path: Path, x_label: str, y_label: str, lines: Mapping[str, tuple[Sequence[Any], Sequence[Any]]]
) -> None:
    """Draws lines into a PNG; the same lines give the same bytes.

    Args:
        path: the file.
        x_label: under the chart.
        y_label: beside it.
        lines: xs and ys by name; xs that are words stand in their order, ys that are None or ""
            are left out.
    """
    from matplotlib.figure import Figure  # not found while a stage loads, see backend.py

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, (xs, ys) in lines.items():
        points = [(x, float(y)) for x, y in zip(xs, ys, strict=True) if y not in (None, "")]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def losses(numbers: Mapping[str, Any], order: int) -> str:
    """The held-out figures as a table.

    Args:
        numbers: what reports/evaluation.json holds.
        order: of the n-gram model.
    """
    held_out = numbers["held_out"]
    page = (
        f"Held out: {held_out['reviews']:,} reviews, {held_out['targets']:,} targets, "
        f"{held_out['bytes']:,} bytes\n\n"
        f"{'':22}nats per token   perplexity   bits per byte\n"
    )
    known = {"loss": numbers["known_loss"], "perplexity": numbers["known_perplexity"]}
    for name, row in (
        ("model", numbers),
        ("  [UNK] left out", known),
        (f"Kneser-Ney {order}-gram", numbers["kneser_ney"]),
        ("unigram", numbers["unigram"]),
    ):
        bits = f"{row['bits_per_byte']:16.4f}" if "bits_per_byte" in row else ""
        page += f"{name:22}{row['loss']:14.4f}{row['perplexity']:13.2f}{bits}\n"
    return page + (
        f"\nThe model's accuracy is {numbers['accuracy']:.4f}; {numbers['unk_share']:.4f} of the "
        "targets are [UNK].\nIt sees what stands before a target in its window, the n-gram model "
        "the words before it in its review.\n\n"
    )


def samples(counted: Mapping[str, float]) -> str:
    """How much texts of the model repeat; `counted` is `samples` of reports/evaluation.json."""
    names = ("distinct_1", "distinct_2", "distinct_3", "self_bleu", "repetition_rate")
    figures = ", ".join(f"{name.replace('_', '-')} {counted[name]:.4f}" for name in names)
    return f"{counted['reviews']:,} texts of the model: {figures}\n\n"


def runs(whose: str, words: Sequence[int]) -> str:
    """The copied runs of texts, given their lengths, as a line."""
    return (
        f"{whose}: median {np.median(words):g}, 95th percentile {np.percentile(words, 95):g}, "
        f"longest {max(words)}\n"
    )


def marked(words: Sequence[str], start: int, length: int) -> str:
    """A run of words between double brackets, with some of those around it."""
    stop = start + length
    before, after = words[max(start - WORDS_AROUND, 0) : start], words[stop : stop + WORDS_AROUND]
    first = ["..."] if start > WORDS_AROUND else []
    last = ["..."] if stop + WORDS_AROUND < len(words) else []
    return " ".join([*first, *before, "[[", *words[start:stop], "]]", *after, *last])

"""The page of an evaluation, as plain text."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Passage(NamedTuple):
    """A run of words in a text.

    Attributes:
        words: All words of the text.
        start: Where the run begins.
        length: Its words.
    """

    words: Sequence[str]
    start: int
    length: int


WORDS_AROUND = 20  # words shown on either side of a copied run


def losses(numbers: Mapping[str, Any], order: int) -> str:
    """Returns the held-out figures as a table.

    Args:
        numbers: The content of reports/evaluation.json.
        order: The words in the n-grams of the n-gram model.
    """
    held_out, charged = numbers["held_out"], numbers["charged"]
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
        ("mean of both", numbers["mixture"]),
        ("unigram", numbers["unigram"]),
    ):
        bits = f"{row['bits_per_byte']:16.4f}" if "bits_per_byte" in row else ""
        page += f"{name:22}{row['loss']:14.4f}{row['perplexity']:13.2f}{bits}\n"
    return page + (
        f"\nThe model's accuracy is {numbers['accuracy']:.4f}; {numbers['unk_share']:.4f} of the "
        "targets are [UNK].\nThe model sees the words before a target in its window, the n-gram "
        "model those before it in its review.\n"
        f"Of the bits per byte, {sum(charged.values()):.4f} are for what the targets leave out "
        f"({', '.join(f'{name} {bits:.4f}' for name, bits in charged.items())}).\n\n"
    )


def samples(counted: Mapping[str, float]) -> str:
    """Returns a line on how much the model's texts repeat.

    Args:
        counted: `samples` of reports/evaluation.json.
    """
    names = ("distinct_1", "distinct_2", "distinct_3", "self_bleu", "repetition_rate")
    figures = ", ".join(f"{name.replace('_', '-')} {counted[name]:.4f}" for name in names)
    return f"{counted['reviews']:,} texts of the model: {figures}\n\n"


def sampled(numbers: Mapping[str, Any]) -> str:
    """Returns a line for each part of the corpus of which only a sample was read.

    Args:
        numbers: The content of reports/evaluation.json.
    """
    uses = {
        "training": "the baselines, the charges and the search for copied runs know",
        "held_out": "the figures are those of",
    }
    lines = [
        f"Of the {part.replace('_', '-')} reviews, {use} a sample: {read['reviews']:,} of "
        f"{read['all_reviews']:,}, {read['bytes']:,} of {read['all_bytes']:,} bytes "
        "(evaluate.sample_bytes).\n"
        for part, use in uses.items()
        if (read := numbers[part])["reviews"] < read["all_reviews"]
    ]
    return "".join([*lines, "\n"]) if lines else ""


def runs(whose: str, words: Sequence[int]) -> str:
    """Returns a line on the copied runs of texts, given their lengths in words."""
    return (
        f"{whose}: median {np.median(words):g}, 95th percentile {np.percentile(words, 95):g}, "
        f"longest {max(words)}\n"
    )


def copied(written: Passage, source: Passage, review: str) -> str:
    """Returns the longest copied run, beside the review that it comes from.

    Args:
        written: In a text of the model.
        source: In the training review.
        review: The id of the review.
    """
    return (
        f"\nThe longest, in a text of the model:\n{marked(written)}\n"
        f"and in the training review {review}:\n{marked(source)}\n"
    )


def marked(passage: Passage) -> str:
    """Returns a run of words between double brackets, with some of the words around it."""
    words, start, stop = passage.words, passage.start, passage.start + passage.length
    before, after = words[max(start - WORDS_AROUND, 0) : start], words[stop : stop + WORDS_AROUND]
    first = ["..."] if start > WORDS_AROUND else []
    last = ["..."] if stop + WORDS_AROUND < len(words) else []
    return " ".join([*first, *before, "[[", *words[start:stop], "]]", *after, *last])

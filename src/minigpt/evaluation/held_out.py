"""Held-out figures: what a model, or a baseline, loses on reviews that nothing was learned from.

Every figure is a sum over tokens divided once.  A target is a token of a review that stands after
another: every one but the first.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from minigpt.data import sequences
from minigpt.data.text import tokenise
from minigpt.data.tokenizer import PADDING, UNKNOWN, Vocabulary
from minigpt.evaluation.baselines import spelling
from minigpt.model import loss as cross_entropy
from minigpt.model.network import MiniGPT

BATCH_SIZE = 128  # windows; the figures don't hang on it
BANDS = (10, 100, 1_000, 10_000)  # the last frequency rank of each band but the last
LARGEST_EXPONENT = 700  # e to more is no float

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """Reviews as a model reads them.

    Attributes:
        ids: int32, the tokens of all reviews in a row.
        offsets: (N + 1,) where each review begins in `ids`, and where the last one ends.
        targets: the places in `ids` of the targets, in order.
        spelled_nats: what is spelled letter by letter costs: each first token, and each target
            that is [UNK], that one beside what its [UNK] costs.
        text_bytes: UTF-8 bytes of the reviews' plain texts (see `plain`).
    """

    ids: npt.NDArray[np.int32]
    offsets: Ints
    targets: Ints
    spelled_nats: float
    text_bytes: int


def plain(texts: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Texts in lower case (ASCII), `<br />` and each run of white space one space, trimmed.

    What every style of `minigpt.text.tokenise` has in common.
    """
    texts = pc.replace_substring(pc.ascii_lower(texts), "<br />", " ")
    return pc.ascii_trim_whitespace(pc.replace_substring_regex(texts, r"[ \t\n\v\f\r]+", " "))


def digest(reviews: pa.Table) -> str:
    """Identifies reviews: sha256 of their `id` and `text`, in the order of the ids."""
    found = hashlib.sha256()
    for row in reviews.select(["id", "text"]).sort_by("id").to_pylist():
        for part in (row["id"].encode(), row["text"].encode()):
            found.update(len(part).to_bytes(8) + part)  # so that no two tables give the same bytes
    return found.hexdigest()


def held_out(
    texts: pa.Array | pa.ChunkedArray, vocabulary: Vocabulary, style: str, byte_nats: Floats
) -> HeldOut:
    """Tokenises held-out reviews.

    Args:
        texts: the reviews, at least one target among them.
        vocabulary: the model's.
        style: the standardisation of its tokens.
        byte_nats: (256,), `baselines.byte_unigram` of the plain training texts.
    """
    ids, offsets = vocabulary.encode(texts, style)
    first = np.zeros(len(ids), np.bool_)
    first[offsets[:-1][np.diff(offsets) > 0]] = True
    words = tokenise(texts, style).values
    spelled = words.filter(pa.array(first | (ids == UNKNOWN))).to_pylist()
    size = pc.sum(pc.binary_length(plain(texts))).as_py()
    nats = float(spelling(spelled, byte_nats).sum())
    return HeldOut(ids, offsets, np.flatnonzero(~first), nats, size)


def figures(reviews: HeldOut, losses: Floats) -> dict[str, float]:
    """The figures that a model and a baseline share.

    `bits_per_byte` compares any two of them, whatever their vocabularies and styles: all that it
    takes to spell the reviews (the targets by the model, [UNK] by its probability and then letter
    by letter, as the first token of each review) over the bytes of their plain texts, the same for
    all.  (No style keeps whether there was a space beside punctuation; `spaced` keeps the least.)

    Args:
        reviews: with targets.
        losses: nats of each target, in order.

    Returns:
        loss (nats per target), perplexity and bits_per_byte.
    """
    loss = float(losses.mean())
    bits = (float(losses.sum()) + reviews.spelled_nats) / math.log(2)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, LARGEST_EXPONENT)),
        "bits_per_byte": bits / reviews.text_bytes,
    }


def model_losses(
    network: MiniGPT,
    reviews: HeldOut,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, int | None], None] | None = None,
) -> tuple[Floats, npt.NDArray[np.bool_], Ints]:
    """Runs a model over reviews, in windows of its context length.

    The windows are those of the policy `windows`, so that every token of a review but its first is
    a target once, whichever policy the model was trained with.

    Args:
        network: the model.
        reviews: under its vocabulary.
        batch_size: windows in a step.
        progress: called after each step with the windows done, and with all of them.

    Returns:
        For each target, in order, nats, whether no word was more probable, and its position: the
        tokens of the window that stand before it, from 1 to the context length.
    """
    length = int(network.settings["context_length"])
    starts, stops, _ = sequences.windows(reviews.ids, reviews.offsets, length, "windows")
    compiled = _TargetLosses(network)
    # As in decoding: XLA is slower on a CPU than TensorFlow's own kernels; JAX has nothing else.
    compiled.compile(jit_compile=keras.backend.backend() == "jax")
    losses = np.zeros(len(reviews.ids))
    right = np.zeros(len(reviews.ids), np.bool_)
    positions = np.zeros(len(reviews.ids), np.int64)
    for begin in range(0, len(starts), batch_size):
        rows = slice(begin, begin + batch_size)
        places = starts[rows, None] + np.arange(length + 1)
        real = places < stops[rows, None]
        tokens = np.zeros((batch_size, length + 1), np.int32)  # whole: one shape, one compilation
        tokens[: len(places)] = np.where(real, reviews.ids[np.where(real, places, 0)], PADDING)
        found, hits = compiled.predict_on_batch(tokens)
        targets, row, column = places[:, 1:][real[:, 1:]], *np.nonzero(real[:, 1:])
        losses[targets], right[targets] = found[row, column], hits[row, column]
        positions[targets] = column + 1
        if progress:
            progress(min(begin + batch_size, len(starts)), len(starts))
    return losses[reviews.targets], right[reviews.targets], positions[reviews.targets]


def model_figures(
    reviews: HeldOut, losses: Floats, right: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """All figures of a model.

    Args:
        reviews: under its vocabulary.
        losses: nats of each target, in order.
        right: whether no word was more probable than the target.

    Returns:
        loss, perplexity, known_loss and known_perplexity ([UNK] targets left out), accuracy,
        unk_share (of the targets) and bits_per_byte.
    """
    known = reviews.ids[reviews.targets] != UNKNOWN
    shared = figures(reviews, losses)
    known_loss = float(losses[known].mean()) if known.any() else 0.0
    return {
        "loss": shared["loss"],
        "perplexity": shared["perplexity"],
        "known_loss": known_loss,
        "known_perplexity": math.exp(min(known_loss, LARGEST_EXPONENT)),
        "accuracy": float(right.mean()),
        "unk_share": float(1 - known.mean()),
        "bits_per_byte": shared["bits_per_byte"],
    }


def measure(
    network: MiniGPT,
    vocabulary: Vocabulary,
    style: str,
    texts: pa.Array | pa.ChunkedArray,
    byte_nats: Floats,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, float]:
    """Measures a model on held-out reviews: the figures that the evaluate stage writes.

    Models of other vocabularies, styles, context lengths and policies are measured on the same
    words (see `model_losses`) and compared by bits_per_byte (see `figures`).

    Args:
        network: the model, of a model directory, as are `vocabulary` and `style`.
        vocabulary: its own.
        style: config["vocabulary"]["style"].
        texts: the held-out reviews.
        byte_nats: (256,), `baselines.byte_unigram` of the plain training texts.
        batch_size: windows in a step.
        progress: called after each step with the windows done, and with all of them.

    Returns:
        What `model_figures` returns.
    """
    reviews = held_out(texts, vocabulary, style, byte_nats)
    losses, right, _ = model_losses(network, reviews, batch_size=batch_size, progress=progress)
    return model_figures(reviews, losses, right)


def loss_by_position(losses: Floats, positions: Ints) -> list[dict[str, Any]]:
    """Says what is lost after 1, 2, ... tokens of context.

    Returns:
        Rows of position, loss and targets; a position without a target has no row.
    """
    return [
        {"position": position, "loss": float(losses[at].mean()), "targets": int(at.sum())}
        for position in np.unique(positions).tolist()
        for at in [positions == position]
    ]


def loss_by_band(reviews: HeldOut, losses: dict[str, Floats]) -> list[dict[str, Any]]:
    """Says what is lost on common and on rare words.

    Args:
        reviews: their vocabulary's ids are in the order of frequency.
        losses: nats of each target, by the name of the column.

    Returns:
        Rows of band (frequency ranks such as 1-10, or [UNK]), the columns and targets; a band
        without a target has no row.
    """
    ranks = reviews.ids[reviews.targets] - UNKNOWN  # [UNK] is 0
    bands = np.where(ranks == 0, len(BANDS) + 1, np.searchsorted(BANDS, ranks))
    firsts = [1, *(last + 1 for last in BANDS)]
    names = [f"{first}-{last}" for first, last in zip(firsts, BANDS, strict=False)]
    names += [f"{firsts[-1]}-", "[UNK]"]
    return [
        {
            "band": names[band],
            **{name: float(column[at].mean()) for name, column in losses.items()},
            "targets": int(at.sum()),
        }
        for band in np.unique(bands).tolist()
        for at in [bands == band]
    ]


class _TargetLosses(keras.Model):
    """Windows of token ids, int32 (B, T + 1), to nats and hits of their targets, (B, T) each."""

    def __init__(self, network: MiniGPT) -> None:
        super().__init__(name="target_losses")
        self.network = network
        self.built = True

    def call(self, tokens: Any) -> tuple[Any, Any]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden = self.network.hidden(inputs)
        kernel, bias = self.network.head
        return cross_entropy.token_losses(hidden, kernel, bias, targets)

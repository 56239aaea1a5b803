"""Held-out figures: the loss of a model or a baseline on reviews that nothing was learned from.

The targets are all tokens of a review but the first. A mean is one sum over all targets, divided
once.

Bits per byte compares any two models, whatever their tokenizers. It is what it takes to write the
reviews byte by byte, as the corpus defines them (`corpus.white_space`), divided by their UTF-8
bytes. The targets are charged to the model, and what the tokens leave out (the first token of a
review, the spelling of [UNK], white space, capitals) to the models in `charges`. Figures are
compared only under the same number, `MEASURE`.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from minigpt.common.progress import Progress
from minigpt.data import sequences
from minigpt.data.tokenizer import PADDING, UNKNOWN, Texts
from minigpt.evaluation.charges import Charges, Nats
from minigpt.model import head
from minigpt.model.loss import perplexity
from minigpt.model.network import MiniGPT

# Of bits per byte. 1: of lower-case text with single spaces, [UNK] and first tokens spelled byte by
# byte. 2: of the text as the corpus defines it, with `charges`.
MEASURE = 2

BATCH_SIZE = 128  # windows in a step; the figures do not depend on it
BANDS = (10, 100, 1_000, 10_000)  # the last frequency rank of each band but the last

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """Reviews as a model reads them.

    Attributes:
        ids: The token ids of all reviews in a row.
        offsets: (N + 1,) where each review begins in `ids`, and where the last one ends.
        targets: The places in `ids` of the targets, in order.
        charged: The nats of what the targets leave out.
        text_bytes: UTF-8 bytes of the reviews.
        unknown: The id of [UNK]; None: there is none.
    """

    ids: npt.NDArray[np.int32]
    offsets: Ints
    targets: Ints
    charged: Nats
    text_bytes: int
    unknown: int | None = UNKNOWN


def digest(reviews: pa.Table) -> str:
    """Returns the SHA-256 of reviews: of their `id` and `text`, in the order of the ids."""
    found = hashlib.sha256()
    for row in reviews.select(["id", "text"]).sort_by("id").to_pylist():
        for part in (row["id"].encode(), row["text"].encode()):
            found.update(len(part).to_bytes(8) + part)  # no two tables give the same bytes
    return found.hexdigest()


def read(texts: Texts, charges: Charges) -> HeldOut:
    """Reads held-out reviews with the tokenizer of a model.

    Args:
        texts: (N,) reviews, with at least one target among them.
        charges: Of the model's tokenizer, learned from the training reviews.
    """
    tokenizer = charges.tokenizer
    ids, offsets = sequences.documents(*tokenizer.encode(texts), tokenizer.separator)
    is_target = np.ones(len(ids), np.bool_)
    is_target[offsets[:-1][np.diff(offsets) > 0]] = False
    size = pc.sum(pc.binary_length(texts)).as_py()
    targets = np.flatnonzero(is_target)
    return HeldOut(ids, offsets, targets, charges(texts), size, tokenizer.unknown)


def figures(reviews: HeldOut, losses: Floats) -> dict[str, float]:
    """Computes the figures that a model and a baseline share.

    Args:
        reviews: The reviews, with at least one target.
        losses: Nats of each target, in order.

    Returns:
        loss (nats per target), perplexity and bits_per_byte.
    """
    loss = float(losses.mean())
    bits = (float(losses.sum()) + sum(reviews.charged)) / math.log(2)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits / reviews.text_bytes,
    }


def charged(reviews: HeldOut) -> dict[str, float]:
    """Returns the part of bits_per_byte that is charged besides the targets, for what it is."""
    parts = reviews.charged._asdict().items()
    return {name: nats / math.log(2) / reviews.text_bytes for name, nats in parts}


def model_losses(
    network: MiniGPT,
    reviews: HeldOut,
    *,
    progress: Progress | None = None,
) -> tuple[Floats, npt.NDArray[np.bool_], Ints]:
    """Runs a model over reviews, in windows of its context length.

    The windows are those of the policy `windows`, so that every token of a review but its first is
    a target once, whichever policy the model was trained with.

    Args:
        network: The model.
        reviews: The reviews as its tokenizer reads them.
        progress: Called after each step with the windows done and the windows in all.

    Returns:
        For each target, in order: its nats, whether no token was more probable, and its position,
        which is the number of tokens before it in the window, from 1 to the context length.
    """
    length = network.config.context_length
    starts, stops, _ = sequences.windows(reviews.ids, reviews.offsets, length, "windows")
    compiled = _TargetLosses(network)
    # On a CPU, XLA is slower than TensorFlow's own kernels. JAX has nothing else.
    compiled.compile(jit_compile=keras.backend.backend() == "jax")
    losses = np.zeros(len(reviews.ids))
    right = np.zeros(len(reviews.ids), np.bool_)
    positions = np.zeros(len(reviews.ids), np.int64)
    for begin in range(0, len(starts), BATCH_SIZE):
        rows = slice(begin, begin + BATCH_SIZE)
        places = starts[rows, None] + np.arange(length + 1)
        real = places < stops[rows, None]
        tokens = np.zeros((BATCH_SIZE, length + 1), np.int32)  # one shape, so one compilation
        tokens[: len(places)] = np.where(real, reviews.ids[np.where(real, places, 0)], PADDING)
        found, hits = compiled.predict_on_batch(tokens)
        targets, row, column = places[:, 1:][real[:, 1:]], *np.nonzero(real[:, 1:])
        losses[targets], right[targets] = found[row, column], hits[row, column]
        positions[targets] = column + 1
        if progress:
            progress(min(begin + BATCH_SIZE, len(starts)), len(starts))
    return losses[reviews.targets], right[reviews.targets], positions[reviews.targets]


def model_figures(
    reviews: HeldOut, losses: Floats, right: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """Computes all figures of a model.

    Args:
        reviews: The reviews as its tokenizer reads them.
        losses: Nats of each target, in order.
        right: Whether no token was more probable than the target.

    Returns:
        loss, perplexity, known_loss and known_perplexity (without the targets that are [UNK]),
        accuracy, unk_share (of the targets) and bits_per_byte.
    """
    targets = reviews.ids[reviews.targets]
    known = targets != (-1 if reviews.unknown is None else reviews.unknown)
    shared = figures(reviews, losses)
    known_loss = float(losses[known].mean()) if known.any() else 0.0
    return {
        "loss": shared["loss"],
        "perplexity": shared["perplexity"],
        "known_loss": known_loss,
        "known_perplexity": perplexity(known_loss),
        "accuracy": float(right.mean()),
        "unk_share": float(1 - known.mean()),
        "bits_per_byte": shared["bits_per_byte"],
    }


def measure(
    network: MiniGPT, charges: Charges, texts: Texts, *, progress: Progress | None = None
) -> dict[str, float]:
    """Measures a model on held-out reviews.

    Models with other tokenizers, context lengths and policies are measured on the same text (see
    `model_losses`).

    Args:
        network: The model.
        charges: Of the model's tokenizer, learned from the training reviews.
        texts: (N,) held-out reviews.
        progress: Called after each step with the windows done and the windows in all.

    Returns:
        What `model_figures` returns.
    """
    reviews = read(texts, charges)
    losses, right, _ = model_losses(network, reviews, progress=progress)
    return model_figures(reviews, losses, right)


def loss_by_position(losses: Floats, positions: Ints) -> list[dict[str, Any]]:
    """Returns the mean loss after 1, 2, ... tokens of context.

    Returns:
        Rows of position, loss and targets; a position without a target has no row.
    """
    return [
        {"position": position, "loss": float(losses[at].mean()), "targets": int(at.sum())}
        for position in np.unique(positions).tolist()
        for at in [positions == position]
    ]


def loss_by_band(
    reviews: HeldOut, losses: dict[str, Floats], special: int = 2
) -> list[dict[str, Any]]:
    """Returns the mean loss on common and on rare words.

    Args:
        reviews: Reviews whose token ids are in the order of frequency.
        losses: Nats of each target, by the name of the column.
        special: How many ids stand before that of the most frequent word.

    Returns:
        Rows of band (frequency ranks such as 1-10, or [UNK]), the columns and targets; a band
        without a target has no row.
    """
    ids = reviews.ids[reviews.targets]
    ranks = np.where(ids == reviews.unknown, 0, ids - special + 1)
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
    """Maps windows of token ids, int32 (B, T + 1), to nats and hits of their targets, (B, T)."""

    def __init__(self, network: MiniGPT) -> None:
        super().__init__(name="target_losses")
        self.network = network
        self.built = True

    def call(self, tokens: Any) -> tuple[Any, Any]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return head.token_losses(self.network.hidden(inputs), self.network.head, targets)

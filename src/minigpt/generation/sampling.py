"""Samplers: how the next token is chosen, as pure functions of `keras.ops`.

Nothing here sorts a vocabulary: a running sum over it and the sorting of it took longer than the
model.  Both are done in blocks instead, with the same result.
Shapes: B texts, L tokens of text so far, V words, R rounds.
"""

from collections.abc import Mapping
from typing import Any

from keras import ops

from minigpt.config import SamplingConfig

BLOCK = 32  # words to a block: near the square root of V / top_k, where the two stages cost alike

# A nucleus is drawn from by rejection.  More rounds than these are needed with a probability below
# 1e-8 for a top_p of at least 0.1: rejections are Poisson distributed, with a mean of -log(top_p).
ROUNDS = 16


def rounds(sampling: SamplingConfig) -> int:
    """Returns R, the number of uniform numbers that one token may need."""
    return ROUNDS if sampling.top_p < 1 else 1


def next_tokens(
    logits: Any, text: Any, uniforms: Any, sampling: SamplingConfig, knobs: Mapping[str, Any]
) -> Any:
    """Chooses the next token of each text.

    Args:
        logits: float32 (B, V), -inf where a word must not be written.
        text: int32 (B, L), token ids.
        uniforms: float32 (B, R) in [0, 1).
        sampling: Which of the samplers are on.
        knobs: The values of `temperature`, `top_p`, `min_p` and `repetition_penalty`. As tensors,
            they change without another compilation.

    Returns:
        int32 (B,), token ids.
    """
    if sampling.repetition_penalty != 1:
        logits = penalise(logits, text, knobs["repetition_penalty"])
    if sampling.greedy:
        return largest(logits, 1)[1][:, 0]
    return choose(
        logits,
        uniforms,
        knobs["temperature"],
        sampling.top_k,
        knobs["top_p"] if sampling.top_p < 1 else None,
        knobs["min_p"] if sampling.min_p > 0 else None,
    )


def penalise(logits: Any, text: Any, penalty: Any) -> Any:
    """Makes tokens that stand in the text less probable (Keskar et al., 2019).

    Args:
        logits: (B, V).
        text: int32 (B, L), token ids.
        penalty: above 1 discourages.

    Returns:
        (B, V).
    """
    batch, length = ops.shape(text)
    scores = ops.take_along_axis(logits, text, axis=1)
    scores = ops.where(scores > 0, scores / penalty, scores * penalty)
    rows = ops.repeat(ops.arange(batch), length)
    indices = ops.stack([rows, ops.reshape(text, (-1,))], axis=1)
    return ops.scatter_update(logits, indices, ops.reshape(scores, (-1,)))


def choose(
    logits: Any,
    uniforms: Any,
    temperature: Any,
    top_k: int = 0,
    top_p: Any = None,
    min_p: Any = None,
) -> Any:
    """Draws a token from each row by inverting its distribution function at a uniform number.

    The words lie in the order of their ids, with `top_k` in that of their probability.  `top_p`
    keeps a word where the more probable ones together have less than that mass, so equally probable
    words are kept or cut together.

    Args:
        logits: (B, V).
        uniforms: float32 (B, R) in [0, 1); R > 1 is of use for `top_p` only.
        temperature: above 0.
        top_k: tokens kept; 0: all.
        top_p: the mass kept, after `top_k`; None: all of it.
        min_p: the least share of the top one's probability; None: 0.

    Returns:
        int32 (B,), token ids.
    """
    ids = None
    if top_k:
        logits, ids = largest(logits, top_k)
    probabilities = ops.softmax(logits / temperature)
    if min_p is not None:
        least = min_p * ops.max(probabilities, axis=-1, keepdims=True)
        # The mass of top_p is counted before min_p cuts; what it cuts is the least probable anyway.
        probabilities = ops.where(probabilities >= least, probabilities, 0.0)
    if top_p is None:
        index, _ = draw(probabilities, uniforms[:, :1])
    else:
        index = _draw_nucleus(probabilities, uniforms, top_p)
    return (index if ids is None else _at(ids, index))[:, 0]


def largest(logits: Any, k: int) -> tuple[Any, Any]:
    """What `ops.top_k` returns, found in two stages: the k blocks with the greatest maxima hold it.

    Args:
        logits: (B, V).
        k: how many; more than V: V.

    Returns:
        Values and int32 indices, (B, k) each, in falling order, the lower index first of equals.
    """
    words = logits.shape[-1]
    if k * BLOCK * 2 > words:
        values, indices = ops.top_k(logits, min(k, words))
        return values, ops.cast(indices, "int32")
    blocks = _blocks(logits, float("-inf"))  # (B, V / BLOCK, BLOCK)
    _, best = ops.top_k(ops.max(blocks, axis=-1), k)
    best = ops.cast(ops.sort(best, axis=-1), "int32")  # equals stay in the order of their indices
    kept = _rows(blocks, best)  # (B, k, BLOCK)
    indices = best[:, :, None] * BLOCK + ops.arange(BLOCK)
    values, places = ops.top_k(ops.reshape(kept, (-1, k * BLOCK)), k)
    return values, ops.take_along_axis(ops.reshape(indices, (-1, k * BLOCK)), places, axis=1)


def draw(weights: Any, uniforms: Any) -> tuple[Any, Any]:
    """Draws an index from each row: the first whose running sum exceeds that part of the total.

    Args:
        weights: (B, V), not negative; their sum need not be 1.
        uniforms: float32 (B, 1) in [0, 1).

    Returns:
        The index, int32 (B, 1), and its weight, (B, 1), which is above 0 unless all are 0.
    """
    if weights.shape[-1] <= BLOCK * BLOCK:
        index, _ = _first(weights, uniforms * ops.sum(weights, axis=-1, keepdims=True))
        return index, _at(weights, index)
    blocks = _blocks(weights, 0.0)  # (B, V / BLOCK, BLOCK)
    sums = ops.sum(blocks, axis=-1)
    wanted = uniforms * ops.sum(sums, axis=-1, keepdims=True)
    block, before = _first(sums, wanted)
    inside = _rows(blocks, block)[:, 0]  # (B, BLOCK)
    index, _ = _first(inside, wanted - before)
    return block * BLOCK + index, _at(inside, index)


def _draw_nucleus(probabilities: Any, uniforms: Any, top_p: Any) -> Any:
    """Draws from the nucleus by rejection, which needs no sorting (as FlashInfer does, 2025).

    A word is drawn from all; the mass of those more probable tells whether it is in the nucleus.
    Where it isn't, the next one is drawn from those more probable, for the nucleus is among them.
    """
    rounds = uniforms.shape[-1]

    def unsettled(number: Any, index: Any, settled: Any, rest: Any) -> Any:
        return (number < rounds) & ops.logical_not(ops.all(settled))

    def draw_again(number: Any, index: Any, settled: Any, rest: Any) -> Any:
        uniform = ops.slice(uniforms, (0, number), (ops.shape(uniforms)[0], 1))
        drawn, weight = draw(rest, uniform)
        rest = ops.where(rest > weight, rest, 0.0)
        kept = ops.sum(rest, axis=-1, keepdims=True) < top_p
        index = ops.where(kept & ops.logical_not(settled), drawn, index)
        return number + 1, index, settled | kept, rest

    # The most probable word is in every nucleus: where no round settles it, it is taken.
    first = largest(probabilities, 1)[1]
    state = (ops.convert_to_tensor(0, "int32"), first, first < 0, probabilities)
    return ops.while_loop(unsettled, draw_again, state)[1]


def _first(weights: Any, wanted: Any) -> tuple[Any, Any]:
    """The first index whose running sum exceeds `wanted` (B, 1), and the sum of those before it."""
    mass = ops.cumsum(weights, axis=-1)
    # Rounding must not reach past the last word; and a sum in parallel (JAX's) wavers in its last
    # bits, also where a weight is 0.
    wanted = ops.minimum(wanted, mass[:, -1:] * (1 - 1e-6))
    reached = (mass > wanted) & (weights > 0)
    index = ops.cast(ops.argmax(ops.cast(reached, "int32"), axis=-1, keepdims=True), "int32")
    return index, _at(mass - weights, index)


def _at(rows: Any, index: Any) -> Any:
    """Of each row (B, n) the entry at its index (B, 1): fewer operations than a gather takes."""
    chosen = ops.arange(rows.shape[-1], dtype="int32") == index
    return ops.sum(ops.where(chosen, rows, ops.zeros_like(rows)), axis=-1, keepdims=True)


def _blocks(rows: Any, fill: float) -> Any:
    """(B, V) as (B, blocks, BLOCK), the last one filled up."""
    missing = -rows.shape[-1] % BLOCK
    if missing:
        rows = ops.pad(rows, ((0, 0), (0, missing)), constant_values=fill)
    return ops.reshape(rows, (-1, rows.shape[-1] // BLOCK, BLOCK))


def _rows(blocks: Any, chosen: Any) -> Any:
    """Of (B, blocks, BLOCK) the chosen ones (B, k) of each row: (B, k, BLOCK)."""
    batch, count, width = ops.shape(blocks)
    flat = ops.arange(batch)[:, None] * count + chosen
    return ops.take(ops.reshape(blocks, (-1, width)), flat, axis=0)

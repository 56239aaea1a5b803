"""Samplers: how the next token is chosen, as pure functions of `keras.ops`.

No function sorts the vocabulary (but for a very large top_k) or sums along all of it, which would
take longer than the model. They work in blocks of words instead, with the same result.

Shapes: B texts, L tokens of a text so far, V words, R rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from keras import ops

from minigpt.config import SamplingConfig

BLOCK = 32  # words; near the square root of V / top_k, where both stages cost the same

# Rounds of rejection for top_p. Rejections are Poisson distributed with a mean of -log(top_p), so
# for a top_p of 0.1 or more the probability that more rounds are needed is below 1e-8.
ROUNDS = 16

# Up to USUAL_TOP_K, the largest logits are found without sorting all; up to SMALL_TOP_K, sooner.
SMALL_TOP_K, USUAL_TOP_K = 16, 64
KNOBS = {
    "temperature": "float32",
    "top_k": "int32",
    "top_p": "float32",
    "min_p": "float32",
    "repetition_penalty": "float32",
}


def rounds(sampling: SamplingConfig) -> int:
    """Returns R, the number of uniform numbers that one token may need."""
    return ROUNDS if sampling.top_p < 1 else 1


def uniforms(sampling: SamplingConfig, row: int, count: int) -> npt.NDArray[np.float32]:
    """Returns the numbers that a text is drawn with, (count, R) in [0, 1).

    Args:
        sampling: Its seed, and with it the row, decides the numbers.
        row: Of the text among those that are written with this seed.
        count: The number of tokens; more tokens begin with the same numbers.
    """
    rng = np.random.default_rng([sampling.seed, row])
    return rng.random((count, rounds(sampling)), "float32")


def knobs(rows: Sequence[SamplingConfig]) -> dict[str, npt.NDArray[Any]]:
    """Returns the values of each row's samplers as `next_tokens` takes them, (B, 1) each."""
    return {
        name: np.array([[getattr(row, name)] for row in rows], dtype)
        for name, dtype in KNOBS.items()
    }


class Asked(NamedTuple):
    """Which samplers the rows of a step ask for.

    Python's booleans where that is known before the step is compiled, which then computes no more
    than they ask for; else tensors, and the step decides each time.
    """

    penalty: Any
    greedy: Any
    all_greedy: Any
    few: Any  # a top_k up to USUAL_TOP_K
    all_few: Any
    not_small: Any  # a top_k from SMALL_TOP_K to USUAL_TOP_K
    many: Any  # a larger one
    min_p: Any
    top_p: Any


def asked(knobs: Mapping[str, Any], library: Any = ops) -> Asked:
    """Returns what rows ask for.

    Args:
        knobs: What the function `knobs` returned.
        library: `numpy` for arrays, or `keras.ops` for tensors.
    """
    top_k, any_, all_ = knobs["top_k"], library.any, library.all
    greedy, few = _greedy(knobs), _is_few(top_k)
    found = (
        any_(knobs["repetition_penalty"] != 1),
        any_(greedy),
        all_(greedy),
        any_(few),
        all_(few),
        any_(few & (top_k > SMALL_TOP_K)),
        any_(top_k > USUAL_TOP_K),
        any_(knobs["min_p"] > 0),
        any_(knobs["top_p"] < 1),
    )
    return Asked(*(map(bool, found) if library is np else found))


def _greedy(knobs: Mapping[str, Any]) -> Any:
    return (knobs["temperature"] == 0) | (knobs["top_k"] == 1)


def _is_few(top_k: Any) -> Any:
    return (top_k > 0) & (top_k <= USUAL_TOP_K)


def _either(condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    if isinstance(condition, bool):
        return then() if condition else otherwise()
    return ops.cond(condition, then, otherwise)


def next_tokens(
    logits: Any,
    text: Any,
    uniforms: Any,
    knobs: Mapping[str, Any],
    separator: int = -1,
    ask: Asked | None = None,
) -> Any:
    """Chooses the next token of each text, by the settings of its own.

    Args:
        logits: float32 (B, V), -inf where a word must not be written.
        text: int32 (B, L), token ids.
        uniforms: float32 (B, R) in [0, 1).
        knobs: What the function `knobs` returned. As tensors, they change without another
            compilation.
        separator: The token that the repetition penalty spares; -1: none.
        ask: What the function `asked` returned; None: of these knobs.

    Returns:
        int32 (B,), token ids.
    """
    ask = ask or asked(knobs)

    def penalised() -> Any:
        # It stands before each text: one that has to end is no repetition.
        is_separator = ops.arange(logits.shape[1], dtype="int32") == separator
        scores = penalise(logits, text, knobs["repetition_penalty"])
        return ops.where(is_separator, logits, scores)

    scores = _either(ask.penalty, penalised, lambda: logits)
    greedy = _greedy(knobs)

    def most_probable() -> Any:
        return largest(scores, 1)[1][:, 0]

    def drawn() -> Any:
        above_0 = ops.where(greedy, 1.0, knobs["temperature"])
        return choose(scores, uniforms, {**knobs, "temperature": above_0}, ask)

    def both() -> Any:
        return ops.where(greedy[:, 0], most_probable(), drawn())

    return _either(ask.greedy, lambda: _either(ask.all_greedy, most_probable, both), drawn)


def penalise(logits: Any, text: Any, penalty: Any) -> Any:
    """Makes the tokens of the text so far less probable (Keskar et al., 2019).

    Args:
        logits: (B, V).
        text: int32 (B, L), token ids.
        penalty: Divides positive logits and multiplies negative ones, (B, 1); at least 1.

    Returns:
        (B, V).
    """
    batch, length = ops.shape(text)
    scores = ops.take_along_axis(logits, text, axis=1)
    scores = ops.where(scores > 0, scores / penalty, scores * penalty)
    rows = ops.repeat(ops.arange(batch), length)
    indices = ops.stack([rows, ops.reshape(text, (-1,))], axis=1)
    return ops.scatter_update(logits, indices, ops.reshape(scores, (-1,)))


def choose(logits: Any, uniforms: Any, knobs: Mapping[str, Any], ask: Asked) -> Any:
    """Draws a token for each text by inverting the distribution function at a uniform number.

    Words are in the order of their ids, or with a usual `top_k` in the order of falling
    probability: then a few words are looked at instead of all. `top_p` keeps a word if the more
    probable ones together have less than that probability, so equally probable words are kept or
    cut together. What a row draws does not depend on the settings of the others.

    Args:
        logits: (B, V).
        uniforms: float32 (B, R) in [0, 1); only `top_p` uses more than the first.
        knobs: What the function `knobs` returned: `temperature`, above 0; `top_k`, the number of
            most probable tokens to keep (Fan et al., 2018), 0: all; `top_p`, the probability to
            keep, after `top_k` (Holtzman et al., 2020), 1: all; `min_p`, the least share of the top
            token's probability (Nguyen et al., 2024).
        ask: What the function `asked` returned.

    Returns:
        int32 (B,), token ids.
    """
    top_k = knobs["top_k"]
    few = _is_few(top_k)

    def among_few() -> Any:
        values, ids = _few(logits, ops.where(few, top_k, 1), ask)
        return _at(ids, _choose_all(values, uniforms, knobs, ask))

    def among_all() -> Any:
        many = ops.where(few | (top_k >= logits.shape[-1]), 0, top_k)
        kept = _either(ask.many, lambda: _cut(logits, many), lambda: logits)
        return _choose_all(kept, uniforms, knobs, ask)

    def both() -> Any:
        return ops.where(few, among_few(), among_all())

    index = _either(ask.few, lambda: _either(ask.all_few, among_few, both), among_all)
    return index[:, 0]


def _choose_all(logits: Any, uniforms: Any, knobs: Mapping[str, Any], ask: Asked) -> Any:
    """Does what `choose` does without `top_k`, and returns (B, 1)."""
    probabilities = ops.softmax(logits / knobs["temperature"])

    def without_the_least() -> Any:
        # This changes no sum that top_p compares: min_p cuts the least probable words.
        least = knobs["min_p"] * ops.max(probabilities, axis=-1, keepdims=True)
        return ops.where(probabilities >= least, probabilities, 0.0)

    kept = _either(ask.min_p, without_the_least, lambda: probabilities)
    return _either(
        ask.top_p,
        lambda: _draw_nucleus(kept, uniforms, knobs["top_p"]),
        lambda: draw(kept, uniforms[:, :1])[0],
    )


def _few(logits: Any, top_k: Any, ask: Asked) -> tuple[Any, Any]:
    """Returns the logits and ids of the `top_k` (B, 1) largest, (B, USUAL_TOP_K); -inf: no more."""

    def found(most: int) -> tuple[Any, Any]:
        values, ids = largest(logits, most)
        missing = (0, 0), (0, USUAL_TOP_K - values.shape[-1])
        return ops.pad(values, missing, constant_values=float("-inf")), ops.pad(ids, missing)

    values, ids = _either(ask.not_small, lambda: found(USUAL_TOP_K), lambda: found(SMALL_TOP_K))
    return ops.where(ops.arange(USUAL_TOP_K) < top_k, values, float("-inf")), ids


def _cut(logits: Any, top_k: Any) -> Any:
    """Cuts all but the `top_k` (B, 1) largest logits of a row; of equals, the lower ids stay."""
    words = logits.shape[-1]
    values, ids = largest(logits, words)
    place = ops.clip(top_k - 1, 0, words - 1)
    least, last = _at(values, place), _at(ids, place)
    before = ops.arange(words, dtype="int32") <= last
    kept = (logits > least) | ((logits == least) & before) | (top_k == 0)
    return ops.where(kept, logits, float("-inf"))


def largest(logits: Any, k: int) -> tuple[Any, Any]:
    """Returns what `ops.top_k` does, in two stages: the blocks with the k largest maxima hold it.

    Args:
        logits: (B, V).
        k: How many; at most V are returned.

    Returns:
        Values and int32 indices, (B, k) each, the largest first, of equals the lower index first.
    """
    words = logits.shape[-1]
    if k * BLOCK * 2 > words:
        values, indices = ops.top_k(logits, min(k, words))
        return values, ops.cast(indices, "int32")
    blocks = _blocks(logits, float("-inf"))  # (B, V / BLOCK, BLOCK)
    _, best = ops.top_k(ops.max(blocks, axis=-1), k)
    best = ops.cast(ops.sort(best, axis=-1), "int32")  # of equals, the lower index stays first
    kept = _rows(blocks, best)  # (B, k, BLOCK)
    indices = best[:, :, None] * BLOCK + ops.arange(BLOCK)
    values, places = ops.top_k(ops.reshape(kept, (-1, k * BLOCK)), k)
    return values, ops.take_along_axis(ops.reshape(indices, (-1, k * BLOCK)), places, axis=1)


def draw(weights: Any, uniforms: Any) -> tuple[Any, Any]:
    """Draws an index from each row: the first whose running sum exceeds a share of the total.

    Args:
        weights: (B, V), not negative; their sum need not be 1.
        uniforms: The shares, float32 (B, 1) in [0, 1).

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
    """Draws from the nucleus by rejection, without sorting, like FlashInfer (2025).

    A round draws a word. If the more probable words together have less than `top_p`, the word is in
    the nucleus. Otherwise the nucleus is among the more probable words, and the next round draws
    from these.
    """
    rounds = uniforms.shape[-1]
    everything = top_p >= 1  # whatever the sum of the probabilities is rounded to

    def unsettled(number: Any, index: Any, settled: Any, rest: Any) -> Any:
        return (number < rounds) & ops.logical_not(ops.all(settled))

    def draw_again(number: Any, index: Any, settled: Any, rest: Any) -> Any:
        uniform = ops.slice(uniforms, (0, number), (ops.shape(uniforms)[0], 1))
        drawn, weight = draw(rest, uniform)
        rest = ops.where(rest > weight, rest, 0.0)
        kept = (ops.sum(rest, axis=-1, keepdims=True) < top_p) | everything
        index = ops.where(kept & ops.logical_not(settled), drawn, index)
        return number + 1, index, settled | kept, rest

    # If no round succeeds, the most probable word is chosen, which is in every nucleus.
    first = largest(probabilities, 1)[1]
    state = (ops.convert_to_tensor(0, "int32"), first, first < 0, probabilities)
    return ops.while_loop(unsettled, draw_again, state)[1]


def _first(weights: Any, wanted: Any) -> tuple[Any, Any]:
    """Returns the first index whose running sum exceeds `wanted`, and the sum before it: (B, 1)."""
    mass = ops.cumsum(weights, axis=-1)
    # Rounding must not lead past the last word. JAX adds up in parallel, so its running sum may
    # change in the last bits even where a weight is 0.
    wanted = ops.minimum(wanted, mass[:, -1:] * (1 - 1e-6))
    reached = (mass > wanted) & (weights > 0)
    index = ops.cast(ops.argmax(ops.cast(reached, "int32"), axis=-1, keepdims=True), "int32")
    return index, _at(mass - weights, index)


def _at(rows: Any, index: Any) -> Any:
    """Returns the entry of each row (B, n) at its index (B, 1); a gather takes more operations."""
    chosen = ops.arange(rows.shape[-1], dtype="int32") == index
    return ops.sum(ops.where(chosen, rows, ops.zeros_like(rows)), axis=-1, keepdims=True)


def _blocks(rows: Any, fill: float) -> Any:
    """Splits (B, V) into (B, blocks, BLOCK); `fill` completes the last block."""
    missing = -rows.shape[-1] % BLOCK
    if missing:
        rows = ops.pad(rows, ((0, 0), (0, missing)), constant_values=fill)
    return ops.reshape(rows, (-1, rows.shape[-1] // BLOCK, BLOCK))


def _rows(blocks: Any, chosen: Any) -> Any:
    """Returns the chosen blocks (B, k) of each row of (B, blocks, BLOCK): (B, k, BLOCK)."""
    batch, count, width = ops.shape(blocks)
    flat = ops.arange(batch)[:, None] * count + chosen
    return ops.take(ops.reshape(blocks, (-1, width)), flat, axis=0)

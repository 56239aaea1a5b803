"""Next-token cross-entropy, fused with the projection to tokens.

The logits of a batch of 128 x 80 tokens over a vocabulary of 20,000 take 819 MB in float32, and the
plain loss passes over them several times. Here a block of positions is projected, its loss and
gradients are computed, and its logits are dropped before the next block, as in "Cut Your Losses in
Large-Vocabulary Language Models" (Wijmans et al., 2024, https://arxiv.org/abs/2411.09009) and in
Liger Kernel's chunked loss. The forward pass computes the gradients, so nothing is projected twice.

Shapes: B sequences, T positions, t positions of a block, C width of a hidden state, V tokens.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from minigpt.common import backend

BLOCK_BYTES = 20_480_000  # logits of a block: 2 positions of the published batch in float32
LEAST_PROBABILITY = 1e-30  # float32 loses digits below 1e-38


def perplexity(loss: float) -> float:
    """Returns the perplexity of a mean loss in nats; above 700 it would overflow."""
    return math.exp(min(loss, 700))


def token_losses(hidden: Any, kernel: Any, bias: Any, targets: Any) -> tuple[Any, Any]:
    """Computes the cross-entropy of every position, for evaluation.

    Args:
        hidden: (B, T, C), in the dtype of the matrix products; T is static.
        kernel: (V, C), in the dtype of the weights; V is static.
        bias: (V,).
        targets: int32 (B, T), the token that follows each position.

    Returns:
        Nats of each position, float32 (B, T), and whether no token was more probable than the
        target, bool (B, T).
    """
    found, best = log_probabilities(hidden, kernel, bias, targets)
    return -found, found >= best


def log_probabilities(
    hidden: Any,
    kernel: Any,
    bias: Any,
    targets: Any,
    columns: int | None = None,
    seen: Any | None = None,
) -> tuple[Any, Any]:
    """Computes log probabilities of the targets, and of the most probable tokens.

    Args:
        hidden: (B, T, C), in the dtype of the matrix products; T is static.
        kernel: (V, C), in the dtype of the weights; V is static.
        bias: (V,).
        targets: int32 (B, T).
        columns: The most probable token is one of so many; None: of all.
        seen: bool (B, T); blocks without a position that is seen are passed over, and have zeros.
            None: all are seen.

    Returns:
        Both, in nats, float32 (B, T).
    """
    tokens = kernel.shape[0]
    whole = _with_bias(ops.cast(kernel, hidden.dtype), bias)
    hiddens, answers = _blocks(hidden, tokens), _blocks(targets, tokens)

    def counted(number: Any) -> tuple[Any, Any]:
        logits = _float32(_logits(hiddens[:, number], whole))
        largest = ops.max(logits, axis=-1)
        total = ops.log(ops.sum(ops.exp(logits - largest[..., None]), axis=-1))
        best = largest if columns is None else ops.max(logits[..., :columns], axis=-1)
        return _of_each(logits, answers[:, number]) - largest - total, best - largest - total

    shown = None if seen is None else _blocks(_float32(seen), tokens)  # (B, blocks, t)

    def of_block(nothing: Any, number: Any) -> tuple[Any, tuple[Any, Any]]:
        zeros = ops.zeros_like(answers[:, 0], "float32")
        return nothing, _where_seen(shown, number, lambda: counted(number), (zeros, zeros))

    _, found = _scan(of_block, ops.zeros(()), answers.shape[1], ("float32", "float32"))
    chosen, best = (_joined(blocks, targets) for blocks in found)
    return chosen, best


def weighted_losses(
    hidden: Any,
    kernel: Any,
    bias: Any,
    targets: Any,
    weights: Any,
    observed: Any,
    sequences: int = 128,
    seen: Any | None = None,
) -> Any:
    """Computes two weighted sums of the cross-entropy, of which the first has gradients.

    Args:
        hidden: (B, T, C), in the dtype of the matrix products; T is static.
        kernel: (V, C), in the dtype of the weights; V is static.
        bias: (V,).
        targets: int32 (B, T), the token that follows each position.
        weights: float32 (B, T), the weight of each position in the first sum.
        observed: float32 (B, T), its weight in the second sum, which has no gradients.
        sequences: About B, which TensorFlow may not know: it decides the size of a block.
        seen: bool (B, T), as for `log_probabilities`; elsewhere the weights are 0.

    Returns:
        The sums, float32 (2,), differentiable in hidden, kernel and bias.
    """

    @ops.custom_gradient
    def fused(hidden: Any, kernel: Any, bias: Any) -> Any:
        tokens, width = kernel.shape
        whole = _with_bias(ops.cast(kernel, hidden.dtype), bias)  # (V, C + 1)
        hiddens, answers, shares = (
            _blocks(x, tokens, sequences, hidden.dtype) for x in (hidden, targets, weights)
        )
        shown = None
        if seen is not None:
            shown = _blocks(_float32(seen), tokens, sequences, hidden.dtype)

        def of_block(d_whole: Any, number: Any) -> tuple[Any, tuple[Any, Any]]:
            nothing = ops.zeros_like(hiddens[:, 0], "float32"), ops.ones_like(shares[:, 0])
            return _where_seen(shown, number, lambda: counted(d_whole, number), (d_whole, nothing))

        def counted(d_whole: Any, number: Any) -> tuple[Any, tuple[Any, Any]]:
            piece, target, share = hiddens[:, number], answers[:, number], shares[:, number]
            probabilities = _softmax(_logits(piece, whole))  # (B, t, V)
            probability = _float32(_of_each(probabilities, target))
            flat = ops.reshape(ops.cast(probabilities, hidden.dtype), (-1, tokens))
            mean = ops.reshape(ops.matmul(flat, whole), (*ops.shape(target), width + 1))
            d_piece = _float32(mean) - _float32(ops.take(whole, target, axis=0))
            rows = ops.reshape(_weighted(piece, share), (-1, width + 1))
            products = ops.matmul(ops.transpose(flat), ops.cast(rows, hidden.dtype))
            found = d_piece[..., :width] * share[..., None], probability
            return d_whole + _float32(products), found

        # The one-hot part of the kernel's gradient scatters whole rows; each block adds its product
        # to them. This saves a pass over the logits.
        rows = ops.reshape(_weighted(hidden, weights), (-1, width + 1))
        d_rows = -ops.segment_sum(rows, ops.reshape(targets, (-1,)), tokens)  # (V, C + 1)
        dtypes = ("float32", "float32")
        d_whole, found = _scan(of_block, d_rows, answers.shape[1], dtypes)
        d_hidden, chosen = (_joined(blocks, targets) for blocks in found)
        d_kernel, d_bias = d_whole[:, :width], d_whole[:, width]
        losses = ops.cond(
            ops.min(chosen) > LEAST_PROBABILITY,
            lambda: -ops.log(chosen),
            lambda: -log_probabilities(hidden, kernel, bias, targets, seen=seen)[0],
        )
        sums = ops.stack([ops.sum(losses * weights), ops.sum(losses * observed)])

        def gradient(*args: Any, upstream: Any = None) -> Any:
            # Only Keras's PyTorch backend passes the upstream gradient by name.
            scale = (args[0] if upstream is None else upstream)[0]
            return (
                ops.cast(d_hidden * scale, hidden.dtype),
                ops.cast(d_kernel * scale, kernel.dtype),
                ops.cast(d_bias * scale, bias.dtype),
            )

        return sums, gradient

    return fused(hidden, kernel, bias)


def _where_seen(shown: Any, number: Any, compute: Callable[[], Any], nothing: Any) -> Any:
    """Computes a block if one of its positions is seen, (B, blocks, t); None: all are."""
    if shown is None:
        return compute()
    return ops.cond(ops.any(shown[:, number] > 0), compute, lambda: nothing)


def _blocks(x: Any, tokens: int, sequences: int = 128, dtype: Any = "float32") -> Any:
    """Splits (B, T, ...) into (B, blocks, t, ...) and fills the last block with zeros."""
    length, size = x.shape[1], 4 if keras.backend.standardize_dtype(dtype) == "float32" else 2
    count = -(-length // max(1, BLOCK_BYTES // (size * sequences * tokens)))
    positions = -(-length // count)
    rest = [(0, 0)] * len(x.shape[2:])
    x = ops.pad(x, [(0, 0), (0, count * positions - length), *rest])
    return ops.reshape(x, (-1, count, positions, *x.shape[2:]))


def _joined(blocks: Any, targets: Any) -> Any:
    """Joins (blocks, B, t, ...) to (B, T, ...) and drops what fills the last block."""
    blocks = ops.swapaxes(blocks, 0, 1)
    count, positions, *rest = blocks.shape[1:]
    return ops.reshape(blocks, (-1, count * positions, *rest))[:, : targets.shape[1]]


def _scan(step: Any, state: Any, blocks: int, dtypes: tuple[str, str]) -> tuple[Any, list[Any]]:
    """Does what `ops.scan` does, over the numbers of the blocks.

    On TensorFlow, the outputs of Keras 3.15's `ops.scan` must have the shape and dtype of the
    state. The loop finishes one block before it begins the next. A loop that Python unrolls would
    make a larger graph, which takes longer to build and 50 MB more (benchmarks/README.md).
    """
    if keras.backend.backend() != "tensorflow":
        return ops.scan(step, state, ops.arange(blocks))
    import tensorflow as tf

    def body(number: Any, state: Any, arrays: list[Any]) -> tuple[Any, Any, list[Any]]:
        state, found = step(state, number)
        written = [array.write(number, x) for array, x in zip(arrays, found, strict=True)]
        return number + 1, state, written

    begin = (0, state, [tf.TensorArray(dtype, blocks) for dtype in dtypes])
    _, state, arrays = tf.while_loop(
        lambda number, *_: number < blocks, body, begin, parallel_iterations=1
    )
    return state, [array.stack() for array in arrays]


def _float32(x: Any) -> Any:
    return ops.cast(x, "float32")


def _weighted(x: Any, weights: Any) -> Any:
    """Appends a 1 to each row and multiplies the row by its weight: float32 (..., C + 1)."""
    return _with_ones(_float32(x)) * weights[..., None]


def _with_ones(x: Any) -> Any:
    """Appends a 1 to each row: (..., C + 1)."""
    return ops.concatenate([x, ops.ones_like(x[..., :1])], axis=-1)


def _with_bias(kernel: Any, bias: Any) -> Any:
    """Appends the bias to the kernel as one more column, whose input is always 1: (V, C + 1).

    This saves a pass over the logits. It also saves memory: oneDNN packs twice as much of 256
    columns as of 257, and the packed copy stays in the heap of each thread (benchmarks/README.md).
    """
    return ops.concatenate([kernel, ops.cast(bias, kernel.dtype)[:, None]], axis=1)


def _logits(hidden: Any, whole: Any) -> Any:
    """Returns logits (B, t, V) for hidden states (B, t, C) and `_with_bias`'s matrix."""
    tokens, width = whole.shape
    # TensorFlow multiplies by a transposed matrix in place.
    found = ops.matmul(ops.reshape(_with_ones(hidden), (-1, width)), ops.transpose(whole))
    return ops.reshape(found, (-1, hidden.shape[1], tokens))


def _softmax(logits: Any) -> Any:
    """Computes a softmax in float32, in one pass over the logits with oneDNN.

    oneDNN's of bfloat16 rounds nothing but its results, which saves two passes. TensorFlow's
    own, and JAX's, would round each sum too.
    """
    tensorflow = keras.backend.backend() == "tensorflow"
    if tensorflow and os.environ.get(backend.ONEDNN) == "1":
        return ops.softmax(logits)
    return ops.softmax(_float32(logits))


def _of_each(values: Any, chosen: Any) -> Any:
    """Picks from (B, t, V) the value at each index (B, t)."""
    return ops.take_along_axis(values, chosen[..., None], axis=-1)[..., 0]

"""Next-token cross-entropy, fused with the projection to words.

The logits of a batch of 128 x 80 tokens over 20,000 words take 819 MB in float32, and the plain
loss passes over them several times.  Here a block of positions is projected, its loss and gradients
are taken, and its logits are dropped before the next, as in "Cut Your Losses in Large-Vocabulary
Language Models" (Wijmans et al., 2024, https://arxiv.org/abs/2411.09009) and Liger Kernel's chunked
loss.  The gradients are computed in the forward pass, so that nothing is projected twice.
Shapes: B sequences, T positions, C a hidden state's width, V words.
"""

from typing import Any

import keras
from keras import ops

BLOCK_LOGITS = 40_000  # of each sequence: 2 positions, 20 MB, in the published batch of 128
LEAST_CHANCE = 1e-30  # far above where float32 has fewer digits, or none


def token_losses(hidden: Any, kernel: Any, bias: Any, targets: Any) -> tuple[Any, Any]:
    """Cross-entropy of every position, for evaluation: it has no gradients of its own.

    Args:
        hidden: (B, T, C), in the dtype of the matrix products; T is static.
        kernel: (C, V), in the dtype of the weights; V is static.
        bias: (V,).
        targets: int32 (B, T), the index of the word that follows each position.

    Returns:
        Nats of each position, float32 (B, T), and whether no word was more probable, bool (B, T).
    """
    whole = _with_bias(ops.cast(kernel, hidden.dtype), bias)
    hiddens, answers = _blocks(hidden, kernel), _blocks(targets, kernel)

    def of_block(nothing: Any, number: Any) -> tuple[Any, tuple[Any, Any]]:
        logits = _logits(hiddens[:, number], whole)
        largest = ops.max(logits, axis=-1)
        total = ops.sum(ops.exp(logits - largest[..., None]), axis=-1)
        chosen = _of_each(logits, answers[:, number])
        return nothing, (ops.log(total) + largest - chosen, ops.equal(chosen, largest))

    _, found = _scan(of_block, ops.zeros(()), answers.shape[1], ("float32", "bool"))
    losses, hits = (_joined(blocks, targets) for blocks in found)
    return losses, hits


def weighted_losses(
    hidden: Any, kernel: Any, bias: Any, targets: Any, weights: Any, observed: Any
) -> Any:
    """Two weighted sums of the cross-entropy, the first with its gradients.

    Args:
        hidden: (B, T, C), in the dtype of the matrix products; T is static.
        kernel: (C, V), in the dtype of the weights; V is static.
        bias: (V,).
        targets: int32 (B, T), the index of the word that follows each position.
        weights: float32 (B, T), what each position counts for in the first sum.
        observed: float32 (B, T), likewise in the second, which passes no gradient on.

    Returns:
        float32 (2,): the sums.  Differentiable in hidden, kernel and bias.
    """

    @ops.custom_gradient
    def fused(hidden: Any, kernel: Any, bias: Any) -> Any:
        width, words = kernel.shape
        # One copy for both products: TensorFlow multiplies by a transposed matrix as it lies.
        whole = ops.transpose(_with_bias(ops.cast(kernel, hidden.dtype), bias))  # (V, C + 1)
        hiddens, answers, shares = (_blocks(x, kernel) for x in (hidden, targets, weights))

        def of_block(d_whole: Any, number: Any) -> tuple[Any, tuple[Any, Any]]:
            piece, target, share = hiddens[:, number], answers[:, number], shares[:, number]
            # Of all that softmax is made of, oneDNN makes one pass over the logits.
            probabilities = ops.softmax(_logits(piece, ops.transpose(whole)))  # (B, t, V)
            chance = _of_each(probabilities, target)
            flat = ops.reshape(ops.cast(probabilities, hidden.dtype), (-1, words))
            mean = ops.reshape(ops.matmul(flat, whole), (*ops.shape(target), width + 1))
            d_piece = _float32(mean) - _float32(ops.take(whole, target, axis=0))
            rows = ops.cast(_weighted(piece, share), hidden.dtype)
            products = ops.matmul(ops.transpose(ops.reshape(rows, (-1, width + 1))), flat)
            found = d_piece[..., :width] * share[..., None], chance
            return d_whole + _float32(products), found

        # The one-hot half of the kernel's gradient is a scatter of whole rows, to which each
        # block's product is added: it spares a pass over the logits.
        rows = ops.reshape(_weighted(hidden, weights), (-1, width + 1))
        d_rows = -ops.segment_sum(rows, ops.reshape(targets, (-1,)), words)  # (V, C + 1)
        dtypes = ("float32", "float32")
        d_whole, found = _scan(of_block, ops.transpose(d_rows), answers.shape[1], dtypes)
        d_hidden, chances = (_joined(blocks, targets) for blocks in found)
        d_kernel, d_bias = d_whole[:width], d_whole[width]
        losses = ops.cond(
            ops.min(chances) > LEAST_CHANCE,
            lambda: -ops.log(chances),
            lambda: token_losses(hidden, kernel, bias, targets)[0],
        )
        sums = ops.stack([ops.sum(losses * weights), ops.sum(losses * observed)])

        def gradient(*args: Any, upstream: Any = None) -> Any:
            # Keras's PyTorch backend names the upstream gradient, the others pass it alone.
            scale = (args[0] if upstream is None else upstream)[0]
            return (
                ops.cast(d_hidden * scale, hidden.dtype),
                ops.cast(d_kernel * scale, kernel.dtype),
                ops.cast(d_bias * scale, bias.dtype),
            )

        return sums, gradient

    return fused(hidden, kernel, bias)


def _blocks(x: Any, kernel: Any) -> Any:
    """(B, T, ...) as (B, blocks, t, ...), the last block filled up with zeros."""
    length = x.shape[1]
    count = -(-length // max(1, BLOCK_LOGITS // kernel.shape[1]))
    positions = -(-length // count)
    rest = [(0, 0)] * len(x.shape[2:])
    x = ops.pad(x, [(0, 0), (0, count * positions - length), *rest])
    return ops.reshape(x, (-1, count, positions, *x.shape[2:]))


def _joined(blocks: Any, targets: Any) -> Any:
    """(blocks, B, t, ...) as (B, T, ...), without what filled up the last block."""
    blocks = ops.swapaxes(blocks, 0, 1)
    count, positions, *rest = blocks.shape[1:]
    return ops.reshape(blocks, (-1, count * positions, *rest))[:, : targets.shape[1]]


def _scan(step: Any, state: Any, blocks: int, dtypes: tuple[str, str]) -> tuple[Any, list[Any]]:
    """What `ops.scan` does over the numbers of the blocks.

    On TensorFlow Keras's (3.15) returns outputs only of the state's own shape and dtype.  One block
    is done before the next begins; and unlike a loop that Python unrolls, the graph of a step stays
    small: it is made sooner, and takes 50 MB less (benchmarks/README.md).
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
    """float32 (..., C + 1): each row with a 1 after it, times its weight."""
    return _with_ones(_float32(x)) * weights[..., None]


def _with_ones(x: Any) -> Any:
    """(..., C + 1): a 1 after each row."""
    return ops.concatenate([x, ops.ones_like(x[..., :1])], axis=-1)


def _with_bias(kernel: Any, bias: Any) -> Any:
    """(C + 1, V): the bias as one more row of the kernel, whose input is always 1.

    It spares a pass over the logits, and 100 MB: what oneDNN packs of 256 rows is twice what it
    packs of 257, and stays behind in the heap of each thread (benchmarks/README.md).
    """
    return ops.concatenate([kernel, ops.cast(bias, kernel.dtype)[None]])


def _logits(hidden: Any, whole: Any) -> Any:
    """float32 (B, t, V), of hidden states (B, t, C) and what `_with_bias` made."""
    flat = ops.reshape(_with_ones(hidden), (-1, whole.shape[0]))
    logits = ops.cast(ops.matmul(flat, whole), "float32")
    return ops.reshape(logits, (-1, hidden.shape[1], whole.shape[1]))


def _of_each(values: Any, chosen: Any) -> Any:
    """Of (B, t, V) the one at each index (B, t)."""
    return ops.take_along_axis(values, chosen[..., None], axis=-1)[..., 0]

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

BLOCK_LOGITS = 80_000  # of each sequence: 4 positions, 41 MB, in the published batch of 128
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
    losses: list[Any] = []
    hits: list[Any] = []
    for at in _blocks(hidden, kernel):
        logits = _logits(_after(losses, hidden[:, at]), whole)
        largest = ops.max(logits, axis=-1)
        total = ops.sum(ops.exp(logits - largest[..., None]), axis=-1)
        chosen = _of_each(logits, targets[:, at])
        losses.append(ops.log(total) + largest - chosen)
        hits.append(ops.equal(chosen, largest))
    return ops.concatenate(losses, axis=1), ops.concatenate(hits, axis=1)


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
        narrow = ops.cast(kernel, hidden.dtype)
        whole, backwards = _with_bias(narrow, bias), ops.transpose(narrow)
        chances: list[Any] = []
        d_hidden: list[Any] = []
        # The one-hot half of the gradient is a scatter of whole rows, apart from the blocks: it
        # spares a pass over their logits.
        rows = _with_ones(ops.cast(hidden, "float32")) * weights[..., None]  # (B, T, C + 1)
        flat_targets = ops.reshape(targets, (-1,))
        d_rows = ops.segment_sum(ops.reshape(rows, (-1, width + 1)), flat_targets, words)
        # Its negative, from which the blocks are subtracted: TensorFlow rewrites a chain of
        # additions, and the last bits of the sum were others in each process.
        against_kernel = ops.transpose(d_rows)  # (C + 1, V)
        for at in _blocks(hidden, kernel):
            piece = _after([*d_hidden[-1:], against_kernel], hidden[:, at])
            # Of all that softmax is made of, oneDNN makes one pass over the logits.
            probabilities = ops.softmax(_logits(piece, whole))  # (B, t, V)
            chances.append(_of_each(probabilities, targets[:, at]))
            probabilities = ops.cast(probabilities, hidden.dtype)
            d_hidden.append(ops.cast(ops.matmul(probabilities, backwards), "float32"))
            columns = ops.transpose(ops.reshape(rows[:, at], (-1, width + 1)))
            flat = ops.reshape(probabilities, (-1, words))
            products = ops.matmul(ops.cast(columns, hidden.dtype), flat)
            against_kernel = against_kernel - ops.cast(products, "float32")
        chosen = ops.cast(ops.take(backwards, targets, axis=0), "float32")  # (B, T, C)
        d_hidden = (ops.concatenate(d_hidden, axis=1) - chosen) * weights[..., None]
        d_kernel, d_bias = -against_kernel[:-1], -against_kernel[-1]
        chances = ops.concatenate(chances, axis=1)
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


def _blocks(hidden: Any, kernel: Any) -> list[slice]:
    positions = max(1, BLOCK_LOGITS // kernel.shape[1])
    starts = range(0, hidden.shape[1], positions)
    return [slice(start, start + positions) for start in starts]


def _after(done: list[Any], x: Any) -> Any:
    """x, for TensorFlow only once the others are computed.

    Nothing else keeps it from projecting all blocks before it takes the gradients of the first.
    """
    if keras.backend.backend() != "tensorflow" or not done:
        return x
    import tensorflow as tf

    with tf.control_dependencies(done):
        return tf.identity(x)


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

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
    kernel = ops.cast(kernel, hidden.dtype)
    losses: list[Any] = []
    hits: list[Any] = []
    for at in _blocks(hidden, kernel):
        piece = _after(losses, hidden[:, at])
        loss, hit, *_ = _losses(piece, kernel, bias, targets[:, at])
        losses.append(loss)
        hits.append(hit)
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
        backwards = ops.transpose(narrow)
        losses: list[Any] = []
        d_hidden: list[Any] = []
        # The one-hot half of the gradient is a scatter of whole rows, apart from the blocks: it
        # spares a pass over their logits.  The bias is one more row of the kernel here, whose
        # input is always 1.
        rows = _with_ones(ops.cast(hidden, "float32")) * weights[..., None]  # (B, T, C + 1)
        flat_targets = ops.reshape(targets, (-1,))
        d_rows = ops.segment_sum(ops.reshape(rows, (-1, width + 1)), flat_targets, words)
        # Its negative, from which the blocks are subtracted: TensorFlow rewrites a chain of
        # additions, and the last bits of the sum were others in each process.
        against_kernel = ops.transpose(d_rows)  # (C + 1, V)
        for at in _blocks(hidden, kernel):
            piece = _after([*d_hidden[-1:], against_kernel], hidden[:, at])
            loss, _, exponentials, total = _losses(piece, narrow, bias, targets[:, at])
            losses.append(loss)
            # Softmax divides by the total, here the few rows of the products instead of all logits.
            exponentials = ops.cast(exponentials, hidden.dtype)  # (B, t, V)
            products = ops.cast(ops.matmul(exponentials, backwards), "float32")
            d_hidden.append(products * (weights[:, at, None] / total))
            columns = ops.reshape(rows[:, at] / total, (-1, width + 1))
            columns = ops.transpose(ops.cast(columns, hidden.dtype))
            products = ops.matmul(columns, ops.reshape(exponentials, (-1, words)))
            against_kernel = against_kernel - ops.cast(products, "float32")
        chosen = ops.cast(ops.take(backwards, targets, axis=0), "float32")  # (B, T, C)
        d_hidden = ops.concatenate(d_hidden, axis=1) - chosen * weights[..., None]
        d_kernel, d_bias = -against_kernel[:-1], -against_kernel[-1]
        losses = ops.concatenate(losses, axis=1)
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


def _losses(hidden: Any, kernel: Any, bias: Any, targets: Any) -> tuple[Any, Any, Any, Any]:
    """Nats and hits (B, t), the shifted exponentials of the logits (B, t, V), and their sums."""
    logits = ops.cast(ops.matmul(hidden, kernel), "float32") + ops.cast(bias, "float32")
    shift = ops.max(logits, axis=-1, keepdims=True)
    chosen = ops.take_along_axis(logits, targets[..., None], axis=-1)
    exponentials = ops.exp(logits - shift)
    total = ops.sum(exponentials, axis=-1, keepdims=True)  # (B, t, 1)
    nats, hits = ops.log(total) + shift - chosen, ops.equal(chosen, shift)
    return nats[..., 0], hits[..., 0], exponentials, total

"""Next-token cross-entropy, fused with the projection to words.

The logits of a batch of 128 x 80 tokens over 20,000 words take 819 MB in float32, and the plain
loss passes over them several times.  Here a block of positions is projected, its loss and gradients
are taken, and its logits are dropped before the next, as in "Cut Your Losses in Large-Vocabulary
Language Models" (Wijmans et al., 2024, https://arxiv.org/abs/2411.09009) and Liger Kernel's chunked
loss.  The gradients are computed in the forward pass, so that nothing is projected twice.
Shapes: B sequences, T positions, C a hidden state's width, V words.
"""

from typing import Any

from keras import ops

BLOCK_POSITIONS = 8  # of all sequences: 1,024 tokens, 82 MB of logits, in the published batch


def token_losses(hidden: Any, kernel: Any, bias: Any, targets: Any) -> Any:
    """Cross-entropy of every position, for evaluation: it has no gradients of its own.

    Args:
        hidden: (B, T, C), in the dtype of the matrix products; T is static.
        kernel: (C, V), in the dtype of the weights.
        bias: (V,).
        targets: int32 (B, T), the index of the word that follows each position.

    Returns:
        Nats of each position, float32 (B, T).
    """
    kernel = ops.cast(kernel, hidden.dtype)
    return ops.concatenate(
        [_losses(hidden[:, at], kernel, bias, targets[:, at])[0] for at in _blocks(hidden)], axis=1
    )


def weighted_losses(
    hidden: Any, kernel: Any, bias: Any, targets: Any, weights: Any, observed: Any
) -> Any:
    """Two weighted sums of the cross-entropy, the first with its gradients.

    Args:
        hidden: (B, T, C), in the dtype of the matrix products; T is static.
        kernel: (C, V), in the dtype of the weights.
        bias: (V,).
        targets: int32 (B, T), the index of the word that follows each position.
        weights: float32 (B, T), what each position counts for in the first sum.
        observed: float32 (B, T), likewise in the second, which passes no gradient on.

    Returns:
        float32 (2,): the sums.  Differentiable in hidden, kernel and bias.
    """

    @ops.custom_gradient
    def fused(hidden: Any, kernel: Any, bias: Any) -> Any:
        words = ops.shape(kernel)[1]
        narrow = ops.cast(kernel, hidden.dtype)
        losses, d_hidden = [], []
        # The one-hot half of the gradient is a scatter of whole rows, apart from the blocks: it
        # spares a pass over their logits.
        flat_targets = ops.reshape(targets, (-1,))
        weighted = ops.cast(hidden, "float32") * weights[..., None]
        flat_weighted = ops.reshape(weighted, (-1, hidden.shape[-1]))
        d_kernel = -ops.transpose(ops.segment_sum(flat_weighted, flat_targets, words))
        d_bias = -ops.segment_sum(ops.reshape(weights, (-1,)), flat_targets, words)
        for at in _blocks(hidden):
            block, weight = hidden[:, at], weights[:, at, None]
            loss, exponentials, total = _losses(block, narrow, bias, targets[:, at])
            losses.append(loss)
            d_logits = exponentials * (weight / total)  # (B, t, V)
            d_bias = d_bias + ops.sum(d_logits, axis=(0, 1))
            d_logits = ops.cast(d_logits, hidden.dtype)
            d_hidden.append(ops.matmul(d_logits, ops.transpose(narrow)))
            flat = ops.reshape(d_logits, (-1, ops.shape(d_logits)[-1]))
            columns = ops.transpose(ops.reshape(block, (-1, block.shape[-1])))
            d_kernel = d_kernel + ops.cast(ops.matmul(columns, flat), "float32")
        chosen = ops.take(ops.transpose(narrow), targets, axis=0)  # (B, T, C)
        d_hidden = ops.concatenate(d_hidden, axis=1) - chosen * ops.cast(
            weights[..., None], hidden.dtype
        )
        losses = ops.concatenate(losses, axis=1)
        sums = ops.stack([ops.sum(losses * weights), ops.sum(losses * observed)])

        def gradient(*args: Any, upstream: Any = None) -> Any:
            # Keras's PyTorch backend names the upstream gradient, the others pass it alone.
            scale = (args[0] if upstream is None else upstream)[0]
            return (
                d_hidden * ops.cast(scale, d_hidden.dtype),
                ops.cast(d_kernel * scale, kernel.dtype),
                ops.cast(d_bias * scale, bias.dtype),
            )

        return sums, gradient

    return fused(hidden, kernel, bias)


def _blocks(hidden: Any) -> list[slice]:
    starts = range(0, hidden.shape[1], BLOCK_POSITIONS)
    return [slice(start, start + BLOCK_POSITIONS) for start in starts]


def _losses(hidden: Any, kernel: Any, bias: Any, targets: Any) -> tuple[Any, Any, Any]:
    """Nats (B, t), the shifted exponentials of the logits (B, t, V), and their sums (B, t, 1)."""
    logits = ops.cast(ops.matmul(hidden, kernel), "float32") + ops.cast(bias, "float32")
    shift = ops.max(logits, axis=-1, keepdims=True)
    chosen = ops.take_along_axis(logits, targets[..., None], axis=-1)
    exponentials = ops.exp(logits - shift)
    total = ops.sum(exponentials, axis=-1, keepdims=True)
    return (ops.log(total) + shift - chosen)[..., 0], exponentials, total

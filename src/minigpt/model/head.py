"""The projection of hidden states to tokens: one softmax, or an adaptive one.

The adaptive softmax of Grave et al. (2017, https://arxiv.org/abs/1609.04309) predicts a frequent
token, or the tail, whose rare tokens share its probability. Only positions whose target is rare
need the logits of the tail, and a rare token has fewer weights. The distribution is exact, and
sums up to 1 over all tokens.

Shapes: B sequences, T positions, C width of a hidden state, V tokens, of which F are frequent and R
rare, E width of a rare token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from minigpt.model import loss


class Tail(NamedTuple):
    """The rare tokens.

    Attributes:
        narrow: (C, E), which narrows hidden states.
        kernel: (R, E).
        bias: (R,).
    """

    narrow: Any
    kernel: Any
    bias: Any


class Head(NamedTuple):
    """The weights of the projection.

    Attributes:
        kernel: (V, C); with a tail (F + 1, C), whose last row is the tail's.
        bias: (V,) or (F + 1,).
        tail: The tokens from F on; None: there are none.
    """

    kernel: Any
    bias: Any
    tail: Tail | None = None

    @property
    def frequent(self) -> int:
        """F, or V without a tail."""
        return int(self.bias.shape[0]) - bool(self.tail)

    def cast(self, dtype: Any) -> "Head":
        """Returns kernels in a dtype, and biases in float32, which many projections can share."""
        tail = self.tail
        if tail:
            narrow, kernel = (ops.cast(x, dtype) for x in tail[:2])
            tail = Tail(narrow, kernel, ops.cast(tail.bias, "float32"))
        return Head(ops.cast(self.kernel, dtype), ops.cast(self.bias, "float32"), tail)


def logits(hidden: Any, head: Head) -> Any:
    """Returns logits, float32 (..., V), for hidden states (..., C)."""
    kernel, bias, tail = head.cast(hidden.dtype)
    found = ops.cast(ops.matmul(hidden, ops.transpose(kernel)), "float32") + bias
    if tail is None:
        return found
    rare = ops.matmul(ops.matmul(hidden, tail.narrow), ops.transpose(tail.kernel))
    rare = ops.cast(rare, "float32") + tail.bias
    shared = found[..., -1:] - ops.logsumexp(rare, axis=-1, keepdims=True)
    return ops.concatenate([found[..., :-1], rare + shared], axis=-1)


def token_losses(hidden: Any, head: Head, targets: Any) -> tuple[Any, Any]:
    """Computes the cross-entropy of every position, for evaluation.

    Args:
        hidden: (B, T, C), in the dtype of the matrix products; T is static.
        head: The projection.
        targets: int32 (B, T), the token that follows each position.

    Returns:
        Nats of each position, float32 (B, T), and whether no token was more probable than the
        target, bool (B, T).
    """
    kernel, bias, tail = head
    if tail is None:
        return loss.token_losses(hidden, kernel, bias, targets)
    is_rare, answers = targets >= head.frequent, ops.minimum(targets, head.frequent)
    first, best = loss.log_probabilities(hidden, kernel, bias, answers, head.frequent)
    every = ops.full_like(answers, head.frequent)
    shared, _ = loss.log_probabilities(hidden, kernel, bias, every)
    # Elsewhere no rare token is the target or the most probable one.
    seen = is_rare | (shared > best)
    ordered, restored = _first_columns(seen)
    narrowed = ordered(ops.matmul(hidden, ops.cast(tail.narrow, hidden.dtype)))  # (B, T, E)
    answers = ordered(ops.maximum(targets - head.frequent, 0))
    found = loss.log_probabilities(narrowed, *tail[1:], answers, seen=ordered(seen))
    rare, best_rare = (shared + restored(x) for x in found)
    chosen = ops.where(is_rare, rare, first)
    return -chosen, chosen >= ops.where(seen, ops.maximum(best, best_rare), best)


def _first_columns(chosen: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Returns what moves chosen positions, bool (B, T), into the first columns, and what undoes it.

    Whole blocks of columns then have none of them, and are passed over.
    """
    length = chosen.shape[1]
    order = ops.argsort(ops.cast(ops.reshape(~chosen, (-1,)), "int32"))
    there = ops.transpose(ops.reshape(order, (length, -1)))  # (B, T)
    back = ops.reshape(ops.argsort(order), (-1, length))

    def ordered(x: Any) -> Any:
        return ops.take(ops.reshape(x, (-1, *x.shape[2:])), there, axis=0)

    def restored(x: Any) -> Any:
        return ops.take(ops.reshape(ops.transpose(x), (-1,)), back)

    return ordered, restored


def weighted_losses(
    hidden: Any, head: Head, targets: Any, weights: Any, observed: Any, sequences: int
) -> Any:
    """Computes two weighted sums of the cross-entropy, of which the first has gradients.

    Args:
        hidden: (B, T, C), in the dtype of the matrix products; T is static.
        head: The projection.
        targets: int32 (B, T), the token that follows each position.
        weights: float32 (B, T), the weight of each position in the first sum.
        observed: float32 (B, T), its weight in the second sum, which has no gradients.
        sequences: About B, which TensorFlow may not know: it decides the size of a block.

    Returns:
        The sums, float32 (2,), differentiable in hidden and the head.
    """
    kernel, bias, tail = head
    if tail is None:
        return loss.weighted_losses(hidden, kernel, bias, targets, weights, observed, sequences)
    is_rare = targets >= head.frequent
    answers = ops.minimum(targets, head.frequent)
    sums = loss.weighted_losses(hidden, kernel, bias, answers, weights, observed, sequences)
    ordered, _ = _first_columns(is_rare)
    narrowed = ordered(ops.matmul(hidden, ops.cast(tail.narrow, hidden.dtype)))  # (B, T, E)
    rare = ordered(ops.maximum(targets - head.frequent, 0))
    weights, observed = (ordered(x * ops.cast(is_rare, x.dtype)) for x in (weights, observed))
    return sums + loss.weighted_losses(
        narrowed, tail.kernel, tail.bias, rare, weights, observed, sequences, ordered(is_rare)
    )

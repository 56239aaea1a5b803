"""A transformer block: causal self-attention and a feed-forward layer.

Shapes: B sequences, T positions to read, K positions to attend to, H heads, D width of a head,
C width of a token.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import layers, ops

from minigpt.config import ModelConfig

Cache = tuple[Any, Any]  # the keys and values of one block, (B, H, K, D) each
Rotary = tuple[Any, Any]  # cosines and sines of rotary positions


def attend(query: Any, keys: Any, values: Any, mask: Any) -> Any:
    """Computes scaled dot-product attention.

    Args:
        query: (B, H, T, D).
        keys: (B, H, K, D).
        values: (B, H, K, D).
        mask: Which positions each position may see; bool, broadcast to (B, H, T, K).

    Returns:
        The weighted means of the values, (B, H, T, D).
    """
    batch, _, length, width = query.shape
    query = query * width**-0.5
    # On TensorFlow the products of one position of one sequence take less time as sums, by a
    # twentieth of a token in the published size, by a seventh with four blocks and 2,000 tokens.
    single = batch == 1 and length == 1
    if single:
        scores = ops.sum(query * keys, axis=-1)[:, :, None]  # (B, H, 1, K)
    else:
        scores = ops.einsum("bhtd,bhkd->bhtk", query, keys)  # (B, H, T, K)
    # In float32 under every policy, like Keras's own Softmax.
    scores = ops.where(mask, ops.cast(scores, "float32"), -1e9)
    weights = ops.cast(ops.softmax(scores), values.dtype)
    if single:
        return ops.sum(ops.swapaxes(weights, 2, 3) * values, axis=2, keepdims=True)
    return ops.matmul(weights, values)


class Linear(layers.Layer):
    """A Dense layer whose kernel may have more than two dimensions.

    Keras's EinsumDense, which has such kernels, multiplies one sequence at a time on TensorFlow
    and adds up one gradient of the kernel per sequence. This one multiplies two matrices.

    Args:
        inputs: The shape of an input.
        outputs: The shape of an output.
    """

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        fans = {"input_axes": range(len(inputs)), "output_axes": range(-len(outputs), 0)}
        initial = keras.initializers.GlorotUniform(**fans)
        self.kernel = self.add_weight((*inputs, *outputs), initial, name="kernel")
        self.bias = self.add_weight(outputs, "zeros", name="bias")
        self.built = True

    @property
    def matrix(self) -> Any:
        """The kernel as a matrix (inputs, outputs), in the dtype of the products."""
        matrix = ops.reshape(self.kernel, (-1, math.prod(self.bias.shape)))
        return ops.cast(matrix, self.compute_dtype)

    def call(self, x: Any, matrix: Any) -> Any:
        """Returns (N, outputs) for (N, inputs) and `matrix`, which decoding makes only once."""
        return ops.matmul(x, matrix) + ops.reshape(self.bias, (-1,))


class Block(layers.Layer):
    """Causal self-attention and a feed-forward layer, each added to its input and normalised."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config, policy = config, self.dtype_policy
        width, inner = (config.embed_dim,), (config.feed_forward_dim,)
        heads: tuple[int, ...] = config.num_heads, config.key_dim
        if config.kernels == "matrices":
            heads = (math.prod(heads),)
        norm, drop = {"epsilon": 1e-6, "dtype": policy}, {"rate": config.dropout, "dtype": policy}
        with keras.name_scope(self.name):
            self.query = Linear(width, heads, dtype=policy, name="query")
            self.key = Linear(width, heads, dtype=policy, name="key")
            self.value = Linear(width, heads, dtype=policy, name="value")
            self.attention_output = Linear(heads, width, dtype=policy, name="attention_output")
            self.expand = Linear(width, inner, dtype=policy, name="expand")
            self.contract = Linear(inner, width, dtype=policy, name="contract")
            self.attention_norm = layers.LayerNormalization(**norm, name="attention_norm")
            self.feed_forward_norm = layers.LayerNormalization(**norm, name="feed_forward_norm")
            self.attention_norm.build((None, *width))
            self.feed_forward_norm.build((None, *width))
        self.attention_dropout = layers.Dropout(**drop, name="attention_dropout")
        self.feed_forward_dropout = layers.Dropout(**drop, name="feed_forward_dropout")
        self.built = True

    def matrices(self) -> dict[str, Any]:
        """Returns the kernels as matrices in the dtype of the products, by the layers' names."""
        linear = (self.query, self.key, self.value, self.attention_output)
        return {layer.name: layer.matrix for layer in (*linear, self.expand, self.contract)}

    def call(
        self,
        x: Any,
        mask: Any,
        rotary: Rotary | None = None,
        cache: Cache | None = None,
        columns: Any = None,
        matrices: dict[str, Any] | None = None,
        training: bool | None = None,
    ) -> tuple[Any, Cache]:
        """Attends and feeds forward.

        Args:
            x: (B * T, C).
            mask: Which positions each position may see; bool, broadcast to (B, H, T, K).
            rotary: The rotary positions; None: they are learned, and part of `x`.
            cache: Keys and values of earlier positions, for T = 1; None: there are none (K = T).
            columns: int32 (B,), the column of the cache that each sequence's position goes to.
            matrices: What the method `matrices` returned; None: made of the current weights.
            training: Whether dropout is on.

        Returns:
            (B * T, C), and the keys and values that were attended to.
        """
        matrices = matrices or self.matrices()
        length, heads, width = mask.shape[-2], self.config.num_heads, self.config.key_dim

        def project(layer: Linear) -> Any:
            projected = layer(x, matrices[layer.name])  # (B * T, H * D)
            return ops.swapaxes(ops.reshape(projected, (-1, length, heads, width)), 1, 2)

        def attended(query: Any, keys: Any, values: Any, matrix: Any) -> Any:
            x = ops.swapaxes(attend(query, keys, values, mask), 1, 2)  # (B, T, H, D)
            return self.attention_output(ops.reshape(x, (-1, heads * width)), matrix)

        query, keys, values = map(project, (self.query, self.key, self.value))  # (B, H, T, D)
        if rotary is not None:
            query, keys = rotate(query, rotary), rotate(keys, rotary)
        if cache is not None:  # (B, H, K, D)
            keys, values = _put(cache[0], columns, keys), _put(cache[1], columns, values)
        once = _recomputed if training else lambda function: function
        more = once(attended)(query, keys, values, matrices["attention_output"])  # (B * T, C)
        x = once(self.attention_norm)(x + self.attention_dropout(more, training=training))
        more = ops.relu(self.expand(x, matrices["expand"]))
        more = self.contract(more, matrices["contract"])  # (B * T, C)
        more = self.feed_forward_dropout(more, training=training)
        return once(self.feed_forward_norm)(x + more), (keys, values)


def rotate(x: Any, rotary: Rotary) -> Any:
    """Turns component i of a head with component i + D / 2 by an angle that the position decides.

    The product of a query and a key then depends on their distance alone (Su et al., 2021,
    https://arxiv.org/abs/2104.09864).

    Args:
        x: Queries or keys, (B, H, T, D).
        rotary: What `MiniGPT.rotary` returned.
    """
    first, second = ops.split(x, 2, axis=-1)
    return x * rotary[0] + ops.concatenate([second, first], axis=-1) * rotary[1]


def _put(cache: Any, columns: Any, new: Any) -> Any:
    """Replaces a column of each row of a cache (B, H, K, D) by keys or values (B, H, 1, D)."""
    batch, heads, room, width = cache.shape
    rows = ops.reshape(ops.arange(batch * heads, dtype="int32") * room, (batch, heads))
    rows = ops.reshape(rows + columns[:, None], (-1, 1))
    flat, new = ops.reshape(cache, (-1, width)), ops.reshape(new, (-1, width))
    return ops.reshape(ops.scatter_update(flat, rows, new), cache.shape)


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that the backward pass computes again, to save memory.

    Gradient checkpointing (Chen et al., 2016, https://arxiv.org/abs/1604.06174), for cheap
    functions without dropout, which would draw other numbers. The function is new each time: JAX
    keeps what it has traced of one, and that does not outlive the trace.
    """
    return keras.remat(lambda *args: function(*args))

"""The miniature GPT: embeddings, causal transformer blocks, a head over words.

The model of https://keras.io/examples/generative/text_generation_with_miniature_gpt/ with its
post-normalised block (Vaswani et al., 2017) and initialisers, and with learned or rotary positions.
It is written in keras.ops, so it runs on every Keras backend. One forward pass, `MiniGPT.read`,
serves training, prefill and cached decoding.

A sequence begins in column 0 and is filled up on the right, which changes nothing before. With
rotary positions it may be longer than the context: a position then sees itself and the
context_length - 1 positions before it (sliding window attention, Beltagy et al., 2020,
https://arxiv.org/abs/2004.05150).

Shapes: B sequences, T positions to read, K positions to attend to, H heads, D width of a head,
C width of a token, V words.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from minigpt.config import ModelConfig

Cache = tuple[Any, Any]  # the keys and values of one block, (B, H, K, D) each
Turn = tuple[Any, Any]  # cosines and sines of rotary positions

ROTARY_BASE = 10_000.0  # the longest wave has some 6 times as many positions (Su et al., 2021)


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
    # twentieth of a token in the published size, by a seventh with four blocks and 2,000 words.
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
        turn: Turn | None = None,
        cache: Cache | None = None,
        columns: Any = None,
        matrices: dict[str, Any] | None = None,
        training: bool | None = None,
    ) -> tuple[Any, Cache]:
        """Attends and feeds forward.

        Args:
            x: (B * T, C).
            mask: Which positions each position may see; bool, broadcast to (B, H, T, K).
            turn: The rotary positions; None: they are learned, and part of `x`.
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
        if turn is not None:
            query, keys = rotate(query, turn), rotate(keys, turn)
        if cache is not None:  # (B, H, K, D)
            keys, values = _put(cache[0], columns, keys), _put(cache[1], columns, values)
        once = _recomputed if training else lambda function: function
        more = once(attended)(query, keys, values, matrices["attention_output"])  # (B * T, C)
        x = once(self.attention_norm)(x + self.attention_dropout(more, training=training))
        more = ops.relu(self.expand(x, matrices["expand"]))
        more = self.contract(more, matrices["contract"])  # (B * T, C)
        more = self.feed_forward_dropout(more, training=training)
        return once(self.feed_forward_norm)(x + more), (keys, values)


@keras.saving.register_keras_serializable("minigpt")
class MiniGPT(keras.Model):
    """Turns token ids into the logits of each position's next token.

    Args:
        config: The sizes, with a vocabulary_size of at least 1, and the dtype policy, which is not
            "auto".
        name: The model's name.
    """

    def __init__(self, config: ModelConfig, name: str = "minigpt") -> None:
        super().__init__(name=name, dtype=config.dtype_policy)
        self.config, policy = config, self.dtype_policy
        words, width = config.vocabulary_size, config.embed_dim
        # In float32 under every policy: mixed precision would cast a whole table whenever a few of
        # its rows are taken, and add up the gradients of a frequent word in bfloat16.
        table = {"output_dim": width, "dtype": "float32"}
        self.token_embedding = layers.Embedding(words, **table, name="token_embedding")
        self.token_embedding.build()
        if config.positions == "learned":
            self.position_embedding = layers.Embedding(
                config.context_length, **table, name="position_embedding"
            )
            self.position_embedding.build()
        self.blocks = [
            Block(config, dtype=policy, name=f"block_{number}")
            for number in range(config.num_blocks)
        ]
        if not config.tied_embeddings:
            self.head_kernel = self.add_weight((width, words), "glorot_uniform", name="head_kernel")
        self.head_bias = self.add_weight((words,), "zeros", name="head_bias")
        self.built = True

    @property
    def head(self) -> tuple[Any, Any]:
        """The projection to words: kernel (C, V) and bias (V,)."""
        if self.config.tied_embeddings:  # Press and Wolf, 2017
            kernel = ops.transpose(self.token_embedding.embeddings)
        else:
            kernel = ops.convert_to_tensor(self.head_kernel)
        return kernel, ops.convert_to_tensor(self.head_bias)

    def call(self, tokens: Any, training: bool | None = None) -> Any:
        """Returns logits, float32 (B, T, V), for token ids, int32 (B, T)."""
        return self.project(self.hidden(tokens, training=training))

    def hidden(self, tokens: Any, training: bool | None = None) -> Any:
        """Returns the last block's output, (B, T, C), for token ids, int32 (B, T)."""
        return self.read(tokens, training=training)[0]

    def read(
        self,
        tokens: Any,
        cache: list[Cache] | None = None,
        positions: Any = None,
        matrices: list[dict[str, Any]] | None = None,
        training: bool | None = None,
    ) -> tuple[Any, list[Cache]]:
        """Runs the blocks over whole sequences, or over one more token of each.

        Args:
            tokens: int32 (B, T); T = 1 with a cache.
            cache: The keys and values of each block, a ring (see `ring`) with room for this token;
                None: the sequences begin here.
            positions: int32 (B,), the position of each token; only with a cache.
            matrices: What each `Block.matrices` returned; None: made of the current weights.
            training: Whether dropout is on.

        Returns:
            The last block's output, (B, T, C), and the keys and values of each block: those of the
            T positions, or the cache with this token.

        Raises:
            ValueError: The sequences are longer than the context, and positions are learned.
        """
        length, context = tokens.shape[1], self.config.context_length
        columns = None
        if cache is None:
            positions = ops.arange(length, dtype="int32")  # (T,)
            back = positions[:, None] - positions
            mask = back >= 0  # (T, T)
            if length > context:
                mask = mask & (back < context)
        else:
            room = cache[0][0].shape[2]
            mask = ops.arange(room, dtype="int32") <= positions[:, None, None, None]  # (B, 1, 1, K)
            columns, positions = positions % room, positions[:, None]  # (B,), (B, 1)
        x = ops.reshape(self.embed(tokens, positions), (-1, self.config.embed_dim))  # (B * T, C)
        turn, read = self.turn(positions), []
        for number, block in enumerate(self.blocks):
            given = {"cache": cache and cache[number], "matrices": matrices and matrices[number]}
            x, kept = block(x, mask, turn, columns=columns, training=training, **given)
            read.append(kept)
        return ops.reshape(x, (-1, length, self.config.embed_dim)), read

    def embed(self, tokens: Any, positions: Any) -> Any:
        """Returns the embeddings of tokens, plus those of their positions if they are learned."""
        x = self.token_embedding(tokens)
        if self.config.positions == "learned":
            if tokens.shape[1] > self.config.context_length:
                raise ValueError(f"{tokens.shape[1]} tokens, with positions for fewer")
            x = x + self.position_embedding(positions)
        return ops.cast(x, self.compute_dtype)

    def turn(self, positions: Any) -> Turn | None:
        """Returns by which angles `rotate` turns the pairs of a head's components.

        Args:
            positions: int32 (T,) or (B, 1).

        Returns:
            The cosines and sines, (1, T, D) or (B, 1, 1, D); None if positions are learned.
        """
        if self.config.positions == "learned":
            return None
        half = self.config.key_dim // 2
        rates = ROTARY_BASE ** -(np.arange(half) / half)
        angles = ops.cast(positions, "float32")[..., None] * rates.astype("float32")
        cosines, sines = ops.cos(angles), ops.sin(angles)
        both = ops.concatenate([cosines, cosines], -1), ops.concatenate([-sines, sines], -1)
        cosines, sines = (ops.cast(x, self.compute_dtype) for x in both)
        return ops.expand_dims(cosines, -3), ops.expand_dims(sines, -3)

    def project(self, hidden: Any) -> Any:
        """Returns logits, float32 (..., V), for hidden states (..., C)."""
        kernel, bias = self.head
        logits = ops.matmul(hidden, ops.cast(kernel, hidden.dtype))
        return ops.cast(logits, "float32") + ops.cast(bias, "float32")

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of `from_config`."""
        return {"name": self.name, "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "MiniGPT":
        """Makes a model with new weights."""
        return cls(ModelConfig.model_validate(config["config"]), config["name"])


def rotate(x: Any, turn: Turn) -> Any:
    """Turns component i of a head with component i + D / 2 by an angle that the position decides.

    The product of a query and a key then depends on their distance alone (Su et al., 2021,
    https://arxiv.org/abs/2104.09864).

    Args:
        x: Queries or keys, (B, H, T, D).
        turn: What `MiniGPT.turn` returned.
    """
    first, second = ops.split(x, 2, axis=-1)
    return x * turn[0] + ops.concatenate([second, first], axis=-1) * turn[1]


def ring(kept: list[Cache], lengths: Any, columns: int) -> list[Cache]:
    """Arranges the keys and values of whole sequences as the ring that decoding goes on with.

    Position p stands in column p % K, so that a new position replaces the one that leaves the
    window. A row of a ring depends on its own sequence alone: it may replace a row of another
    ring with as many columns.

    Args:
        kept: Of each block, (B, H, T, D), as `MiniGPT.read` returned them.
        lengths: int32 (B,), the tokens of each sequence, 1 to T; what follows them is left out.
        columns: K: context_length, or fewer if no sequence becomes longer than K.

    Returns:
        Of each block, (B, H, K, D). Columns that no position has reached hold anything.
    """
    batch, heads, length, width = kept[0][0].shape
    last = lengths[:, None, None] - 1
    column = ops.arange(columns, dtype="int32")
    position = ops.maximum(last - (last - column) % columns, 0)  # (B, 1, K)
    rows = ops.reshape(ops.arange(batch * heads, dtype="int32") * length, (batch, heads, 1))

    def arranged(x: Any) -> Any:
        flat = ops.reshape(x, (-1, width))
        return ops.take(flat, rows + position, axis=0)  # (B, H, K, D)

    return [(arranged(keys), arranged(values)) for keys, values in kept]


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

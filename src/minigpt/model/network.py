"""The miniature GPT: token and position embeddings, causal transformer blocks, a head over words.

The model of https://keras.io/examples/generative/text_generation_with_miniature_gpt/ with its
post-normalised block (Vaswani et al., 2017) and initialisers. It is written in keras.ops, so it
runs on every Keras backend. One forward pass, `MiniGPT.read`, serves training, prefill and cached
decoding.

Shapes: B sequences, T positions to read, K positions to attend to, H heads, D width of a head,
C width of a token, V words.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import layers, ops

from minigpt.config import ModelConfig

Cache = tuple[Any, Any]  # the keys and values of one block, (B, H, K, D) each


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


class Projection(layers.EinsumDense):
    """An EinsumDense that multiplies two matrices.

    On TensorFlow, Keras's einsum multiplies one sequence at a time and adds up one gradient of the
    kernel per sequence.
    """

    def call(self, inputs: Any) -> Any:
        """Returns what EinsumDense returns for inputs (B, T, ...)."""
        outputs = self.bias.shape
        kernel = ops.reshape(self.kernel, (-1, math.prod(outputs)))
        x = ops.reshape(inputs, (-1, kernel.shape[0]))  # (B * T, ...)
        x = ops.matmul(x, kernel) + ops.reshape(self.bias, (-1,))
        return ops.reshape(x, (-1, inputs.shape[1], *outputs))


class Block(layers.Layer):
    """Causal self-attention and a feed-forward layer, each added to its input and normalised.

    The projections have the kernel shapes and initialisers of `keras.layers.MultiHeadAttention`:
    Glorot's range depends on how a kernel is laid out.
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config, policy = config, self.dtype_policy
        width, heads = config.embed_dim, (None, config.num_heads, config.key_dim)

        def projection(name: str, equation: str, shape: tuple[int | None, ...]) -> Projection:
            axes = equation[-len(shape) + 1 :]
            return Projection(equation, shape, bias_axes=axes, dtype=policy, name=name)

        self.query = projection("query", "btc,chd->bthd", heads)
        self.key = projection("key", "btc,chd->bthd", heads)
        self.value = projection("value", "btc,chd->bthd", heads)
        self.attention_output = projection("attention_output", "bthd,hdc->btc", (None, width))
        self.expand = layers.Dense(config.feed_forward_dim, "relu", dtype=policy, name="expand")
        self.contract = layers.Dense(width, dtype=policy, name="contract")
        norm = {"epsilon": 1e-6, "dtype": policy}
        self.attention_norm = layers.LayerNormalization(**norm, name="attention_norm")
        self.feed_forward_norm = layers.LayerNormalization(**norm, name="feed_forward_norm")
        drop = {"rate": config.dropout, "dtype": policy}
        self.attention_dropout = layers.Dropout(**drop, name="attention_dropout")
        self.feed_forward_dropout = layers.Dropout(**drop, name="feed_forward_dropout")

    def call(
        self,
        x: Any,
        mask: Any,
        cache: Cache | None = None,
        column: Any = 0,
        training: bool | None = None,
    ) -> tuple[Any, Cache]:
        """Attends and feeds forward.

        Args:
            x: (B, T, C).
            mask: Which positions each position may see; bool, broadcast to (B, H, T, K).
            cache: Keys and values of earlier positions, for T = 1; None: there are none (K = T).
            column: The column of the cache that this position is written to.
            training: Whether dropout is on.

        Returns:
            (B, T, C), and the keys and values that were attended to.
        """
        heads = [ops.swapaxes(layer(x), 1, 2) for layer in (self.query, self.key, self.value)]
        query, keys, values = heads  # (B, H, T, D)
        if cache is not None:
            keys, values = (_put(kept, column, new) for kept, new in zip(cache, (keys, values)))
        once = _recomputed if training else lambda function: function
        attended = once(lambda *heads: self._attend(*heads, mask))(query, keys, values)
        x = once(self.attention_norm)(x + self.attention_dropout(attended, training=training))
        fed = self.contract(self.expand(x))  # (B, T, C)
        fed = self.feed_forward_dropout(fed, training=training)
        return once(self.feed_forward_norm)(x + fed), (keys, values)

    def _attend(self, query: Any, keys: Any, values: Any, mask: Any) -> Any:
        attended = ops.swapaxes(attend(query, keys, values, mask), 1, 2)  # (B, T, H, D)
        return self.attention_output(attended)  # (B, T, C)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the weights for inputs of (B, T, C)."""
        config = self.config
        for layer in (self.query, self.key, self.value, self.expand):
            layer.build(input_shape)
        self.attention_output.build((None, None, config.num_heads, config.key_dim))
        self.contract.build((None, None, config.feed_forward_dim))
        for layer in (self.attention_norm, self.feed_forward_norm):
            layer.build(input_shape)
        self.built = True


@keras.saving.register_keras_serializable("minigpt")
class MiniGPT(keras.Model):
    """Turns token ids into the logits of each position's next token.

    Args:
        config: The sizes, with a vocabulary_size of at least 1, and the dtype policy, which is not
            "auto".
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(dtype=config.dtype_policy, **kwargs)
        self.config, policy = config, self.dtype_policy
        words, width = config.vocabulary_size, config.embed_dim
        # In float32 under every policy: mixed precision would cast a whole table whenever a few of
        # its rows are taken, and add up the gradients of a frequent word in bfloat16.
        embedding = {"output_dim": width, "dtype": "float32"}
        self.token_embedding = layers.Embedding(words, **embedding, name="token_embedding")
        self.position_embedding = layers.Embedding(
            config.context_length, **embedding, name="position_embedding"
        )
        self.blocks = [
            Block(config, dtype=policy, name=f"block_{number}")
            for number in range(config.num_blocks)
        ]
        if not config.tied_embeddings:
            self.head_kernel = self.add_weight((width, words), "glorot_uniform", name="head_kernel")
        self.head_bias = self.add_weight((words,), "zeros", name="head_bias")
        self.token_embedding.build((None, config.context_length))
        self.position_embedding.build((config.context_length,))
        for block in self.blocks:
            block.build((None, config.context_length, width))
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
        padding: Any = None,
        cache: list[Cache] | None = None,
        column: Any = 0,
        training: bool | None = None,
    ) -> tuple[Any, list[Cache]]:
        """Runs the blocks over whole sequences, or over one more token of each.

        Sequences may be aligned on the right: that of row b begins in column `padding[b]`, at
        position 0.

        Args:
            tokens: int32 (B, T); T = 1 with a cache.
            padding: int32 (B,), the columns before each sequence; None: all begin in column 0.
            cache: The keys and values of each block for the columns before `column`, with room for
                this one; None: the sequences begin here.
            column: The column of the first token.
            training: Whether dropout is on.

        Returns:
            The last block's output, (B, T, C), and the keys and values of each block.
        """
        columns = column + ops.arange(tokens.shape[1], dtype="int32")  # (T,)
        seen = columns if cache is None else ops.arange(cache[0][0].shape[2], dtype="int32")  # (K,)
        positions, mask = columns, columns[:, None] >= seen  # (T,), (T, K)
        if padding is not None:
            positions = ops.maximum(columns - padding[:, None], 0)  # (B, T)
            mask = mask & (seen >= padding[:, None, None])[:, None]  # (B, 1, T, K)
        x = self.embed(tokens, positions)  # (B, T, C)
        caches = []
        for block, kept in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x, kept = block(x, mask, cache=kept, column=column, training=training)
            caches.append(kept)
        return x, caches

    def embed(self, tokens: Any, positions: Any) -> Any:
        """Returns the sum of the embeddings of tokens and of their positions."""
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        return ops.cast(x, self.compute_dtype)

    def project(self, hidden: Any) -> Any:
        """Returns logits, float32 (..., V), for hidden states (..., C)."""
        kernel, bias = self.head
        logits = ops.matmul(hidden, ops.cast(kernel, hidden.dtype))
        return ops.cast(logits, "float32") + ops.cast(bias, "float32")

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes this model from."""
        return {"name": self.name, "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "MiniGPT":
        """Makes a model, with new weights."""
        return cls(ModelConfig(**config["config"]), name=config["name"])


def _put(cache: Any, column: Any, new: Any) -> Any:
    """Replaces one column of a cache (B, H, K, D) by keys or values (B, H, 1, D)."""
    batch, heads, columns, width = cache.shape
    rows = ops.arange(batch * heads, dtype="int32")[:, None] * columns + column
    flat, new = (ops.reshape(x, (-1, width)) for x in (cache, new))
    return ops.reshape(ops.scatter_update(flat, rows, new), cache.shape)


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Computes a cheap function again in the backward pass instead of keeping what it computes.

    Gradient checkpointing (Chen et al., 2016, https://arxiv.org/abs/1604.06174) of functions
    without dropout, which would draw again. Each call makes a function of its own, because JAX
    caches by function what it has traced.
    """
    return keras.remat(lambda *args: function(*args))

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
    """Causal self-attention and a feed-forward layer, each added to its input and normalised.

    The kernels have the shapes and initial ranges of `keras.layers.MultiHeadAttention`.
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config, policy = config, self.dtype_policy
        width, heads = (config.embed_dim,), (config.num_heads, config.key_dim)
        inner = (config.feed_forward_dim,)
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
        cache: Cache | None = None,
        column: Any = 0,
        matrices: dict[str, Any] | None = None,
        training: bool | None = None,
    ) -> tuple[Any, Cache]:
        """Attends and feeds forward.

        Args:
            x: (B * T, C).
            mask: Which positions each position may see; bool, broadcast to (B, H, T, K).
            cache: Keys and values of earlier positions, for T = 1; None: there are none (K = T).
            column: The column of the cache that this position is written to.
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
        if cache is not None:  # (B, H, K, D)
            keys, values = _put(cache[0], column, keys), _put(cache[1], column, values)
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
        self.position_embedding = layers.Embedding(
            config.context_length, **table, name="position_embedding"
        )
        self.token_embedding.build()
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
        padding: Any = None,
        cache: list[Cache] | None = None,
        column: Any = 0,
        matrices: list[dict[str, Any]] | None = None,
        training: bool | None = None,
    ) -> tuple[Any, list[Cache]]:
        """Runs the blocks over whole sequences, or over one more token of each.

        Args:
            tokens: int32 (B, T); T = 1 with a cache.
            padding: int32 (B,), the columns before each sequence, which is at position 0 after
                them; None: every sequence begins in column 0.
            cache: The keys and values of each block for the columns before `column`, with room for
                this one; None: the sequences begin here.
            column: The column of the first token.
            matrices: What each `Block.matrices` returned; None: made of the current weights.
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
        x = ops.reshape(self.embed(tokens, positions), (-1, self.config.embed_dim))  # (B * T, C)
        read = []
        for number, block in enumerate(self.blocks):
            given = {"cache": cache and cache[number], "matrices": matrices and matrices[number]}
            x, kept = block(x, mask, column=column, training=training, **given)
            read.append(kept)
        return ops.reshape(x, (-1, tokens.shape[1], self.config.embed_dim)), read

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
        """Returns the arguments of `from_config`."""
        return {"name": self.name, "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "MiniGPT":
        """Makes a model with new weights."""
        return cls(ModelConfig.model_validate(config["config"]), config["name"])


def _put(cache: Any, column: Any, new: Any) -> Any:
    """Replaces one column of a cache (B, H, K, D) by keys or values (B, H, 1, D)."""
    batch, heads, columns, width = cache.shape
    rows = ops.arange(batch * heads, dtype="int32")[:, None] * columns + column
    flat, new = ops.reshape(cache, (-1, width)), ops.reshape(new, (-1, width))
    return ops.reshape(ops.scatter_update(flat, rows, new), cache.shape)


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that the backward pass computes again, to save memory.

    Gradient checkpointing (Chen et al., 2016, https://arxiv.org/abs/1604.06174), for cheap
    functions without dropout, which would draw other numbers. The function is new each time: JAX
    keeps what it has traced of one, and that does not outlive the trace.
    """
    return keras.remat(lambda *args: function(*args))

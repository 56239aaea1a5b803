"""The miniature GPT: token and position embeddings, causal transformer blocks, a head over words.

The model of https://keras.io/examples/generative/text_generation_with_miniature_gpt/ with its
post-normalised block (Vaswani et al., 2017) and initialisers, in keras.ops, so that it runs on each
Keras backend.  Shapes: B sequences, T positions, K cached positions, H heads, D a head's width,
C a token's width, V words.
"""

import math
from functools import partial
from typing import Any

import keras
from keras import layers, ops


class Projection(layers.EinsumDense):
    """An EinsumDense from (B, T, ...), as one product of two matrices.

    On TensorFlow Keras's einsum multiplies one sequence of the batch at a time, and adds up as many
    gradients of the kernel as there are sequences.
    """

    def call(self, inputs: Any) -> Any:
        """What EinsumDense gives: a product with the kernel, and the bias."""
        kernel, outputs = self.matrix, self.bias.shape
        x = ops.reshape(inputs, (-1, inputs.shape[1], kernel.shape[0]))
        return ops.reshape(ops.matmul(x, kernel), (-1, x.shape[1], *outputs)) + self.bias

    @property
    def matrix(self) -> Any:
        """The kernel, (all of an input, all of an output)."""
        return ops.reshape(self.kernel, (-1, math.prod(self.bias.shape)))


@keras.saving.register_keras_serializable("minigpt")
class TransformerBlock(layers.Layer):
    """Causal self-attention and a feed-forward layer, each added and then normalised.

    The projections have the shapes and initialisers of `keras.layers.MultiHeadAttention`, which
    keeps no keys and values between calls; decoding needs them.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        key_dim: int,
        feed_forward_dim: int,
        dropout: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "key_dim": key_dim,
            "feed_forward_dim": feed_forward_dim,
            "dropout": dropout,
        }
        policy = self.dtype_policy

        def heads(name: str) -> Projection:
            return Projection(
                "btc,chd->bthd", (None, num_heads, key_dim), bias_axes="hd", dtype=policy, name=name
            )

        self.query, self.key, self.value = heads("query"), heads("key"), heads("value")
        self.attention_output = Projection(
            "bthd,hdc->btc", (None, embed_dim), bias_axes="c", dtype=policy, name="attention_output"
        )
        self.expand = layers.Dense(feed_forward_dim, "relu", dtype=policy, name="expand")
        self.contract = layers.Dense(embed_dim, dtype=policy, name="contract")
        self.attention_norm = layers.LayerNormalization(
            epsilon=1e-6, dtype=policy, name="attention_norm"
        )
        self.feed_forward_norm = layers.LayerNormalization(
            epsilon=1e-6, dtype=policy, name="feed_forward_norm"
        )
        self.attention_dropout = layers.Dropout(dropout, dtype=policy, name="attention_dropout")
        self.feed_forward_dropout = layers.Dropout(
            dropout, dtype=policy, name="feed_forward_dropout"
        )

    def call(
        self,
        x: Any,
        mask: Any,
        cache: tuple[Any, Any] | None = None,
        column: Any = 0,
        training: bool | None = None,
    ) -> tuple[Any, tuple[Any, Any]]:
        """Attends and feeds forward.

        Args:
            x: (B, T, C).
            mask: bool, broadcast to (B, H, T, K): which cached position each position may see.
            cache: keys and values, (B, K, H, D) each; None: this call's own (K = T).
            column: where this call's keys and values go in the cache.
            training: whether dropout is on.

        Returns:
            (B, T, C), and the keys and values with this call's in them.
        """
        # What is soon computed again is not kept until its gradients are taken (Chen et al., 2016,
        # https://arxiv.org/abs/1604.06174).  No dropout in it, which would draw again.
        once = keras.remat if training else lambda function: function
        query, keys, values = self.query(x), self.key(x), self.value(x)  # (B, T, H, D)
        if cache is not None:
            keys = ops.slice_update(cache[0], (0, column, 0, 0), keys)  # (B, K, H, D)
            values = ops.slice_update(cache[1], (0, column, 0, 0), values)
        attended = once(partial(self._attend, mask))(query, keys, values)
        x = once(self.attention_norm)(x + self.attention_dropout(attended, training=training))
        fed = self.feed_forward_dropout(self.contract(self.expand(x)), training=training)
        return once(self.feed_forward_norm)(x + fed), (keys, values)

    def _attend(self, mask: Any, query: Any, keys: Any, values: Any) -> Any:
        query = query * self.settings["key_dim"] ** -0.5
        scores = ops.einsum("bthd,bkhd->bhtk", query, keys)
        # In float32 whatever the policy, like Keras's own Softmax under mixed precision.
        scores = ops.where(mask, ops.cast(scores, "float32"), -1e9)
        weights = ops.cast(ops.softmax(scores), values.dtype)
        attended = ops.einsum("bhtk,bkhd->bthd", weights, values)
        return self.attention_output(attended)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the weights for inputs of (B, T, C)."""
        heads = (None, None, self.settings["num_heads"], self.settings["key_dim"])
        for layer in (self.query, self.key, self.value):
            layer.build(input_shape)
        self.attention_output.build(heads)
        self.expand.build(input_shape)
        self.contract.build((None, None, self.settings["feed_forward_dim"]))
        self.attention_norm.build(input_shape)
        self.feed_forward_norm.build(input_shape)
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """The arguments that make this layer again."""
        return {**super().get_config(), **self.settings}


@keras.saving.register_keras_serializable("minigpt")
class MiniGPT(keras.Model):
    """Token ids in, logits of each position's next token out.

    Args:
        vocabulary_size: V, rows of the token embedding and of the head.
        context_length: positions that can be told apart.
        embed_dim: C.
        num_blocks: transformer blocks.
        num_heads: H.
        key_dim: D, the width of one head.
        feed_forward_dim: hidden width of a block's feed-forward layer.
        dropout: share dropped after attention and after the feed-forward layer.
        tied_embeddings: whether the head is the transposed token embedding (Press and Wolf, 2017).
    """

    def __init__(
        self,
        vocabulary_size: int,
        context_length: int,
        embed_dim: int,
        num_blocks: int,
        num_heads: int,
        key_dim: int,
        feed_forward_dim: int,
        dropout: float,
        tied_embeddings: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings = {
            "vocabulary_size": vocabulary_size,
            "context_length": context_length,
            "embed_dim": embed_dim,
            "num_blocks": num_blocks,
            "num_heads": num_heads,
            "key_dim": key_dim,
            "feed_forward_dim": feed_forward_dim,
            "dropout": dropout,
            "tied_embeddings": tied_embeddings,
        }
        policy = self.dtype_policy
        # Not in the policy's dtype: mixed precision would cast a whole table whenever a few of its
        # rows are taken, and sum the gradients of a frequent word in bfloat16.
        self.token_embedding = layers.Embedding(
            vocabulary_size, embed_dim, dtype="float32", name="token_embedding"
        )
        self.position_embedding = layers.Embedding(
            context_length, embed_dim, dtype="float32", name="position_embedding"
        )
        self.blocks = [
            TransformerBlock(
                embed_dim,
                num_heads,
                key_dim,
                feed_forward_dim,
                dropout,
                dtype=policy,
                name=f"block_{number}",
            )
            for number in range(num_blocks)
        ]
        if not tied_embeddings:
            self.head_kernel = self.add_weight(
                (embed_dim, vocabulary_size), "glorot_uniform", name="head_kernel"
            )
        self.head_bias = self.add_weight((vocabulary_size,), "zeros", name="head_bias")
        self.token_embedding.build((None, context_length))
        self.position_embedding.build((context_length,))
        for block in self.blocks:
            block.build((None, context_length, embed_dim))
        self.built = True

    @property
    def head(self) -> tuple[Any, Any]:
        """The projection to words: kernel (C, V) and bias (V,)."""
        if self.settings["tied_embeddings"]:
            kernel = ops.transpose(self.token_embedding.embeddings)
        else:
            kernel = ops.convert_to_tensor(self.head_kernel)
        return kernel, ops.convert_to_tensor(self.head_bias)

    def embed(self, tokens: Any, positions: Any) -> Any:
        """What the first block reads: the embeddings of tokens and of their positions, added."""
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        return ops.cast(x, self.compute_dtype)

    def hidden(self, tokens: Any, training: bool | None = None) -> Any:
        """The last block's output, (B, T, C), for whole sequences of token ids, (B, T)."""
        length = tokens.shape[1]
        positions = ops.arange(length)
        mask = positions[:, None] >= positions  # (T, T): a position sees itself and those before
        x = self.embed(tokens, positions)
        for block in self.blocks:
            x, _ = block(x, mask, training=training)
        return x

    def call(self, tokens: Any, training: bool | None = None) -> Any:
        """Logits, float32 (B, T, V), for token ids, int32 (B, T)."""
        return self.project(self.hidden(tokens, training=training))

    def project(self, hidden: Any) -> Any:
        """Logits, float32 (..., V), of hidden states (..., C)."""
        kernel, bias = self.head
        logits = ops.matmul(hidden, ops.cast(kernel, hidden.dtype))
        return ops.cast(logits, "float32") + ops.cast(bias, "float32")

    def empty_cache(self, batch_size: int, columns: int) -> list[tuple[Any, Any]]:
        """Room for the keys and values of `columns` positions in every block."""
        shape = (batch_size, columns, self.settings["num_heads"], self.settings["key_dim"])
        return [(ops.zeros(shape, self.compute_dtype),) * 2 for _ in self.blocks]

    def advance(
        self, tokens: Any, column: Any, padding: Any, cache: list[tuple[Any, Any]]
    ) -> tuple[Any, list[tuple[Any, Any]]]:
        """Reads T more tokens of each row, seeing those before through the cache.

        Rows are aligned on the right: row b's text begins in column `padding[b]`, at position 0.

        Args:
            tokens: int32 (B, T), the tokens of columns `column` to `column` + T - 1.
            column: where they go.
            padding: int32 (B,), columns before each row's text.
            cache: keys and values of each block, as `empty_cache` makes them.

        Returns:
            Hidden states (B, T, C) and the cache with these tokens in it.
        """
        columns = column + ops.arange(tokens.shape[1])  # (T,)
        positions = ops.maximum(columns - padding[:, None], 0)  # (B, T)
        cached = ops.arange(cache[0][0].shape[1])  # (K,)
        seen = cached <= columns[:, None]  # (T, K)
        mask = seen & (cached >= padding[:, None, None])  # (B, T, K)
        x = self.embed(tokens, positions)
        updated = []
        for block, kept in zip(self.blocks, cache, strict=True):
            x, kept = block(x, mask[:, None], cache=kept, column=column)
            updated.append(kept)
        return x, updated

    def get_config(self) -> dict[str, Any]:
        """The arguments that make this model again."""
        return {**super().get_config(), **self.settings}

"""The miniature GPT: embeddings, causal transformer blocks, a head over tokens.

The model of https://keras.io/examples/generative/text_generation_with_miniature_gpt/ with its
post-normalised block (Vaswani et al., 2017) and initialisers, and with learned or rotary positions.
It is written in keras.ops, so it runs on every Keras backend. One forward pass, `MiniGPT.read`,
serves training, prefill and cached decoding.

A sequence begins in column 0 and is filled up on the right, which changes nothing before. With
rotary positions it may be longer than the context: a position then sees itself and the
context_length - 1 positions before it (sliding window attention, Beltagy et al., 2020,
https://arxiv.org/abs/2004.05150), and with a token shift the token before these.

Shapes: B sequences, T positions to read, K positions to attend to, H heads, D width of a head,
C width of a token, V tokens.
"""

import functools
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from minigpt.config import ModelConfig
from minigpt.model.block import Block, Cache, Rotary
from minigpt.model.head import Head, Tail, logits

ROTARY_BASE = 10_000.0  # the longest wave has some 6 times as many positions (Su et al., 2021)


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
        self.frequent, width = frequent(config), config.embed_dim
        rare = config.vocabulary_size - self.frequent
        # In float32 under every policy: mixed precision would cast a whole table whenever a few of
        # its rows are taken, and add up the gradients of a frequent token in bfloat16.
        table = {"output_dim": width, "dtype": "float32"}
        self.token_embedding = layers.Embedding(self.frequent, **table, name="token_embedding")
        self.token_embedding.build()
        if config.positions == "learned":
            self.position_embedding = layers.Embedding(
                config.context_length, **table, name="position_embedding"
            )
            self.position_embedding.build()
        if config.token_shift:
            self.shift = self.add_weight((width,), "zeros", name="token_shift")
        self.blocks = [
            Block(config, dtype=policy, name=f"block_{number}")
            for number in range(config.num_blocks)
        ]
        columns = self.frequent + bool(rare)
        # Without the columns that are embeddings: the tail's, if it has one.
        own = columns - self.frequent if config.tied_embeddings else columns
        self.head_kernel = None
        if own:
            self.head_kernel = self.add_weight((width, own), "glorot_uniform", name="head_kernel")
        self.head_bias = self.add_weight((columns,), "zeros", name="head_bias")
        self.tail_embedding = None
        if rare:
            narrow = config.tail_dim
            self.tail_embedding = layers.Embedding(
                rare, narrow, dtype="float32", name="tail_embedding"
            )
            self.tail_embedding.build()
            new = functools.partial(self.add_weight, initializer="glorot_uniform")
            self.tail_widen = new((narrow, width), name="tail_widen")
            self.tail_narrow = new((width, narrow), name="tail_narrow")
            if not config.tied_embeddings:
                self.tail_kernel = new((narrow, rare), name="tail_kernel")
            self.tail_bias = self.add_weight((rare,), "zeros", name="tail_bias")
        self.built = True

    @property
    def head(self) -> Head:
        """The projection to tokens.

        Its weights of a token may be the token's embedding (Press and Wolf, 2017,
        https://arxiv.org/abs/1608.05859), in the tail too (Baevski and Auli, 2019).
        """
        tied = self.config.tied_embeddings
        kernels = [self.token_embedding.embeddings] if tied else []
        if self.head_kernel is not None:
            kernels.append(ops.transpose(self.head_kernel))
        kernel = ops.concatenate(kernels)
        tail = None
        if self.tail_embedding:
            rare = self.tail_embedding.embeddings if tied else ops.transpose(self.tail_kernel)
            tail = Tail(*map(ops.convert_to_tensor, (self.tail_narrow, rare, self.tail_bias)))
        return Head(kernel, ops.convert_to_tensor(self.head_bias), tail)

    def prepared(self) -> dict[str, Any]:
        """Returns what decoding reads of the weights, cast and reshaped once for all tokens.

        Done for each token, it would add a fifth to the time of one in bfloat16 and two fifths with
        XLA (one prompt, published size).

        Returns:
            `matrices`, what each `Block.matrices` returned, and `head`, for `head.logits`.
        """
        return {
            "matrices": [block.matrices() for block in self.blocks],
            "head": self.head.cast(self.compute_dtype),
        }

    def call(self, tokens: Any, training: bool | None = None) -> Any:
        """Returns logits, float32 (B, T, V), for token ids, int32 (B, T)."""
        return logits(self.hidden(tokens, training=training), self.head)

    def hidden(self, tokens: Any, training: bool | None = None) -> Any:
        """Returns the last block's output, (B, T, C), for token ids, int32 (B, T)."""
        return self.read(tokens, training=training)[0]

    def read(
        self,
        tokens: Any,
        cache: list[Cache] | None = None,
        positions: Any = None,
        text: Any = None,
        matrices: list[dict[str, Any]] | None = None,
        training: bool | None = None,
    ) -> tuple[Any, list[Cache]]:
        """Runs the blocks over whole sequences, or over one more token of each.

        Args:
            tokens: int32 (B, T); T = 1 with a cache.
            cache: The keys and values of each block, a ring (see `ring`) with room for this token;
                None: the sequences begin here.
            positions: int32 (B,), the position of each token; only with a cache.
            text: int32 (B, N), the tokens of each sequence by position; only with a cache, and only
                the tokens before this one are read.
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
        x = self.embed(tokens, positions, text)
        x = ops.reshape(x, (-1, self.config.embed_dim))  # (B * T, C)
        rotary, read = self.rotary(positions), []
        for number, block in enumerate(self.blocks):
            given = {"cache": cache and cache[number], "matrices": matrices and matrices[number]}
            x, kept = block(x, mask, rotary, columns=columns, training=training, **given)
            read.append(kept)
        return ops.reshape(x, (-1, length, self.config.embed_dim)), read

    def embed(self, tokens: Any, positions: Any, text: Any = None) -> Any:
        """Returns the embeddings of tokens, plus those of their positions if they are learned.

        With a token shift (Peng et al., 2023, https://arxiv.org/abs/2305.13048) the embedding of
        the token before is added too, each channel times a factor that is learned. One block then
        finds what followed an earlier occurrence of a token, which otherwise takes two (Olsson et
        al., 2022, https://arxiv.org/abs/2209.11895).

        Args:
            tokens: int32 (B, T).
            positions: int32 (T,); with `text` (B, 1).
            text: int32 (B, N), the tokens by position; None: they are `tokens`.

        Returns:
            (B, T, C), in the dtype of the products.
        """
        x = self._looked_up(tokens)
        if self.config.token_shift:
            if text is None:
                before = ops.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
            else:
                before = ops.take_along_axis(text, ops.maximum(positions - 1, 0), axis=1)
                before = ops.where(positions[..., None] > 0, self._looked_up(before), 0.0)
            x = x + before * self.shift
        if self.config.positions == "learned":
            if tokens.shape[1] > self.config.context_length:
                raise ValueError(f"{tokens.shape[1]} tokens, with positions for fewer")
            x = x + self.position_embedding(positions)
        return ops.cast(x, self.compute_dtype)

    def _looked_up(self, tokens: Any) -> Any:
        """Returns the embeddings of tokens, float32 (B, T, C), for int32 (B, T).

        Those of the tail are narrow ones, widened (Baevski and Auli, 2019,
        https://arxiv.org/abs/1809.10853).
        """
        if self.tail_embedding is None:
            return self.token_embedding(tokens)
        x = self.token_embedding(ops.minimum(tokens, self.frequent - 1))
        rare = self.tail_embedding(ops.maximum(tokens - self.frequent, 0))
        matrix = ops.cast(self.tail_widen, self.compute_dtype)
        rare = ops.matmul(ops.cast(rare, self.compute_dtype), matrix)
        return ops.where(tokens[..., None] >= self.frequent, ops.cast(rare, x.dtype), x)

    def rotary(self, positions: Any) -> Rotary | None:
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

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of `from_config`."""
        return {"name": self.name, "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "MiniGPT":
        """Makes a model with new weights."""
        return cls(ModelConfig.model_validate(config["config"]), config["name"])


def frequent(config: ModelConfig) -> int:
    """Returns how many tokens stand before the tail; all of them, if there is none."""
    return min(config.vocabulary_size, config.cutoff or config.vocabulary_size)


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

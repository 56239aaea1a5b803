"""The published script's algorithm, restated from layers that Keras ships, to measure against.

https://keras.io/examples/generative/text_generation_with_miniature_gpt/: the same model, loss and
standardisation; `use_causal_mask=True` does what its mask function does.
"""

import string
from typing import Any

import keras
import tensorflow as tf
from keras import layers, ops

VOCABULARY_SIZE, LENGTH, WIDTH, HEADS = 20_000, 80, 256, 2


class _Embedding(layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = layers.Embedding(VOCABULARY_SIZE, WIDTH)
        self.positions = layers.Embedding(LENGTH, WIDTH)

    def call(self, tokens: Any) -> Any:
        return self.tokens(tokens) + self.positions(ops.arange(ops.shape(tokens)[-1]))


class _Block(layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.attention = layers.MultiHeadAttention(HEADS, WIDTH)
        self.feed_forward = keras.Sequential([layers.Dense(WIDTH, "relu"), layers.Dense(WIDTH)])
        self.norms = [layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]
        self.dropouts = [layers.Dropout(0.1) for _ in range(2)]

    def call(self, x: Any) -> Any:
        attended = self.attention(x, x, use_causal_mask=True)
        x = self.norms[0](x + self.dropouts[0](attended))
        return self.norms[1](x + self.dropouts[1](self.feed_forward(x)))


def compiled_model() -> keras.Model:
    """The model, compiled as the script compiles it: Adam, and the loss over every position."""
    tokens = layers.Input((LENGTH,), dtype="int32")
    hidden = _Block()(_Embedding()(tokens))
    model = keras.Model(tokens, layers.Dense(VOCABULARY_SIZE)(hidden))
    model.compile("adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def vectorizer() -> layers.TextVectorization:
    """The script's TextVectorization layer, not adapted yet."""

    def standardise(text: Any) -> Any:
        text = tf.strings.regex_replace(tf.strings.lower(text), "<br />", " ")
        return tf.strings.regex_replace(text, f"([{string.punctuation}])", r" \1")

    return layers.TextVectorization(
        standardize=standardise,
        max_tokens=VOCABULARY_SIZE - 1,
        output_mode="int",
        output_sequence_length=LENGTH + 1,
    )

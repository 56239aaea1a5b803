"""The published script, restated with Keras's own layers: the other side of the benchmarks.

Model, loss, standardisation and generation are those of
https://keras.io/examples/generative/text_generation_with_miniature_gpt/, with
`use_causal_mask=True` in place of its mask function. The row `seed` compares it with the script
itself.
"""

import os
import string
from typing import Any

import keras
import numpy as np
from keras import layers, ops

TINY = bool(os.environ.get("BENCHMARKS_TINY"))  # only shows that everything runs
VOCABULARY_SIZE, LENGTH, WIDTH, HEADS = (300, 24, 8, 2) if TINY else (20_000, 80, 256, 2)
BATCH = 4 if TINY else 128
TOP_K = 10


class _Embedding(layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = layers.Embedding(VOCABULARY_SIZE, WIDTH)
        self.positions = layers.Embedding(LENGTH, WIDTH)

    def call(self, tokens: Any) -> Any:
        return self.tokens(tokens) + self.positions(ops.arange(ops.shape(tokens)[-1]))


class _Block(layers.Layer):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = layers.MultiHeadAttention(HEADS, WIDTH)
        self.feed_forward = keras.Sequential([layers.Dense(WIDTH, "relu"), layers.Dense(WIDTH)])
        self.norms = [layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]
        self.dropouts = [layers.Dropout(dropout) for _ in range(2)]

    def attend(self, x: Any) -> Any:
        attended = self.attention(x, x, use_causal_mask=True)
        return self.norms[0](x + self.dropouts[0](attended))

    def call(self, x: Any) -> Any:
        x = self.attend(x)
        return self.norms[1](x + self.dropouts[1](self.feed_forward(x)))


def compiled_model(
    optimizer: Any = "adam", dropout: float = 0.1, jit_compile: Any = "auto"
) -> keras.Model:
    """Returns the model, compiled as in the script: Adam, and the loss over every position."""
    tokens = layers.Input((LENGTH,), dtype="int32")
    hidden = _Block(dropout)(_Embedding()(tokens))
    model = keras.Model(tokens, layers.Dense(VOCABULARY_SIZE)(hidden))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, jit_compile=jit_compile)
    return model


def bias_between_activations(model: keras.Model, tokens: np.ndarray) -> np.ndarray:
    """Returns a bias for ReLU's input that keeps all activations away from 0.

    For each unit it lies in the widest gap between two activations of the middle half.
    """
    embedding, block = model.layers[1:3]
    x = block.attend(embedding(tokens))
    kernel = block.feed_forward.layers[0].kernel
    found = np.sort(ops.convert_to_numpy(ops.matmul(x, kernel)).reshape(-1, WIDTH), axis=0)
    middle = found[len(found) // 4 : -len(found) // 4]
    widest = np.diff(middle, axis=0).argmax(axis=0)
    below, above = middle[[widest, widest + 1], np.arange(WIDTH)]
    return -(below + above) / 2


def generate(model: keras.Model, tokens: list[int], number: int, rng: np.random.Generator) -> None:
    """Appends new tokens, each from a pass over the whole padded text, as the script does."""
    for _ in range(number):
        padded = np.array([tokens + [0] * (LENGTH - len(tokens))])
        logits = model.predict(padded, verbose=0)[0, len(tokens) - 1]
        best, ids = ops.top_k(logits, TOP_K)
        shares = np.asarray(ops.softmax(best), "float64")
        tokens.append(int(rng.choice(np.asarray(ids), p=shares / shares.sum())))


def vectorizer() -> layers.TextVectorization:
    """Returns the script's TextVectorization layer before it is adapted."""
    import tensorflow as tf

    def standardise(text: Any) -> Any:
        text = tf.strings.regex_replace(tf.strings.lower(text), "<br />", " ")
        return tf.strings.regex_replace(text, f"([{string.punctuation}])", r" \1")

    return layers.TextVectorization(
        standardize=standardise,
        max_tokens=VOCABULARY_SIZE - 1,
        output_mode="int",
        output_sequence_length=LENGTH + 1,
    )

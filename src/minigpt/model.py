"""The miniature GPT: token and position embeddings, causal transformer blocks, a head over words.

The model of https://keras.io/examples/generative/text_generation_with_miniature_gpt/ with its
post-normalised block (Vaswani et al., 2017) and initialisers, in keras.ops, so that it runs on each
Keras backend.  Shapes: B sequences, T positions, K cached positions, H heads, D a head's width,
C a token's width, V words.
"""

import contextlib
import json
import math
import re
import resource
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from keras import layers, ops

from minigpt import files
from minigpt.errors import InputError
from minigpt.text import STYLES
from minigpt.vocabulary import Vocabulary
from minigpt.vocabulary import load as load_vocabulary

MODEL_FILE = "minigpt.keras"
VOCABULARY_FILE = "vocabulary.txt"
CONFIG_FILE = "config.json"

# What a model file may ask for: those that conf/ gives.
DTYPE_POLICIES = ("float32", "mixed_bfloat16")
MOST_BLOCKS = 1000
READING_BYTES = 2**28  # of memory, beside the weights themselves


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


@dataclass(frozen=True)
class ModelDirectory:
    """What a model directory holds: all that is needed to evaluate, sample and serve."""

    network: MiniGPT
    vocabulary: Vocabulary
    config: dict[str, Any]


def save(directory: Path, network: MiniGPT, vocabulary: Vocabulary, config: dict[str, Any]) -> None:
    """Writes a model directory, beside its place and then renamed.

    Args:
        directory: replaced whole when it is there.
        network: the trained model.
        vocabulary: the one that it was trained with.
        config: the resolved configuration, plain values only.
    """
    with files.replacing(directory) as beside:
        beside.mkdir()
        network.save(beside / MODEL_FILE)
        _leave_out_times(beside / MODEL_FILE)
        vocabulary.save(beside / VOCABULARY_FILE)
        (beside / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _leave_out_times(path: Path) -> None:
    """Keras writes the time into its file; without it the same weights give the same bytes."""
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    metadata = json.loads(content["metadata.json"]) | {"date_saved": "1980-01-01@00:00:00"}
    content["metadata.json"] = json.dumps(metadata).encode()
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(zipfile.ZipInfo(name), data)  # of 1980, the zip format's first year


def load(directory: Path) -> ModelDirectory:
    """Reads a model directory, from anywhere: no code of its files is run, nothing is unpickled.

    Raises:
        InputError: a file is missing or malformed, or the parts do not fit each other.
    """
    try:
        network = _read_network(directory / MODEL_FILE)
        config = json.loads((directory / CONFIG_FILE).read_text())
        if not isinstance(config, dict) or config["vocabulary"]["style"] not in STYLES:
            raise ValueError(f"{CONFIG_FILE} names no vocabulary.style of {', '.join(STYLES)}")
    except Exception as error:  # zipfile, h5py and Keras raise many kinds for a malformed file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{directory} is not a whole model directory: {reason}; run `dvc repro train`"
        ) from None
    vocabulary = load_vocabulary(directory / VOCABULARY_FILE)
    if len(vocabulary.tokens) > network.settings["vocabulary_size"]:
        raise InputError(
            f"{directory / VOCABULARY_FILE} has {len(vocabulary.tokens)} entries, the model only "
            f"{network.settings['vocabulary_size']}: they are not of one run; run `dvc repro train`"
        )
    return ModelDirectory(network, vocabulary, config)


def _read_network(path: Path) -> MiniGPT:
    """Makes the network that a Keras file describes, and fills in its weights.

    `keras.saving.load_model` would make an object of any Keras class that the file names, with any
    argument, and its safe mode refuses little more than lambdas.  Of this file's description only
    the settings are taken.
    """
    weights_name, size = "model.weights.h5", path.stat().st_size
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{MODEL_FILE}: {entry.filename!r} is compressed; Keras's are not")
        settings, policy = _described(json.loads(archive.read("config.json")), size)
        weights = archive.extract(weights_name, folder)
        network = MiniGPT(**settings, dtype=policy, name="minigpt")
        own = Path(folder, f"own.{weights_name}")
        network.save_weights(own)
        with _memory_limit(2 * size + READING_BYTES):
            _copy_weights(weights, own)
        network.load_weights(own)
    for weight in network.weights:
        if not np.all(np.isfinite(ops.convert_to_numpy(weight))):
            raise ValueError(f"{MODEL_FILE}: {weight.path} holds values that are no numbers")
    return network


def _described(description: dict[str, Any], size: int) -> tuple[dict[str, Any], str]:
    """The settings and the dtype policy that a file of so many bytes describes, checked."""
    if description["registered_name"] != "minigpt>MiniGPT":
        raise ValueError(f"{MODEL_FILE} is no MiniGPT")
    given, settings = description["config"], {}
    for name, kind in MiniGPT.__init__.__annotations__.items():
        if kind not in (int, float, bool):
            continue
        value = settings[name] = given[name]
        known = isinstance(value, bool) if kind is bool else type(value) in {kind, int}
        if not known or (kind is int and value < 1) or (kind is float and not 0 <= value < 1):
            raise ValueError(f"{MODEL_FILE}: {name} is {value!r}")
    s = settings
    heads, wide = s["num_heads"] * s["key_dim"], s["feed_forward_dim"]
    rows = s["vocabulary_size"] + s["context_length"] + s["num_blocks"] * (4 * heads + 2 * wide)
    if s["num_blocks"] > MOST_BLOCKS or 4 * rows * s["embed_dim"] > size:
        raise ValueError(f"{MODEL_FILE} describes more weights than it holds")
    policy = given["dtype"]["config"]["name"]
    if policy not in DTYPE_POLICIES:
        raise ValueError(f"{MODEL_FILE}: its dtype policy is {policy!r}")
    return settings, policy


@contextlib.contextmanager
def _memory_limit(more_bytes: int) -> Iterator[None]:
    """Has this process fail to take more memory than that, on Linux.

    libhdf5 takes as much as a file tells it to.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    taken = re.search(r"VmData:\s+(\d+) kB", status.read_text())
    assert taken
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [1024 * int(taken[1]) + more_bytes, *before]
    least = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (least, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _copy_weights(theirs: str | Path, ours: Path) -> None:
    """Copies weights into a file that we wrote, where they are laid out like those in it.

    A shape may be larger than any memory, a layout of pieces or of links lead to other files.  Each
    name is looked up; a walk over a hostile file need not end.
    """
    with h5py.File(theirs) as given, h5py.File(ours, "r+") as wanted:
        names: list[str] = []
        wanted.visit(names.append)
        for name in names:
            entry, expected = given, wanted[name]
            for part in name.split("/"):
                if not isinstance(entry.get(part, getlink=True), h5py.HardLink):
                    raise ValueError(f"{MODEL_FILE} lacks {name}")
                entry = entry[part]
            stored = isinstance(expected, h5py.Dataset)
            if type(entry) is not type(expected) or (
                stored and (entry.shape, entry.dtype) != (expected.shape, expected.dtype)
            ):
                raise ValueError(f"{MODEL_FILE}: {name} is of another shape or type than described")
            if stored:
                if entry.chunks or entry.external or entry.is_virtual:
                    raise ValueError(f"{MODEL_FILE}: {name} is not stored in one piece")
                expected[()] = entry[()]

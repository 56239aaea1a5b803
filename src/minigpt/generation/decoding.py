"""Writing text: one loop that owns decoding.

The prompts are read once (prefill); then each token costs one position, since keys and values of
those before are cached.  Positions are learned and absolute: once a text outgrows the context its
window slides, every position shifts, and keys and values are computed afresh from the last tokens.
No entry of the vocabulary marks the end of a review: all texts end together, after N tokens.
Shapes: B texts, P prompt columns, N tokens to write, R rounds of a sampler, V words.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import keras
import numpy as np
import pyarrow as pa
from keras import ops

from minigpt.common.errors import InputError
from minigpt.data.text import detokenise, tokenise
from minigpt.data.tokenizer import PADDING, UNKNOWN, Vocabulary
from minigpt.generation.sampling import Sampling, choose, largest, penalise
from minigpt.model.network import MiniGPT

__all__ = ["Generator", "Sampling"]

STEP = 16  # prompts and texts are padded to a multiple of it: few shapes, so few compilations
LOOPS_KEPT = 16  # compiled loops, so that a server asked for ever new shapes keeps its memory


class DecodingLoop:
    """The compiled functions for one shape and one kind of sampling.

    Both take `settings`, constant while the texts are written: `padding` int32 (B,), columns before
    each prompt; `uniforms` float32 (B, N, R); `banned` float32 (V,), -inf where a word may not be
    written, else 0; and the sampler's `temperature`, `top_p`, `min_p` and `repetition_penalty`.
    They hand on a state: `text` int32 (B, P + N), prompts aligned on the right and what follows
    them; `cache`, keys and values of each block, (B, H, K, D); `weights`, laid out for a position.

    Args:
        network: the model that is read.
        sampling: which of the samplers are on; the values come with each call.
        jit_compile: whether TensorFlow compiles them by XLA; JAX always does.
    """

    def __init__(self, network: MiniGPT, sampling: Sampling, jit_compile: bool = False) -> None:
        self.network, self.sampling = network, sampling
        self.start = _compiled(self._start, network, jit_compile)
        self.go_on = _compiled(self._go_on, network, jit_compile)

    def _start(self, tokens: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Reads the prompts, int32 (B, P), and writes the first token after each."""
        batch, prompt = tokens.shape
        new = settings["uniforms"].shape[1]
        # The cache ends where the longest prompt's text fills the context.
        room = max(min(prompt + new - 1, self._context + STEP - 1), prompt)
        cache = self.network.empty_cache(batch, room)
        hidden, cache = self.network.advance(tokens, 0, settings["padding"], cache)
        weights = self._weights(hidden.dtype, settings["banned"])
        text = ops.concatenate([tokens, ops.zeros((batch, new), "int32")], axis=1)
        text = self._write(hidden[:, -1], text, 0, weights["head"], settings)
        cache = [tuple(ops.transpose(kept, (0, 2, 1, 3)) for kept in block) for block in cache]
        return {"text": text, "cache": cache, "weights": weights}

    def _go_on(self, state: Any, settings: Any, step: Any, stop: Any) -> dict[str, Any]:
        """Writes tokens number `step` to `stop` - 1 of each text."""
        padding, weights = settings["padding"], state["weights"]
        batch, columns = state["text"].shape
        prompt, context = columns - settings["uniforms"].shape[1], self._context
        full = context + ops.min(padding)  # columns of the texts when the longest fills the context
        cached_columns = ops.arange(state["cache"][0][0].shape[2], dtype="int32")
        shown = (cached_columns >= padding[:, None])[:, None, None]  # (B, 1, 1, K)

        def cached(step: Any, text: Any, cache: Any) -> Any:
            column = prompt + step - 1
            token = ops.slice(text, (0, column), (batch, 1))[:, 0]
            mask = shown & (cached_columns <= column)
            hidden, cache = self._position(token, column, padding, mask, cache, weights)
            return step + 1, self._write(hidden, text, step, weights["head"], settings), cache

        def slid(step: Any, text: Any) -> Any:
            start = prompt + step - context
            window = ops.slice(text, (0, start), (batch, context))
            cache = self.network.empty_cache(batch, context)
            before = ops.maximum(padding - start, 0)
            hidden, _ = self.network.advance(window, 0, before, cache)
            return step + 1, self._write(hidden[:, -1], text, step, weights["head"], settings)

        step, text, cache = ops.while_loop(
            lambda step, text, cache: (step < stop) & (prompt + step - 1 < full),
            cached,
            (step, state["text"], state["cache"]),
        )
        if columns > context:
            step, text = ops.while_loop(lambda step, text: step < stop, slid, (step, text))
        return {"text": text, "cache": cache, "weights": weights}

    def _weights(self, dtype: Any, banned: Any) -> dict[str, Any]:
        """Once for all tokens: a cast or a transposition takes longer than using what it gives."""
        kernel, bias = self.network.head
        head = ops.cast(kernel, dtype), ops.cast(bias, "float32") + banned
        blocks = []
        for block in self.network.blocks:
            parts = []
            for layer in (block.query, block.key, block.value, block.attention_output):
                bias = ops.reshape(layer.bias, (-1,))
                parts.append((ops.cast(layer.matrix, dtype), ops.cast(bias, dtype)))
            blocks.append(parts)
        return {"head": head, "blocks": blocks}

    def _position(
        self, token: Any, column: Any, padding: Any, mask: Any, cache: Any, weights: Any
    ) -> Any:
        """What `network.advance` does with one token (B,) of each text, in matrices.

        On a CPU, most of a token's time goes into starting operations and waiting for threads.
        TensorFlow multiplies a vector by a matrix of up to 256 x 512 on the spot and hands a larger
        one to threads, which takes ten times as long: so query, key and value are products of their
        own, and one text's attention is multiplied out and summed.
        """
        x = self.network.embed(token, ops.maximum(column - padding, 0))
        batch, heads, columns, width = cache[0][0].shape
        rows = ops.arange(batch * heads)[:, None] * columns + column
        updated = []
        for block, kept, parts in zip(self.network.blocks, cache, weights["blocks"], strict=True):
            query, key, value = (ops.matmul(x, kernel) + bias for kernel, bias in parts[:3])
            query = ops.reshape(query * width**-0.5, (batch, heads, 1, width))
            keys, values = _put(kept[0], rows, key), _put(kept[1], rows, value)  # (B, H, K, D)
            if batch == 1:
                scores = ops.sum(query * keys, axis=-1)[:, :, None]  # (B, H, 1, K)
            else:
                scores = ops.einsum("bhtd,bhkd->bhtk", query, keys)
            scores = ops.where(mask, ops.cast(scores, "float32"), -1e9)
            shares = ops.cast(ops.softmax(scores), values.dtype)
            if batch == 1:
                attended = ops.sum(ops.swapaxes(shares, 2, 3) * values, axis=2)  # (B, H, D)
            else:
                attended = ops.matmul(shares, values)
            kernel, bias = parts[3]
            attended = ops.matmul(ops.reshape(attended, (batch, heads * width)), kernel) + bias
            x = block.attention_norm(x + attended)
            x = block.feed_forward_norm(x + block.contract(block.expand(x)))
            updated.append((keys, values))
        return x, updated

    def _write(self, hidden: Any, text: Any, step: Any, head: Any, settings: Any) -> Any:
        """Chooses token number `step` of each text from hidden states (B, C), and puts it there."""
        sampling, uniforms = self.sampling, settings["uniforms"]
        batch, new, rounds = uniforms.shape
        kernel, bias = head
        logits = ops.cast(ops.matmul(hidden, kernel), "float32") + bias
        if sampling.repetition_penalty != 1:
            logits = penalise(logits, text, settings["repetition_penalty"])
        if sampling.greedy:
            token = largest(logits, 1)[1]
        else:
            token = choose(
                logits,
                ops.slice(uniforms, (0, step, 0), (batch, 1, rounds))[:, 0],
                settings["temperature"],
                sampling.top_k,
                settings["top_p"] if sampling.top_p < 1 else None,
                settings["min_p"] if sampling.min_p > 0 else None,
            )[:, None]
        columns = ops.arange(text.shape[1], dtype="int32")
        return ops.where(columns == text.shape[1] - new + step, token, text)

    @property
    def _context(self) -> int:
        return int(self.network.settings["context_length"])


class Generator:
    """Writes texts with a trained model; its compiled loops are kept between calls.

    Args:
        network: the model.
        vocabulary: the one that it was trained with.
        style: the standardisation of the vocabulary's tokens.
        jit_compile: whether TensorFlow compiles each new shape by XLA.  Warm, a token of one text
            then takes half the time; the first call of a shape takes 2 to 4 s more, for which
            thousands of tokens must be written.  The texts differ only where rounding decides.
    """

    def __init__(
        self, network: MiniGPT, vocabulary: Vocabulary, style: str, jit_compile: bool = False
    ) -> None:
        self.network, self.vocabulary, self.style = network, vocabulary, style
        self.jit_compile = jit_compile
        self._loops: dict[tuple[Any, ...], DecodingLoop] = {}

    def __call__(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """Goes on from each prompt.

        Args:
            prompts: texts; of one longer than the context the last tokens are kept.
            sampling: how the tokens are chosen.

        Returns:
            Each prompt with what was written after it, as readable English.

        Raises:
            InputError: there is no prompt, or one is empty or of unknown words only.
        """
        return next(self._texts(prompts, sampling, [sampling.max_tokens]))

    def stream(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[list[str]]:
        """Goes on from each prompt, and shows the texts after every token.

        Whole texts, because readable English looks ahead: what follows a token decides on the space
        before it, and whether a quote opens or closes.

        Args:
            prompts: texts; of one longer than the context the last tokens are kept.
            sampling: how the tokens are chosen.

        Yields:
            Each prompt with what has been written after it; the last is what a call returns.

        Raises:
            InputError: there is no prompt, or one is empty or of unknown words only.
        """
        return self._texts(prompts, sampling, range(1, sampling.max_tokens + 1))

    def tokens(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> np.ndarray:
        """Goes on from each prompt, in token ids.

        Args:
            prompts: token ids of each, at least one.
            sampling: how the tokens are chosen; text b draws its numbers from (seed, b) alone.

        Returns:
            int32 (B, N).

        Raises:
            InputError: there is no prompt.
        """
        return next(self._written(prompts, sampling, [sampling.max_tokens]))

    def _texts(
        self, prompts: Sequence[str], sampling: Sampling, stops: Iterable[int]
    ) -> Iterator[list[str]]:
        spelled = tokenise(pa.array(prompts, pa.string()), self.style).to_pylist()
        ids, offsets = self.vocabulary.encode(pa.array(prompts, pa.string()), self.style)
        rows = [ids[start:stop] for start, stop in pairwise(offsets)]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) == 0:
                raise InputError(f"the prompt {prompt!r} is empty: write at least one word")
            if np.all(row == UNKNOWN):
                raise InputError(
                    f"the prompt {prompt!r} holds no word of the vocabulary: use commoner words"
                )
        for written in self._written(rows, sampling, stops):
            yield [
                detokenise([*prompt, *self.vocabulary.decode(row)])
                for prompt, row in zip(spelled, written, strict=True)
            ]

    def _written(
        self, prompts: Sequence[np.ndarray], sampling: Sampling, stops: Iterable[int]
    ) -> Iterator[np.ndarray]:
        """The token ids (B, stop) written up to each stop."""
        if not prompts:
            raise InputError("no prompt was given: name at least one")
        context = int(self.network.settings["context_length"])
        kept = [np.asarray(prompt, "int32")[-context:] for prompt in prompts]
        columns = min(_padded(max(len(prompt) for prompt in kept)), context)
        padding = np.array([columns - len(prompt) for prompt in kept], "int32")
        tokens = np.stack([np.pad(p, (columns - len(p), 0)) for p in kept])
        shape = (_padded(sampling.max_tokens), sampling.rounds)
        rngs = [np.random.default_rng([sampling.seed, row]) for row in range(len(kept))]
        banned = np.zeros(int(self.network.settings["vocabulary_size"]), "float32")
        banned[[PADDING, *([] if sampling.allow_unknown else [UNKNOWN])]] = -np.inf
        banned[len(self.vocabulary.tokens) :] = -np.inf  # rows of the head that no word has
        knobs = ("temperature", "top_p", "min_p", "repetition_penalty")
        settings = {
            "padding": ops.convert_to_tensor(padding),
            "uniforms": ops.convert_to_tensor(np.stack([r.random(shape, "float32") for r in rngs])),
            "banned": ops.convert_to_tensor(banned),
            **{name: ops.convert_to_tensor(getattr(sampling, name), "float32") for name in knobs},
        }
        loop = self._loop(sampling, (*tokens.shape, shape[0]))
        state, done = loop.start(ops.convert_to_tensor(tokens), settings), 1
        for stop in stops:
            if stop > done:
                limits = (ops.convert_to_tensor(number, "int32") for number in (done, stop))
                state, done = loop.go_on(state, settings, *limits), stop
            yield ops.convert_to_numpy(state["text"])[:, columns : columns + stop]

    def _loop(self, sampling: Sampling, shape: tuple[int, ...]) -> DecodingLoop:
        kind = (
            sampling.greedy,
            sampling.top_k,
            sampling.top_p < 1,
            sampling.min_p > 0,
            sampling.repetition_penalty != 1,
        )
        if (*kind, *shape) not in self._loops:
            if len(self._loops) >= LOOPS_KEPT:
                del self._loops[next(iter(self._loops))]
            self._loops[*kind, *shape] = DecodingLoop(self.network, sampling, self.jit_compile)
        return self._loops[*kind, *shape]


def _put(cache: Any, rows: Any, new: Any) -> Any:
    """The cache (B, H, K, D) with these rows (B x H, 1) of its (B x H x K, D) replaced."""
    width = cache.shape[-1]
    flat = ops.reshape(cache, (-1, width))
    return ops.reshape(ops.scatter_update(flat, rows, ops.reshape(new, (-1, width))), cache.shape)


def _padded(length: int) -> int:
    return -(-length // STEP) * STEP


def _compiled(
    function: Callable[..., Any], network: MiniGPT, jit_compile: bool
) -> Callable[..., Any]:
    """Compiles a function of tensors; each call reads the network's weights as they then are."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=jit_compile, autograph=False)
    if keras.backend.backend() == "jax":
        import jax

        @jax.jit
        def stateless(values: list[Any], *args: Any) -> Any:
            with keras.StatelessScope(list(zip(network.variables, values, strict=True))):
                return function(*args)

        return lambda *args: stateless([variable.value for variable in network.variables], *args)
    import torch

    return torch.no_grad()(function)

"""Decoding: one loop continues all prompts together.

The prompts are read once (prefill). Each token after that costs one position, because the keys and
values of earlier positions are cached, in a ring that a text may outgrow. A network with learned
positions stops at its context. Where a separator stands before each document, a text ends when the
model writes one; otherwise it gets as many new tokens as are asked for, or fit. The loop stops when
all texts have ended.

Shapes: B texts, P prompt columns, N new tokens, R uniform numbers per token, V words, H heads,
K columns of the cache, D width of a head.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from minigpt.common.errors import InputError
from minigpt.config import SamplingConfig
from minigpt.data.interface import Tokenizer
from minigpt.generation.prompts import encode
from minigpt.generation.sampling import Asked, asked, knobs, next_tokens, uniforms
from minigpt.model.head import logits
from minigpt.model.network import MiniGPT, ring

log = logging.getLogger(__name__)

STEP = 16  # prompts and new tokens are padded to multiples of it: few shapes, few compilations
LOOPS_KEPT = 16  # compiled loops; bounds the memory of a server that is asked for ever new shapes


class DecodingLoop:
    """The compiled functions for one shape and one choice of samplers.

    `start` and `go_on` take `given`, which is constant while the texts are written:
        lengths: int32 (B,), tokens of each prompt.
        uniforms: float32 (B, N, R).
        banned: float32 (V,), -inf where a word must not be written, else 0.
        knobs: the values of the samplers, see `sampling.knobs`.
    They return the state:
        text: int32 (B, P + N), in each row the prompt, the new tokens, and padding.
        token: int32 (B,), the last token of each text.
        ended: bool (B,), whether the model has ended each text; what it writes then counts for
            nothing.
        cache: keys and values of each block, (B, H, K, D).
        matrices: of each block, see `Block.matrices`.
        head: the projection to words.

    Args:
        network: The model.
        ask: Which samplers are on; their values come with each call.
        separator: The token that ends a text; None: nothing does.
        jit_compile: Whether TensorFlow compiles with XLA. JAX always does.
    """

    def __init__(
        self, network: MiniGPT, ask: Asked, separator: int | None, jit_compile: bool
    ) -> None:
        self.network, self.ask = network, ask
        self.separator = -1 if separator is None else separator  # which no token is
        self.start = compiled(self._start, network, jit_compile)
        self.go_on = compiled(self._go_on, network, jit_compile)

    def _start(self, tokens: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Reads the prompts, int32 (B, P), and writes the first token after each."""
        (batch, prompt), new = tokens.shape, given["uniforms"].shape[1]
        state, lengths = self.network.prepared(), given["lengths"]
        hidden, kept = self.network.read(tokens, matrices=state["matrices"])
        columns = min(prompt + new - 1, self.network.config.context_length)
        state["cache"] = ring(kept, lengths, columns)
        last = ops.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        text = ops.concatenate([tokens, ops.zeros((batch, new), "int32")], axis=1)
        token, text = self._write(last, text, 0, state["head"], given)
        return {**state, "token": token, "text": text, "ended": ops.equal(token, self.separator)}

    def _go_on(self, state: Any, given: dict[str, Any], step: Any, stop: Any) -> dict[str, Any]:
        """Writes tokens number `step` to `stop` - 1 of each text."""
        matrices, head = state["matrices"], state["head"]
        config = self.network.config

        def write(step: Any, token: Any, text: Any, ended: Any, cache: Any) -> Any:
            positions = given["lengths"] + step - 1
            if config.positions == "learned":  # a text that is at its end waits for the others
                positions = ops.minimum(positions, config.context_length - 1)
            hidden, cache = self.network.read(token[:, None], cache, positions, text, matrices)
            token, text = self._write(hidden[:, 0], text, step, head, given)
            ended = ops.logical_or(ended, ops.equal(token, self.separator))
            return step + 1, token, text, ended, cache

        _, token, text, ended, cache = ops.while_loop(
            lambda step, token, text, ended, cache: (step < stop) & ~ops.all(ended),
            write,
            (step, *(state[name] for name in ("token", "text", "ended", "cache"))),
        )
        return {**state, "token": token, "text": text, "ended": ended, "cache": cache}

    def _write(
        self, hidden: Any, text: Any, step: Any, head: Any, given: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Chooses token number `step` of each text from hidden states (B, C) and writes it."""
        batch, _, rounds = given["uniforms"].shape
        scores = logits(hidden, head) + given["banned"]
        uniforms = ops.slice(given["uniforms"], (0, step, 0), (batch, 1, rounds))[:, 0]
        tokens = next_tokens(scores, text, uniforms, given["knobs"], self.separator, self.ask)
        columns = ops.arange(text.shape[1], dtype="int32")
        here = columns == given["lengths"][:, None] + step
        return tokens, ops.where(here, tokens[:, None], text)


class Written(NamedTuple):
    """What is written after a prompt.

    Attributes:
        ids: The new tokens, without the separator that ends them.
        ended: Whether the model has ended the text.
        final: Whether no more tokens follow, since the text has ended or has as many as it may.
    """

    ids: npt.NDArray[np.int32]
    ended: bool
    final: bool


class Continued(NamedTuple):
    """A prompt with its continuation.

    Attributes:
        text: Both, as readable text.
        ended: Whether the model has ended the text.
    """

    text: str
    ended: bool


class Generator:
    """Continues prompts with a trained model; keeps its compiled loops between calls.

    Args:
        network: The model.
        tokenizer: The tokenizer that the model was trained with.
        jit_compile: Whether TensorFlow compiles each new shape with XLA. The first call of a shape
            then takes seconds longer, and later ones less time per token. The texts differ only
            where rounding decides.
    """

    def __init__(self, network: MiniGPT, tokenizer: Tokenizer, jit_compile: bool = False) -> None:
        self.network, self.tokenizer, self.jit_compile = network, tokenizer, jit_compile
        self._loops: dict[tuple[Any, ...], DecodingLoop] = {}
        self._warned = False

    def __call__(self, prompts: Sequence[str], sampling: SamplingConfig) -> list[str]:
        """Continues each prompt.

        Args:
            prompts: Texts; of one longer than the context, the model sees the last tokens, if it
                has rotary positions.
            sampling: How the tokens are chosen.

        Returns:
            Each prompt with its continuation, as readable text.

        Raises:
            InputError: There is no prompt, or one is empty, has no known word or does not fit.
        """
        return [text for text, _ in self.continued(prompts, sampling)]

    def stream(self, prompts: Sequence[str], sampling: SamplingConfig) -> Iterator[list[str]]:
        """Continues each prompt and yields the whole texts after every token.

        Texts are whole because a token decides about the space before it and about quotes that
        were opened earlier.

        Args:
            prompts: Texts; of one longer than the context, the model sees the last tokens, if it
                has rotary positions.
            sampling: How the tokens are chosen.

        Yields:
            Each prompt with its continuation so far; at the end, what a call returns.

        Raises:
            InputError: There is no prompt, or one is empty, has no known word or does not fit.
        """
        rows = encode(self.tokenizer, prompts)
        for written in self._written(rows, sampling, range(1, sampling.max_tokens + 1)):
            yield [
                self.tokenizer.complete(prompt, ids, final)
                for prompt, (ids, _, final) in zip(prompts, written, strict=True)
            ]

    def tokens(
        self, prompts: Sequence[np.ndarray], sampling: SamplingConfig
    ) -> list[npt.NDArray[np.int32]]:
        """Continues each prompt, in token ids, as `written` does; returns the ids alone."""
        return [text.ids for text in self.written(prompts, sampling)]

    def written(self, prompts: Sequence[np.ndarray], sampling: SamplingConfig) -> list[Written]:
        """Continues each prompt, in token ids.

        Args:
            prompts: The token ids of each prompt, at least one.
            sampling: How the tokens are chosen. Text b draws its numbers from (seed, b) alone.

        Returns:
            The new tokens of each text: up to the separator, else `max_tokens` or as many as fit
            into the context of a network with learned positions.

        Raises:
            InputError: There is no prompt, or one does not fit.
        """
        return next(self._written(prompts, sampling, [sampling.max_tokens]))

    def check(self, prompts: Sequence[np.ndarray]) -> None:
        """Checks the length of prompts, given as token ids.

        Raises:
            InputError: A prompt is longer than a network with learned positions can read.
        """
        config = self.network.config
        longest = max(map(len, prompts), default=0)
        if config.positions == "learned" and longest > config.context_length:
            raise InputError(
                f"a prompt has {longest} tokens, but the model reads at most "
                f"{config.context_length}: shorten it, or train with model.positions rotary"
            )

    def continued(self, prompts: Sequence[str], sampling: SamplingConfig) -> list[Continued]:
        """Continues each prompt, as a call does, and tells which texts have ended."""
        rows = encode(self.tokenizer, prompts)
        written = self.written(rows, sampling)
        return [
            Continued(self.tokenizer.complete(prompt, ids), ended)
            for prompt, (ids, ended, _) in zip(prompts, written, strict=True)
        ]

    def _written(
        self, prompts: Sequence[np.ndarray], sampling: SamplingConfig, stops: Iterable[int]
    ) -> Iterator[list[Written]]:
        """Yields what is written of each text up to each stop, until all have ended."""
        if not prompts:
            raise InputError("there is no prompt: give at least one")
        self.check(prompts)
        config = self.network.config
        kept = [np.asarray(prompt, "int32")[-config.context_length :] for prompt in prompts]
        lengths = np.array([len(prompt) for prompt in kept], "int32")
        ends = self._ends(lengths, sampling.max_tokens)
        longest = int(ends.max())
        columns = min(_padded(int(lengths.max())), config.context_length)
        tokens = np.stack([np.pad(p, (0, columns - len(p))) for p in kept])
        drawn = [uniforms(sampling, row, _padded(longest)) for row in range(len(kept))]
        never = banned(self.tokenizer, config.vocabulary_size, sampling.allow_unknown)
        values = knobs([sampling] * len(kept))
        given = {
            "lengths": ops.convert_to_tensor(lengths),
            "uniforms": ops.convert_to_tensor(np.stack(drawn)),
            "banned": ops.convert_to_tensor(never),
            "knobs": {name: ops.convert_to_tensor(value) for name, value in values.items()},
        }
        loop = self._loop((*tokens.shape, *drawn[0].shape), asked(values, np))
        state, done = loop.start(ops.convert_to_tensor(tokens), given), 1
        for stop in stops:
            stop = min(stop, longest)
            if stop > done:
                limits = (ops.convert_to_tensor(number, "int32") for number in (done, stop))
                state, done = loop.go_on(state, given, *limits), stop
            text = ops.convert_to_numpy(state["text"])
            rows = zip(text, lengths, ends, strict=True)
            yield [
                self._row(row[length : length + min(stop, end)], end) for row, length, end in rows
            ]
            if stop == longest or ops.all(state["ended"]):
                return

    def _row(self, ids: npt.NDArray[np.int32], end: int) -> Written:
        """Returns what was written of a text that may have `end` tokens."""
        ends = np.flatnonzero(ids == self.tokenizer.separator)
        if len(ends):
            return Written(ids[: ends[0]], True, True)
        return Written(ids, False, len(ids) == end)

    def _ends(self, lengths: npt.NDArray[np.int32], asked: int) -> npt.NDArray[np.int32]:
        """Returns the number of tokens that are written after prompts of these lengths, (B,)."""
        config = self.network.config
        ends = np.full_like(lengths, asked)
        if config.positions == "learned":  # the last token of a text is not read
            ends = np.minimum(ends, config.context_length + 1 - lengths)
        if ends.min() < asked and not self._warned:
            self._warned = True
            log.warning(
                "texts end after %s tokens, those of the prompt included: the model has learned "
                "positions, and no more of them",
                config.context_length + 1,
            )
        return ends

    def _loop(self, shape: tuple[int, ...], ask: Asked) -> DecodingLoop:
        """Returns the loop for a shape and samplers; drops the one that was used longest ago."""
        loop = self._loops.pop((shape, ask), None)
        self._loops[shape, ask] = loop or DecodingLoop(
            self.network, ask, self.tokenizer.separator, self.jit_compile
        )
        if len(self._loops) > LOOPS_KEPT:
            del self._loops[next(iter(self._loops))]
        return self._loops[shape, ask]


def banned(tokenizer: Tokenizer, rows: int, allow_unknown: bool) -> npt.NDArray[np.float32]:
    """Returns -inf for each row of the head that is never written, and 0 for the others.

    Args:
        tokenizer: The model's.
        rows: V, which may be more than there are tokens.
        allow_unknown: Whether [UNK] may be written.
    """
    found = np.zeros(rows, "float32")
    for never in (tokenizer.padding, None if allow_unknown else tokenizer.unknown):
        if never is not None:
            found[never] = -np.inf
    found[len(tokenizer) :] = -np.inf
    return found


def _padded(length: int) -> int:
    return -(-length // STEP) * STEP


def compiled(
    function: Callable[..., Any], network: MiniGPT, jit_compile: bool
) -> Callable[..., Any]:
    """Compiles a function of tensors. Each call reads the weights that the network then has."""
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

"""Slots: texts of different prompts, lengths and samplers, written by one compiled loop.

A text takes a slot, keeps it while it is written, and leaves it to another one between two calls of
the loop, as in continuous batching (Yu et al., 2022, Orca). Only as many slots are computed as are
needed, in a few sizes that are compiled before. In float32 a text does not depend on that, nor on
its neighbours, nor on how many tokens a call writes.

Shapes: S slots, N tokens that a call writes, at most STEPS, A prompts that are read together, P
columns of a prompt, L columns of a text, R uniform numbers per token, V words, H heads, K columns
of the cache, D width of a head, C listed candidates.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from minigpt.config import SamplingConfig
from minigpt.data.interface import Tokenizer
from minigpt.generation.decoding import banned, compiled
from minigpt.generation.sampling import ROUNDS, asked, knobs, largest, next_tokens
from minigpt.model.head import logits
from minigpt.model.network import MiniGPT, ring
from minigpt.serving.requests import MOST_LOGPROBS

SHORTEST = 16  # columns that a prompt has at least; the next sizes are 4 times as large each
TOGETHER = (1, 8)  # prompts that are read at once
SIZES = (1, 4, 8, 16)  # slots that a step computes: the smallest that holds the texts, or all
STEPS = 32  # tokens of each text that a call writes at most


class Written(NamedTuple):
    """What a call has written.

    Attributes:
        tokens: int32 (S, N).
        own: float32 (S, N), the log-probability of each token, in nats, before the sampler's
            settings; it and the candidates are zeros unless they were asked for.
        candidates: int32 (S, N, C), the most probable tokens, the most probable one first.
        logprobs: float32 (S, N, C), those of the candidates; -inf where there are fewer tokens.
    """

    tokens: npt.NDArray[np.int32]
    own: npt.NDArray[np.float32]
    candidates: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


class Slots:
    """Texts that are being written, on the device.

    The compiled functions pass on the state:
        text: int32 (S, L), in each row the prompt, the new tokens, and padding.
        token: int32 (S,), the last token of each text, which is not read yet.
        length: int32 (S,), the tokens of each text.
        cache: keys and values of each block, (S, H, K, D), a ring (see `network.ring`).

    Args:
        network: The model, which computes in float32.
        tokenizer: The tokenizer that the model was trained with.
        most: The most slots.
        longest: The most new tokens of a text.
        eager: Steps until TensorFlow compiles, which takes longer than a few of them. JAX compiles
            at once.
    """

    def __init__(
        self,
        network: MiniGPT,
        tokenizer: Tokenizer,
        most: int,
        longest: int,
        eager: int = 0,
    ) -> None:
        config = network.config

        def made(function: Callable[..., Any]) -> Callable[..., Any]:
            fast = compiled(function, network, False)
            return lambda *given: (function if self._eager > 0 else fast)(*given)

        self._eager = eager if keras.backend.backend() == "tensorflow" else 0

        self.network, self.context = network, config.context_length
        self.sizes = [size for size in SIZES if size < most] + [most]
        self._columns = self.context + longest
        self._separator = -1 if tokenizer.separator is None else tokenizer.separator
        self._read, self._write = made(self._reads), made(self._writes)
        self._score = made(self._scores)
        self._take, self._put = made(_taken), made(_with_rows)
        allowed, known = (
            ops.convert_to_tensor(banned(tokenizer, config.vocabulary_size, allow_unknown))
            for allow_unknown in (True, False)
        )
        self._weights = {**made(network.prepared)(), "allowed": allowed, "known": known}
        self._rows = [SamplingConfig(max_tokens=1)] * most
        self._given: dict[str, Any] | None = None
        self._numbers = np.zeros((most, STEPS, ROUNDS), "float32")
        shape = most, config.num_heads, self.context, config.key_dim
        empty = ops.zeros(shape, network.compute_dtype)
        self._state: dict[str, Any] = {
            "text": ops.zeros((most, self._columns), "int32"),
            "token": ops.zeros((most,), "int32"),
            "length": ops.ones((most,), "int32"),
            "cache": [(empty, empty) for _ in network.blocks],
        }

    @property
    def size(self) -> int:
        """S, the slots that a step computes."""
        return int(self._state["token"].shape[0])

    def fits(self, prompt: int, asked: int) -> int:
        """Returns how many of the asked tokens can be written after a prompt of so many."""
        if self.network.config.positions != "learned":
            return asked
        return max(0, min(asked, self.context + 1 - prompt))  # the last token is not read

    def warm(self) -> None:
        """Compiles everything, so that no request waits for it."""
        sampling = SamplingConfig(max_tokens=1)
        for columns in _prompt_columns(self.context):
            for together in TOGETHER:
                self.read([(0, np.ones(columns, "int32"), sampling)] * min(together, 2))
        for size in self.sizes[::-1]:
            self.write([None] * size, 1, False)
            for together in TOGETHER:
                self.read([(0, np.ones(1, "int32"), sampling)] * min(together, 2))
            self.put(0, self.take(0), sampling)
        self.score(np.ones(1, "int32"))

    def read(self, newcomers: Sequence[tuple[int, npt.NDArray[np.int32], SamplingConfig]]) -> None:
        """Reads prompts into slots; the next call of `write` writes the first token after each.

        Args:
            newcomers: Of each its slot, its token ids, of which the last ones are read if there are
                more than the context, and how its tokens are chosen.
        """
        rows = [(slot, prompt[-self.context :]) for slot, prompt, _ in newcomers]
        self._hold([(slot, sampling) for slot, _, sampling in newcomers])
        for columns in _prompt_columns(self.context):
            fitting = [row for row in rows if len(row[1]) <= columns]
            rows = [row for row in rows if len(row[1]) > columns]
            while fitting:
                together = TOGETHER[0] if len(fitting) == 1 else TOGETHER[1]
                some, fitting = fitting[:together], fitting[together:]
                some += some[-1:] * (together - len(some))
                tokens = np.zeros((together, columns), "int32")
                for row, (_, prompt) in zip(tokens, some, strict=True):
                    row[: len(prompt)] = prompt
                lengths = np.array([len(prompt) for _, prompt in some], "int32")
                slots = np.array([slot for slot, _ in some], "int32")
                tokens, lengths, slots = map(ops.convert_to_tensor, (tokens, lengths, slots))
                read = self._read(tokens, lengths, self._weights)
                self._state = self._put(self._state, read, slots)

    def write(
        self, numbers: Sequence[npt.NDArray[np.float32] | None], steps: int, listed: bool
    ) -> Written:
        """Writes tokens of each text.

        Args:
            numbers: Of each slot the uniform numbers (N, R) of its next tokens; None: it is free.
                There may be fewer than slots, and fewer than N of a text that may end before.
            steps: N.
            listed: Whether log-probabilities are computed.
        """
        size = next(size for size in self.sizes if size >= len(numbers))
        if size != self.size:
            self._resize(size)
        used = np.zeros(size, "int32")
        for slot, uniforms in enumerate(numbers):
            if uniforms is not None:
                count, rounds = uniforms.shape
                self._numbers[slot, :count, :rounds] = uniforms
                used[slot] = 1
        self._given = self._given or _settings(self._rows[:size])
        given = {
            **self._given,
            "numbers": ops.convert_to_tensor(self._numbers[:size]),
            "steps": ops.convert_to_tensor(steps, "int32"),
            "listed": ops.convert_to_tensor(listed),
            "used": ops.convert_to_tensor(used),
        }
        self._state, written = self._write(self._state, self._weights, given)
        self._eager -= steps
        return Written(*(ops.convert_to_numpy(each)[:, :steps] for each in written))

    def score(self, prompt: npt.NDArray[np.int32]) -> Written:
        """Returns the tokens of a prompt that follow on the first one that is read, (1, N).

        They have log-probabilities, as if they had been written.
        """
        kept = prompt[-self.context :]
        tokens = np.zeros((1, self.context), "int32")
        tokens[0, : len(kept)] = kept
        scored = self._score(ops.convert_to_tensor(tokens), self._weights)
        return Written(*(ops.convert_to_numpy(each)[None, : len(kept) - 1] for each in scored))

    def take(self, slot: int) -> Any:
        """Returns the text of a slot, for `put`."""
        return self._take(self._state, _int32([slot]))

    def put(self, slot: int, row: Any, sampling: SamplingConfig) -> None:
        """Puts a text into a slot, any one, to go on there."""
        self._hold([(slot, sampling)])
        self._state = self._put(self._state, row, _int32([slot]))

    def _hold(self, rows: Sequence[tuple[int, SamplingConfig]]) -> None:
        """Remembers how the tokens of slots are chosen, and makes room for the slots."""
        for slot, sampling in rows:
            self._rows[slot] = sampling
        self._given = None
        need = 1 + max(slot for slot, _ in rows)
        if need > self.size:
            self._resize(next(size for size in self.sizes if size >= need))

    def _resize(self, size: int) -> None:
        """Drops the last slots, or adds free ones."""
        self._given, more = None, size - self.size

        def resized(x: Any) -> Any:
            if more <= 0:
                return x[:size]
            return ops.concatenate([x, ops.ones((more, *x.shape[1:]), x.dtype)])

        self._state = _each(resized, self._state)

    def _reads(self, tokens: Any, lengths: Any, weights: Any) -> dict[str, Any]:
        """Reads all tokens (A, P) of prompts but the last, which the next step reads."""
        _, kept = self.network.read(tokens, matrices=weights["matrices"])
        return {
            "text": ops.pad(tokens, ((0, 0), (0, self._columns - tokens.shape[1]))),
            "token": ops.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0],
            "length": lengths,
            "cache": ring(kept, lengths, self.context),
        }

    def _scores(self, tokens: Any, weights: Any) -> tuple[Any, ...]:
        hidden, _ = self.network.read(tokens, matrices=weights["matrices"])
        scores = logits(hidden[0, :-1], weights["head"])
        return tokens[0, 1:], *_listed(scores, weights, tokens[0, 1:])

    def _writes(self, state: Any, weights: Any, given: Any) -> tuple[Any, Any]:
        learned, ask = self.network.config.positions == "learned", asked(given["knobs"])
        size, columns = state["text"].shape
        candidates = min(MOST_LOGPROBS, self.network.config.vocabulary_size)

        def write(step: Any, state: Any, written: Any) -> Any:
            text, length = state["text"], state["length"]
            positions = length - 1
            if learned:  # of a slot whose text has filled them
                positions = ops.minimum(positions, self.context - 1)
            hidden, cache = self.network.read(
                state["token"][:, None], state["cache"], positions, text, weights["matrices"]
            )
            scores = logits(hidden[:, 0], weights["head"])  # (S, V)
            choosable = ops.cond(
                ops.any(given["allow"]),
                lambda: scores + ops.where(given["allow"], weights["allowed"], weights["known"]),
                lambda: scores + weights["known"],
            )
            numbers = ops.slice(given["numbers"], (0, step, 0), (size, 1, ROUNDS))[:, 0]
            tokens = next_tokens(choosable, text, numbers, given["knobs"], self._separator, ask)
            here = ops.arange(columns, dtype="int32") == length[:, None]
            state = {
                "text": ops.where(here, tokens[:, None], text),
                "token": tokens,
                "length": length + given["used"],  # a free slot stays where it is
                "cache": cache,
            }
            this = ops.arange(STEPS, dtype="int32") == step

            def listed() -> list[Any]:
                found = _listed(scores, weights, tokens)
                return [
                    ops.where(ops.reshape(this, (-1, *[1] * (new.ndim - 1))), new[:, None], all_)
                    for new, all_ in zip(found, written[1:], strict=True)
                ]

            others = ops.cond(given["listed"], listed, lambda: written[1:])
            return step + 1, state, [ops.where(this, tokens[:, None], written[0]), *others]

        written = [
            ops.zeros((size, STEPS, *more), dtype)
            for more, dtype in (
                ((), "int32"),
                ((), "float32"),
                ((candidates,), "int32"),
                ((candidates,), "float32"),
            )
        ]
        start = ops.zeros((), "int32"), state, written
        _, state, written = ops.while_loop(lambda step, *_: step < given["steps"], write, start)
        return state, written


def _prompt_columns(context: int) -> list[int]:
    """Returns the numbers of columns that prompts are filled up to."""
    found = [SHORTEST]
    while found[-1] < context:
        found.append(found[-1] * 4)
    return [*found[:-1], context]


def _settings(rows: Sequence[SamplingConfig]) -> dict[str, Any]:
    allow = np.array([[row.allow_unknown] for row in rows])
    return {
        "knobs": {name: ops.convert_to_tensor(values) for name, values in knobs(rows).items()},
        "allow": ops.convert_to_tensor(allow),
    }


def _int32(values: Any) -> Any:
    return ops.convert_to_tensor(np.asarray(values, "int32"))


def _taken(state: Any, slots: Any) -> Any:
    return _each(lambda x: ops.take(x, slots, axis=0), state)


def _with_rows(state: Any, rows: Any, slots: Any) -> Any:
    """Replaces slots of the state."""

    def replaced(x: Any, new: Any) -> Any:
        return ops.scatter_update(x, slots[:, None], ops.cast(new, x.dtype))

    return _each(replaced, state, rows)


def _each(function: Any, state: Any, *others: Any) -> Any:
    """Applies a function to each tensor of states."""
    if isinstance(state, dict):
        return {name: _each(function, state[name], *(o[name] for o in others)) for name in state}
    if isinstance(state, list | tuple):
        return type(state)(_each(function, *each) for each in zip(state, *others, strict=True))
    return function(state, *others)


def _listed(scores: Any, weights: Any, tokens: Any) -> tuple[Any, ...]:
    """Returns what `Written` says of tokens (N,) with scores (N, V): own, candidates, logprobs."""
    logprobs = ops.log_softmax(scores)
    own = ops.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    named = ops.where(weights["allowed"] > float("-inf"), logprobs, float("-inf"))
    values, candidates = largest(named, MOST_LOGPROBS)
    return own, candidates, values

"""Writing text: samplers that choose the next token, and one loop that owns decoding.

The prompts are read once (prefill); then each token costs one position, since keys and values of
those before are cached.  Positions are learned and absolute: once a text outgrows the context its
window slides, every position shifts, and keys and values are computed afresh from the last tokens.
Shapes: B texts, P prompt columns, N tokens to write, V words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import keras
import numpy as np
import pyarrow as pa
from keras import ops

from minigpt.errors import InputError
from minigpt.model import MiniGPT
from minigpt.text import detokenise, tokenise
from minigpt.vocabulary import PADDING, UNKNOWN, Vocabulary

PROMPT_STEP = 16  # prompts are padded to a multiple of it: few shapes, so few compilations
LOOPS_KEPT = 16  # compiled loops, so that a server asked for ever new shapes keeps its memory


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in the order of application.

    Attributes:
        max_tokens: N, tokens written after the prompt.
        temperature: divides the logits; 0 takes the most probable token (greedy).
        top_k: keep the k most probable tokens (Fan et al., 2018); 0: all.
        top_p: keep the most probable tokens up to this mass (Holtzman et al., 2020); 1: all.
        min_p: keep tokens of at least this share of the top one's probability (Nguyen et al.,
            2024); 0: all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that stand in
            the text (Keskar et al., 2019); 1: off.
        allow_unknown: whether [UNK] may be written.
        seed: the same seed writes the same text.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    allow_unknown: bool = False
    seed: int = 0


def penalise(logits: Any, text: Any, penalty: Any) -> Any:
    """Makes tokens that stand in the text less probable (Keskar et al., 2019).

    Args:
        logits: (B, V).
        text: int32 (B, L), token ids.
        penalty: above 1 discourages.

    Returns:
        (B, V).
    """
    batch, length = ops.shape(text)
    scores = ops.take_along_axis(logits, text, axis=1)
    scores = ops.where(scores > 0, scores / penalty, scores * penalty)
    rows = ops.repeat(ops.arange(batch), length)
    indices = ops.stack([rows, ops.reshape(text, (-1,))], axis=1)
    return ops.scatter_update(logits, indices, ops.reshape(scores, (-1,)))


def choose(
    logits: Any, uniforms: Any, temperature: Any, top_k: int, nucleus: tuple[Any, Any] | None
) -> Any:
    """Draws a token from each row by inverting its distribution function at a uniform number.

    Args:
        logits: (B, V).
        uniforms: float32 (B, 1) in [0, 1).
        temperature: above 0.
        top_k: tokens kept; 0: all.
        nucleus: top_p and min_p; None when neither cuts anything off, which spares a sort.

    Returns:
        int32 (B,), token ids.
    """
    logits = logits / temperature
    words = logits.shape[-1]
    ids = None
    if top_k or nucleus:
        logits, ids = ops.top_k(logits, min(top_k, words) if top_k else words)
    probabilities = ops.softmax(logits)
    if nucleus:
        top_p, min_p = nucleus
        before = ops.cumsum(probabilities, axis=-1) - probabilities
        kept = (before < top_p) & (probabilities >= min_p * probabilities[:, :1])
        probabilities = ops.where(kept, probabilities, 0.0)
    mass = ops.cumsum(probabilities, axis=-1)
    # Kept below 1, so that rounding can't reach the last token where its probability is 0.
    drawn = ops.minimum(uniforms, 1 - 1e-6) * mass[:, -1:]
    # A sum in parallel (JAX's) wavers in its last bits, also where a probability is 0.
    reached = (mass > drawn) & (probabilities > 0)
    index = ops.argmax(ops.cast(reached, "int32"), axis=-1, keepdims=True)
    return ops.cast(
        (index if ids is None else ops.take_along_axis(ids, index, axis=1))[:, 0], "int32"
    )


class DecodingLoop(keras.Model):
    """The loop for one kind of sampling, as a model, so that Keras compiles it on each backend.

    Args:
        network: the model that is read.
        greedy: whether the most probable token is taken.
        top_k: tokens kept; 0: all.
        nucleus: whether top_p or min_p cut anything off.
        penalised: whether a repetition penalty applies.
    """

    def __init__(
        self, network: MiniGPT, greedy: bool, top_k: int, nucleus: bool, penalised: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.greedy, self.top_k, self.nucleus, self.penalised = greedy, top_k, nucleus, penalised
        self.built = True

    def call(self, inputs: dict[str, Any]) -> Any:
        """Writes N tokens after each prompt.

        Args:
            inputs: `tokens` int32 (B, P), aligned on the right; `padding` int32 (B,), columns
                before each prompt; `uniforms` float32 (B, N); `banned` float32 (V,), -inf where a
                word may not be written, else 0; `knobs` float32 (4,): temperature, top_p, min_p
                and the repetition penalty.

        Returns:
            int32 (B, N).
        """
        tokens, padding, uniforms = inputs["tokens"], inputs["padding"], inputs["uniforms"]
        context = int(self.network.settings["context_length"])
        batch, (prompt, new) = ops.shape(tokens)[0], (tokens.shape[1], uniforms.shape[1])
        # The cache ends where the longest prompt's text fills the context.
        capacity = min(prompt + new - 1, context + PROMPT_STEP - 1)
        full = context + ops.min(padding)

        def pick(hidden: Any, text: Any, step: Any) -> Any:
            logits = self.network.project(hidden[:, -1]) + inputs["banned"]
            temperature, top_p, min_p, penalty = (inputs["knobs"][i] for i in range(4))
            if self.penalised:
                logits = penalise(logits, text, penalty)
            if self.greedy:
                token = ops.cast(ops.argmax(logits, axis=-1), "int32")
            else:
                drawn = ops.slice(uniforms, (0, step), (batch, 1))
                nucleus = (top_p, min_p) if self.nucleus else None
                token = choose(logits, drawn, temperature, self.top_k, nucleus)
            return ops.slice_update(text, (0, prompt + step), token[:, None])

        def cached(step: Any, text: Any, cache: Any) -> Any:
            column = prompt + step - 1
            token = ops.slice(text, (0, column), (batch, 1))
            hidden, cache = self.network.advance(token, column, padding, cache)
            return step + 1, pick(hidden, text, step), cache

        def slid(step: Any, text: Any) -> Any:
            start = prompt + step - context
            window = ops.slice(text, (0, start), (batch, context))
            hidden, _ = self.network.advance(
                window,
                0,
                ops.maximum(padding - start, 0),
                self.network.empty_cache(batch, context),
            )
            return step + 1, pick(hidden, text, step)

        cache = self.network.empty_cache(batch, max(capacity, prompt))
        hidden, cache = self.network.advance(tokens, 0, padding, cache)
        text = ops.concatenate([tokens, ops.zeros((batch, new), "int32")], axis=1)
        text = pick(hidden, text, 0)
        step, text, _ = ops.while_loop(
            lambda step, text, cache: (step < new) & (prompt + step - 1 < full),
            cached,
            (ops.convert_to_tensor(1, "int32"), text, cache),
        )
        if prompt + new > context:
            _, text = ops.while_loop(lambda step, text: step < new, slid, (step, text))
        return text[:, prompt:]


class Generator:
    """Writes texts with a trained model; its compiled loops are kept between calls.

    Args:
        network: the model.
        vocabulary: the one that it was trained with.
        style: the standardisation of the vocabulary's tokens.
    """

    def __init__(self, network: MiniGPT, vocabulary: Vocabulary, style: str) -> None:
        self.network, self.vocabulary, self.style = network, vocabulary, style
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
        written = self.tokens(rows, sampling)
        return [
            detokenise([*prompt, *self.vocabulary.decode(row)])
            for prompt, row in zip(spelled, written, strict=True)
        ]

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
        if not prompts:
            raise InputError("no prompt was given: name at least one")
        context = int(self.network.settings["context_length"])
        kept = [np.asarray(prompt, "int32")[-context:] for prompt in prompts]
        longest = max(len(prompt) for prompt in kept)
        columns = min(-(-longest // PROMPT_STEP) * PROMPT_STEP, context)
        padding = np.array([columns - len(prompt) for prompt in kept], "int32")
        tokens = np.stack([np.pad(p, (columns - len(p), 0)) for p in kept])
        uniforms = np.stack(
            [
                np.random.default_rng([sampling.seed, row]).random(sampling.max_tokens, "float32")
                for row in range(len(kept))
            ]
        )
        banned = np.zeros(int(self.network.settings["vocabulary_size"]), "float32")
        banned[[PADDING, *([] if sampling.allow_unknown else [UNKNOWN])]] = -np.inf
        banned[len(self.vocabulary.tokens) :] = -np.inf  # rows of the head that no word has
        knobs = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
        return np.asarray(
            self._loop(sampling, tokens.shape).predict_on_batch(
                {
                    "tokens": tokens,
                    "padding": padding,
                    "uniforms": uniforms,
                    "banned": banned,
                    "knobs": np.array(knobs, "float32"),
                }
            )
        )

    def _loop(self, sampling: Sampling, shape: tuple[int, ...]) -> DecodingLoop:
        kind = (
            sampling.temperature == 0 or sampling.top_k == 1,
            sampling.top_k,
            sampling.top_p < 1 or sampling.min_p > 0,
            sampling.repetition_penalty != 1,
        )
        # One loop for each shape: on a second shape Keras would trace for shapes unknown.
        key = (*kind, *shape, sampling.max_tokens)
        if key not in self._loops:
            loop = DecodingLoop(self.network, *kind)
            # XLA is slower than TensorFlow's own kernels here on a CPU, and JAX has nothing else.
            loop.compile(jit_compile=keras.backend.backend() == "jax")
            if len(self._loops) >= LOOPS_KEPT:
                del self._loops[next(iter(self._loops))]
            self._loops[key] = loop
        return self._loops[key]

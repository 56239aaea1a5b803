"""Rows about writing: against the published script, against KerasHub, and from a cold start.

KerasHub is no dependency; its rows are left out where it can't be imported.  To have them:
`pip install --no-deps --target DIR keras-hub regex kagglehub kagglesdk sentencepiece tokenizers`,
then PYTHONPATH=DIR.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from benchmarks import script
from benchmarks.measure import (
    SCRIPT,
    NotMeasuredError,
    Options,
    Result,
    compare,
    compare_processes,
    run,
)
from benchmarks.training import network
from minigpt.data.tokenizer import SPECIAL_TOKENS, Vocabulary
from minigpt.generation.decoding import Generator
from minigpt.generation.sampling import Sampling
from minigpt.model import directory

TOKENS, MOST = (6, 3) if script.TINY else (40, 64)  # prompts at once
SCRIPT_TOKENS = 3 if script.TINY else 10  # of its side, each of which takes as long as any other
PROMPT = 3  # words; "this movie is"


def published(options: Options, batch: int, jit_compile: bool) -> Result:
    """Seconds a token, warm: `batch` prompts at once against the script, which takes one by one."""
    batch = min(batch, MOST)
    sides = ("here", str(batch), "xla" if jit_compile else ""), (SCRIPT,)
    units = TOKENS * batch, SCRIPT_TOKENS
    return Result(*compare_processes(f"{__name__}.writer", *sides, options.rounds, units=units))


def writer(side: str, batch: str = "1", xla: str = "") -> Callable[[], Any]:
    """What writes on either side, which has the process to itself."""
    if side == "here":
        return ours(int(batch), script.WIDTH, bool(xla))
    theirs, rng = script.compiled_model(), np.random.default_rng(0)
    return lambda: script.generate(theirs, list(range(2, 2 + PROMPT)), SCRIPT_TOKENS, rng)


def peer(options: Options, batch: int, jit_compile: bool) -> Result:
    """Seconds a token, warm, against KerasHub's cached `generate`, both compiled alike.

    In one process, so both have what `backend.choose` set.
    """
    batch = min(batch, MOST)
    there = keras_hub(batch, jit_compile)
    # KerasHub's heads share the width, so ours do.
    here = ours(batch, script.WIDTH // script.HEADS, jit_compile)
    return Result(*compare(here, there, options.rounds, units=(TOKENS * batch,) * 2))


def ours(batch: int, key_dim: int, jit_compile: bool) -> Callable[[], Any]:
    """Our side: `batch` prompts, continued all at once."""
    write = Generator(network(key_dim), words(), "spaced", jit_compile)
    prompts = [np.arange(2, 2 + PROMPT, dtype="int32") + row for row in range(batch)]
    seeds = iter(range(10**9))

    def once() -> Any:
        top_k = script.TOP_K
        return write.tokens(
            prompts, Sampling(TOKENS, top_k=top_k, allow_unknown=True, seed=next(seeds))
        )

    return once


def keras_hub(batch: int, jit_compile: bool) -> Callable[[], Any]:
    """KerasHub's cached `generate` of a GPT of the same size, made of its own layers."""
    try:
        import keras_hub as hub
    except ImportError:
        raise NotMeasuredError("keras_hub can't be imported") from None
    embed = hub.layers.TokenAndPositionEmbedding(
        script.VOCABULARY_SIZE, script.LENGTH, script.WIDTH, tie_weights=False
    )
    decoder = hub.layers.TransformerDecoder(script.WIDTH, script.HEADS, dropout=0.1)
    head = keras.layers.Dense(script.VOCABULARY_SIZE)

    @keras.saving.register_keras_serializable("benchmark")
    class Peer(hub.models.CausalLM):  # type: ignore[misc]
        def __init__(self) -> None:
            tokens = keras.Input((None,), dtype="int32")
            super().__init__(inputs=tokens, outputs=head(decoder(embed(tokens))))
            self.backbone = self.preprocessor = None

        def generate_step(self, inputs: dict[str, Any], stop_token_ids: Any = None) -> Any:
            """As the CausalLMs that KerasHub ships write it."""
            tokens, mask = inputs["token_ids"], inputs["padding_mask"]
            length = ops.shape(tokens)[1]
            width = script.WIDTH // script.HEADS
            cache = ops.zeros((ops.shape(tokens)[0], 2, length, script.HEADS, width))
            _, cache = self.advance(tokens, cache, 0)

            def following(prompt: Any, cache: Any, index: Any) -> Any:
                last = ops.slice(prompt, [0, index - 1], [ops.shape(prompt)[0], 1])
                hidden, cache = self.advance(last, cache, index - 1)
                return ops.squeeze(head(hidden), 1), None, cache

            index = ops.min(ops.sum(ops.cast(mask, "int32"), axis=-1))
            tokens = self.sampler(
                following, tokens, cache=cache, index=index, mask=mask, model=self
            )
            return {"token_ids": tokens, "padding_mask": mask}

        def advance(self, tokens: Any, cache: Any, index: Any) -> Any:
            return decoder(
                embed(tokens, start_index=index),
                self_attention_cache=cache,
                self_attention_cache_update_index=index,
            )

    peer = Peer()
    sampler = hub.samplers.TopKSampler(k=script.TOP_K)
    peer.compile(sampler=sampler, optimizer=None, loss=None, jit_compile=jit_compile)
    tokens = np.zeros((batch, PROMPT + TOKENS), "int32")
    tokens[:, :PROMPT] = np.arange(2, 2 + PROMPT) + np.arange(batch)[:, None]
    inputs = {"token_ids": tokens, "padding_mask": np.arange(PROMPT + TOKENS) < PROMPT + 0 * tokens}
    return lambda: peer.generate(inputs, stop_token_ids=None)


COLD = """
import sys, time
began = float(sys.argv[2])
import json
from pathlib import Path
from minigpt.common import backend
backend.choose()
from minigpt.model import directory
from minigpt.generation.decoding import Generator
from minigpt.generation.sampling import Sampling
imported = time.time()
found = directory.load(Path(sys.argv[1]))
loaded = time.time()
write = Generator(found.network, found.vocabulary, "spaced")
next(write.stream(["w2 w3 w4"], Sampling(40, top_k=10)))
first = time.time()
print(json.dumps({"all": first - began, "imports": imported - began,
                  "model": loaded - imported, "token": first - loaded}))
"""


def cold(options: Options) -> Result:
    """Seconds from the start of `python` to the first token of a model directory."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        directory.save(path, network(), words(), {"vocabulary": {"style": "spaced"}})
        for _ in range(options.rounds):
            said, _, _ = run(sys.executable, "-c", COLD, path, str(time.time()))
            for part, seconds in json.loads(said.splitlines()[-1]).items():
                found.setdefault(part, []).append(seconds)
    return Result(found.pop("all"), facts=found)


def words() -> Vocabulary:
    """A vocabulary of the published size."""
    return Vocabulary((*SPECIAL_TOKENS, *(f"w{i}" for i in range(2, script.VOCABULARY_SIZE))))

"""Rows about generation: against the published script, against KerasHub, and from a cold start.

KerasHub is no dependency; without it, its rows are skipped. To measure them, run
`pip install --no-deps --target DIR keras-hub regex kagglehub kagglesdk sentencepiece tokenizers`
and set PYTHONPATH=DIR.
"""

import itertools
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
from minigpt.config import SamplingConfig
from minigpt.data.tokenizer import SPECIAL_TOKENS, WordTokenizer
from minigpt.generation.decoding import Generator
from minigpt.model import directory

TOKENS, MOST = (6, 3) if script.TINY else (40, 64)  # new tokens per prompt, prompts at once
SCRIPT_TOKENS = 3 if script.TINY else 10  # the script takes equally long for every token
PROMPT = 3  # tokens, such as "this movie is"


def published(options: Options, batch: int, jit_compile: bool) -> Result:
    """Warm seconds per token: `batch` prompts together against the script, which takes one."""
    batch = min(batch, MOST)
    sides = ("here", str(batch), "xla" if jit_compile else ""), (SCRIPT,)
    units = TOKENS * batch, SCRIPT_TOKENS
    return Result(*compare_processes(f"{__name__}.side", *sides, options.rounds, units=units))


def side(name: str, batch: str = "1", xla: str = "") -> Callable[[], Any]:
    """Returns the function to time for one side, which has the process to itself."""
    if name == "here":
        return ours(int(batch), script.WIDTH, bool(xla))
    theirs, rng = script.compiled_model(), np.random.default_rng(0)
    return lambda: script.generate(theirs, list(range(2, 2 + PROMPT)), SCRIPT_TOKENS, rng)


def peer(options: Options, batch: int, jit_compile: bool) -> Result:
    """Warm seconds per token against KerasHub's cached `generate`, both compiled alike.

    Both run in one process, with the settings of `backend.choose`.
    """
    batch = min(batch, MOST)
    there = keras_hub(batch, jit_compile)
    # KerasHub's heads share the width, so here ours do too.
    here = ours(batch, script.WIDTH // script.HEADS, jit_compile)
    return Result(*compare(here, there, options.rounds, units=(TOKENS * batch,) * 2))


def ours(batch: int, key_dim: int, jit_compile: bool, dtype: str = "float32") -> Callable[[], Any]:
    """Returns a function that continues `batch` prompts together with our model."""
    generator = Generator(network(key_dim, dtype), tokenizer(), jit_compile)
    prompts = [np.arange(2, 2 + PROMPT, dtype="int32") + row for row in range(batch)]
    seeds = itertools.count()

    def once() -> Any:
        sampling = SamplingConfig(
            max_tokens=TOKENS, top_k=script.TOP_K, allow_unknown=True, seed=next(seeds)
        )
        return generator.tokens(prompts, sampling)

    return once


def keras_hub(batch: int, jit_compile: bool) -> Callable[[], Any]:
    """Returns KerasHub's cached `generate` for a GPT of the same size, made of its own layers."""
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
            """Generates as KerasHub's own CausalLMs do."""
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
with backend.importing("interrupted"):
    from minigpt.config import SamplingConfig
    from minigpt.serving import sources, terminal
imported = time.time()
folder = sources.Folder(Path(sys.argv[1]))
writer = terminal.Writer(folder, SamplingConfig(max_tokens=40, top_k=10), 1)
loaded = time.time()
writing = writer.start("w2 w3 w4", 0)
while not writing.row.tokens:
    writing.changed.acquire()
first = time.time()
print(json.dumps({"all": first - began, "imports": imported - began,
                  "model": loaded - imported, "token": first - loaded}))
"""


def cold(options: Options) -> Result:
    """Seconds from the start of `python` to the first token of a model directory."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        save_model(path)
        for _ in range(options.rounds):
            said, _, _ = run(sys.executable, "-c", COLD, path, str(time.time()))
            for part, seconds in json.loads(said.splitlines()[-1]).items():
                found.setdefault(part, []).append(seconds)
    return Result(found.pop("all"), facts=found)


def save_model(path: Path) -> None:
    """Writes a model directory of the published size, untrained."""
    sections: dict[str, dict[str, Any]] = {
        "vocabulary": {"style": "spaced", "max_tokens": script.VOCABULARY_SIZE},
        "sequences": {"policy": "windows", "length": script.LENGTH},
        "train": {"epochs": 1, "batch_size": script.BATCH, "learning_rate": 0.001},
    }
    directory.save(path, network(), tokenizer(), sections)


def tokenizer() -> WordTokenizer:
    """Returns a tokenizer of the published size."""
    made_up = (f"w{number}" for number in range(2, script.VOCABULARY_SIZE))
    return WordTokenizer((*SPECIAL_TOKENS, *made_up), "spaced")

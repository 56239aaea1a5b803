"""Measures decoding: against the published script, against KerasHub, and from a cold start.

    python benchmarks/decoding.py [--only one many peers cold] [--rounds 5] [--dtype float32]

KerasHub is no dependency; its rows are left out where it can't be imported.  To have them:
`pip install --no-deps --target DIR keras-hub regex kagglehub kagglesdk sentencepiece tokenizers`,
then PYTHONPATH=DIR.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import script
from keras import ops

from minigpt import model
from minigpt.decoding import Generator
from minigpt.sampling import Sampling
from minigpt.vocabulary import SPECIAL_TOKENS, Vocabulary

TOKENS, TOP_K, BATCH = 40, 10, 64
PROMPT = 3  # words; "this movie is"

Timed = Callable[[], float]  # does one round, and returns the seconds that one token took


def main() -> None:
    """Prints a line for each measurement, and all of them as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="of each side")
    parser.add_argument("--only", nargs="+", choices=["one", "many", "peers", "cold"])
    parser.add_argument("--dtype", default="float32", help="dtype policy of our side")
    args = parser.parse_args()
    wanted = args.only or ["one", "many", "peers", "cold"]
    results: dict[str, Any] = {}
    if "one" in wanted:
        sides = ours(1, dtype=args.dtype), published()
        results["one prompt"] = compare("one prompt", *sides, args.rounds)
    if "many" in wanted:
        sides = ours(BATCH, dtype=args.dtype), published()
        results["64 prompts"] = compare(f"{BATCH} prompts at once", *sides, args.rounds)
    for batch in (1, BATCH) if "peers" in wanted else ():
        # KerasHub's heads share the width, so ours do.
        here = ours(batch, script.WIDTH // script.HEADS, args.dtype)
        for compiled in (False, True):
            peer = keras_hub(batch, compiled)
            if peer is None:
                print("KerasHub: skipped, keras_hub can't be imported")
                break
            name = f"KerasHub, {batch} at once, {'XLA' if compiled else 'no XLA'}"
            results[name] = compare(name, here, peer, args.rounds)
    if "cold" in wanted:
        results["cold start"] = cold_start(args.rounds)
    print(json.dumps(results))


def ours(batch: int, key_dim: int = script.WIDTH, dtype: str = "float32") -> Timed:
    """Our side: `batch` prompts, continued all at once."""
    write = Generator(_network(key_dim, dtype), _words(), "spaced")
    prompts = [np.arange(2, 2 + PROMPT, dtype="int32") + row for row in range(batch)]
    seeds = iter(range(10**9))

    def once() -> float:
        sampling = Sampling(TOKENS, top_k=TOP_K, allow_unknown=True, seed=next(seeds))
        began = time.perf_counter()
        write.tokens(prompts, sampling)
        return (time.perf_counter() - began) / (TOKENS * batch)

    return once


def published() -> Timed:
    """The script's way, one prompt at a time: for each token, all 80 positions are predicted."""
    network, rng = script.compiled_model(), np.random.default_rng(0)

    def once() -> float:
        tokens = list(range(2, 2 + PROMPT))
        began = time.perf_counter()
        for _ in range(TOKENS):
            padded = np.array([tokens + [0] * (script.LENGTH - len(tokens))])
            logits = network.predict(padded, verbose=0)[0, len(tokens) - 1]
            best, ids = ops.top_k(logits, TOP_K)
            shares = np.asarray(ops.softmax(best), "float64")
            tokens.append(int(rng.choice(np.asarray(ids), p=shares / shares.sum())))
        return (time.perf_counter() - began) / TOKENS

    return once


def keras_hub(batch: int, jit_compile: bool) -> Timed | None:
    """KerasHub's cached `generate` of a GPT of the same size, made of its own layers."""
    try:
        import keras_hub as hub
    except ImportError:
        return None
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

    network = Peer()
    sampler = hub.samplers.TopKSampler(k=TOP_K)
    network.compile(sampler=sampler, optimizer=None, loss=None, jit_compile=jit_compile)
    tokens = np.zeros((batch, PROMPT + TOKENS), "int32")
    tokens[:, :PROMPT] = np.arange(2, 2 + PROMPT) + np.arange(batch)[:, None]
    inputs = {"token_ids": tokens, "padding_mask": np.arange(PROMPT + TOKENS) < PROMPT + 0 * tokens}

    def once() -> float:
        began = time.perf_counter()
        network.generate(inputs, stop_token_ids=None)
        return (time.perf_counter() - began) / (TOKENS * batch)

    return once


COLD = """
import sys, time
began = float(sys.argv[2])
import json, os
from pathlib import Path
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
from minigpt import model
from minigpt.decoding import Generator
from minigpt.sampling import Sampling
imported = time.time()
found = model.load(Path(sys.argv[1]))
loaded = time.time()
write = Generator(found.network, found.vocabulary, "spaced")
next(write.stream(["w1 w2 w3"], Sampling(40, top_k=10)))
first = time.time()
print(json.dumps({"imports": imported - began, "model": loaded - imported,
                  "first token": first - loaded, "all": first - began}))
"""


def cold_start(rounds: int) -> dict[str, list[float]]:
    """Seconds from the start of `python` to the first token of a model directory, and its parts."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "model")
        model.save(directory, _network(), _words(), {})
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            done = subprocess.run(
                [sys.executable, "-c", COLD, str(directory), str(time.time())],
                check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            for part, seconds in json.loads(done.stdout.splitlines()[-1]).items():
                found.setdefault(part, []).append(seconds)
    shown = ", ".join(f"{part} {statistics.median(times):.2f} s" for part, times in found.items())
    print(f"cold start to the first token: {shown}")
    return found


def compare(what: str, here: Timed, there: Timed, rounds: int) -> dict[str, Any]:
    """Both in turn after one warm-up each, in tokens a second; the ratio is of the medians."""
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side, once in zip(rates, (here, there), strict=True):
            rate = 1 / once()
            if number:
                side.append(rate)
    ours, theirs = (statistics.median(side) for side in rates)
    print(
        f"{what}: {theirs:,.1f} tokens/s ({min(rates[1]):,.1f} to {max(rates[1]):,.1f}), "
        f"here {ours:,.0f} ({min(rates[0]):,.0f} to {max(rates[0]):,.0f}), "
        f"ratio {ours / theirs:.1f}",
        flush=True,
    )
    return {"here_tokens_per_s": rates[0], "there_tokens_per_s": rates[1], "ratio": ours / theirs}


def _network(key_dim: int = script.WIDTH, dtype: str = "float32") -> model.MiniGPT:
    size, length, width = script.VOCABULARY_SIZE, script.LENGTH, script.WIDTH
    return model.MiniGPT(
        size, length, width, 1, script.HEADS, key_dim, width, 0.1, False, dtype=dtype
    )


def _words() -> Vocabulary:
    return Vocabulary((*SPECIAL_TOKENS, *(f"w{i}" for i in range(2, script.VOCABULARY_SIZE))))


if __name__ == "__main__":
    main()

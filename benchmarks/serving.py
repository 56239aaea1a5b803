"""Row `serve`: `minigpt serve` against `mlflow models serve`, both with the same model.

Both servers run during the whole measurement, and take turns at being asked. A client asks for one
text after the other, over one connection.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import script
from benchmarks.generation import save_model
from benchmarks.measure import PROJECT, NotMeasuredError, Options, Result, median
from minigpt import composition
from minigpt.model import directory
from minigpt.tracking import version

CLIENTS = (1, 2) if script.TINY else (1, 8, 32)
TOKENS = 6 if script.TINY else 40  # of a text
SECONDS = 0.5 if script.TINY else 5.0  # of a measurement
REQUESTS = 20 if script.TINY else 2_000  # of ever different shapes, for the memory
START_S = 180


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        port: Where it listens.
        process: Whose memory it takes, its children's included.
        cold_s: Seconds from its start to its first answer.
    """

    port: int
    process: psutil.Process
    cold_s: float

    def memory_mb(self) -> float:
        """Returns its resident memory."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(float(each.memory_info().rss) for each in family) / 1e6


def serve(options: Options) -> Result:
    """Seconds per token that 32 clients wait for; facts hold all other figures."""
    facts: dict[str, Any] = {}
    rates: dict[str, list[float]] = {"here": [], "there": []}
    with tempfile.TemporaryDirectory() as parent, contextlib.ExitStack() as started:
        folder = Path(parent)
        model = folder / "model"
        save_model(model)
        everything = composition.compose(PROJECT / "conf", PROJECT / "params.yaml")
        version.build(folder / "version", model, directory.digest(model), ["w2 w3 w4"], everything)
        sides = {
            "there": started.enter_context(_mlflow(folder / "version")),
            "here": started.enter_context(_minigpt(model)),
        }
        for name, server in sides.items():
            _load(name, server, max(CLIENTS), SECONDS)  # warm
            facts[f"{name}: cold start"] = f"{server.cold_s:.1f} s"
        for clients in CLIENTS:
            found: dict[str, list[dict[str, float]]] = {"here": [], "there": []}
            for _ in range(options.rounds):
                for name, server in sides.items():
                    found[name].append(_load(name, server, clients, SECONDS))
            for name, measured in found.items():
                middle = {key: median([each[key] for each in measured]) for key in measured[0]}
                print(f"{name}, {clients} clients: {middle}", flush=True)
                facts[f"{name}: {clients} clients"] = middle
                if clients == max(CLIENTS):
                    rates[name] = [1 / each["tokens_s"] for each in measured]
            p95 = [facts[f"{name}: {clients} clients"]["p95_s"] for name in ("here", "there")]
            facts[f"p95 of the other side, {clients} clients"] = f"{p95[1] / p95[0]:.2f} times"
        facts["here: memory"] = _memory(sides["here"])
    return Result(rates["here"], rates["there"], facts)


def _load(name: str, server: Server, clients: int, seconds: float) -> dict[str, float]:
    """Asks for texts with so many clients, and returns tokens a second and latencies."""
    end = time.perf_counter() + seconds

    def client(number: int) -> list[tuple[float, float]]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=START_S)
        found, seed = [], 1000 * number
        while time.perf_counter() < end:
            began, seed = time.perf_counter(), seed + 1
            first = _ask(connection, name, f"w{2 + seed % 50} w3 w4", TOKENS, seed)
            found.append((time.perf_counter() - began, first - began))
        connection.close()
        return found

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        times = [pair for found in pool.map(client, range(clients)) for pair in found]
    passed = time.perf_counter() - began
    whole, first = np.array(times).T
    return {
        "tokens_s": len(times) * TOKENS / passed,
        "p50_s": float(np.median(whole)),
        "p95_s": float(np.quantile(whole, 0.95)),
        "first_token_p50_s": float(np.median(first)),
    }


def _ask(
    connection: http.client.HTTPConnection,
    name: str,
    prompt: str,
    tokens: int,
    seed: int,
    **more: Any,
) -> float:
    """Asks for a text, and returns when the first of it was there."""
    settings = {"max_tokens": tokens, "top_k": script.TOP_K, "seed": seed, **more}
    if name == "here":
        path, body = "/v1/completions", {"model": "model", "prompt": prompt, "stream": True}
        body |= settings
    else:
        path, body = "/invocations", {"dataframe_records": [{"prompt": prompt}], "params": settings}
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    first = time.perf_counter()
    if name == "here":
        answer.readline()
        first = time.perf_counter()
    said = answer.read()
    if answer.status != 200 or b'"error"' in said:
        raise NotMeasuredError(f"{name}: {answer.status} {said[:200]!r}")
    return first if name == "here" else time.perf_counter()


def _memory(server: Server) -> list[float]:
    """MB of a server after each quarter of many requests of ever different shapes."""
    rng, found = random.Random(0), [server.memory_mb()]
    clients = 8

    def some(seeds: range) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        for seed in seeds:
            words = " ".join(f"w{rng.randrange(2, 100)}" for _ in range(rng.randrange(1, 20)))
            more = {"top_p": rng.uniform(0.1, 1), "temperature": rng.uniform(0.1, 2)}
            _ask(connection, "here", words, rng.randrange(1, 2 * TOKENS), seed, **more)
        connection.close()

    for quarter in range(4):
        size = REQUESTS // 4 // clients
        seeds = range(quarter * size, (quarter + 1) * size)
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            list(pool.map(some, [seeds] * clients))
        found.append(server.memory_mb())
    return [round(each) for each in found]


def _minigpt(model: Path) -> contextlib.AbstractContextManager[Server]:
    command = ["minigpt.cli", "serve", "--model", str(model)]
    return _running(command, model.parent, "/health")


def _mlflow(folder: Path) -> contextlib.AbstractContextManager[Server]:
    command = ["mlflow", "models", "serve", "--env-manager", "local", "--model-uri", str(folder)]
    return _running(command, folder.parent, "/ping")


@contextlib.contextmanager
def _running(arguments: list[str], folder: Path, path: str) -> Iterator[Server]:
    """Starts `python -m ...` on a free port and waits until it answers 200; ends it at the end.

    Args:
        arguments: The module and its arguments, to which --port is added.
        folder: Where it runs, and where its log is written.
        path: What it is asked for.

    Raises:
        NotMeasuredError: It has ended, or does not answer.
    """
    began, port = time.perf_counter(), _port()
    command = [sys.executable, "-m", *arguments, "--port", str(port)]
    env = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    with (
        (folder / f"{port}.log").open("wb") as log,
        subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log) as started,
    ):
        process = psutil.Process(started.pid)
        try:
            while not _answers(port, path):
                if started.poll() is not None or time.perf_counter() - began > START_S:
                    said = (folder / f"{port}.log").read_text(encoding="utf-8")[-500:]
                    raise NotMeasuredError(f"{' '.join(command)} does not answer: {said}")
                time.sleep(0.1)
            yield Server(port, process, time.perf_counter() - began)
        finally:
            for each in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])

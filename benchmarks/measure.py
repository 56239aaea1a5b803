"""What the rows share: both sides in turn, their result, and processes of their own."""

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt.common import backend

PROJECT = Path(__file__).resolve().parents[1]
SHARED = PROJECT.parent / "shared"
SAMPLE = PROJECT / "data/sample/reviews.tar.gz"
SCRIPT = "script"  # the name of the published script's side


# A new process counts what the one that started it held: one that holds little stands between.
WAIT = """
import resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.call(sys.argv[1:])
seconds = time.perf_counter() - began
print(f"\\n{seconds} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}")  # Linux: KiB
sys.exit(code)
"""


@dataclass(frozen=True)
class Options:
    """What the command line chose.

    Attributes:
        archive: the 50,000 reviews.
        seed: where the published script's document lies.
        rounds: of each side.
        epochs: of the row `losses`.
        every: which n-th review is taken in the row `scale`; 1: all.
    """

    archive: Path
    seed: Path
    rounds: int = 5
    epochs: int = 2
    every: int = 1


@dataclass(frozen=True)
class Result:
    """One row's measurements, each in the row's unit; `there` is empty where nothing compares."""

    here: list[float]
    there: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class NotMeasuredError(Exception):
    """Why a row can't be measured here."""


def compare(
    here: Callable[[], Any],
    there: Callable[[], Any],
    rounds: int,
    *,
    units: tuple[int, int] = (1, 1),
) -> tuple[list[float], list[float]]:
    """Times both sides in turn, after one warm-up each.

    Args:
        here: our side.
        there: the other one.
        rounds: how often each is timed.
        units: what a call of either makes, tokens say.

    Returns:
        Seconds for each unit of either side.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side, function, made in zip(seconds, (here, there), units, strict=True):
            took = timed(function)
            if number:
                side.append(took / made)
    return seconds


def compare_processes(
    function: str,
    here: Sequence[str],
    there: Sequence[str],
    rounds: int,
    *,
    units: tuple[int, int] = (1, 1),
) -> tuple[list[float], list[float]]:
    """Like `compare`, each side in a process of its own, so that neither has the other's memory.

    A side whose first argument is SCRIPT has TensorFlow as it is shipped, without what
    `backend.choose` set.

    Args:
        function: `package.module.name`; called with a side's arguments it returns what is timed.
        here: our side's arguments.
        there: the other side's.
        rounds: how often each is timed.
        units: what a call of either makes, tokens say.

    Returns:
        Seconds for each unit of either side.

    Raises:
        NotMeasuredError: a side's process ended.
    """
    module, _, name = function.rpartition(".")
    code = "import sys\nfrom benchmarks.measure import load, timed\n"
    code += f"side = load({module!r}).{name}(*sys.argv[1:])\n"
    code += "for _ in sys.stdin:\n    print(timed(side), flush=True)"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as started:
        sides = []
        for arguments in (here, there):
            command = [sys.executable, "-c", code, *arguments]
            # Two processes share the accelerator, of which JAX would give the first nearly all.
            env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **environment(arguments)}
            side = started.enter_context(subprocess.Popen(command, cwd=PROJECT, env=env, **pipes))
            started.callback(side.kill)
            sides.append(side)

        def step(side: "subprocess.Popen[str]") -> float:
            assert side.stdin and side.stdout
            with contextlib.suppress(BrokenPipeError):
                print("on", file=side.stdin, flush=True)
            if not (said := side.stdout.readline()):
                raise NotMeasuredError(f"{function} failed, see above")
            return float(said)

        seconds = [[step(side) for side in sides] for _ in range(rounds + 1)][1:]
    return [pair[0] / units[0] for pair in seconds], [pair[1] / units[1] for pair in seconds]


def load(module: str) -> Any:
    """Imports a module in the process of a side: ours as a stage does, the script as it is."""
    as_it_is = sys.argv[1:2] == [SCRIPT]
    with contextlib.nullcontext() if as_it_is else backend.without_the_unused():
        return importlib.import_module(module)


def environment(arguments: Sequence[str]) -> dict[str, str]:
    """The environment of a process with these arguments: see `compare_processes`."""
    left_out = {backend.ONEDNN} if list(arguments[:1]) == [SCRIPT] else set()
    return {name: value for name, value in os.environ.items() if name not in left_out}


def timed(function: Callable[[], Any]) -> float:
    """The seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def median(values: Sequence[float]) -> float:
    """The median, NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def run(
    *command: str | Path, cwd: Path = PROJECT, env: Mapping[str, str] | None = None
) -> tuple[str, float, float]:
    """Runs a command in a process of its own.

    Returns:
        What it printed, its seconds, and its peak memory in MB.

    Raises:
        NotMeasuredError: it failed; with the end of what it printed.
    """
    done = subprocess.run(
        [sys.executable, "-c", WAIT, *command],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, _, measured = done.stdout.rstrip("\n").rpartition("\n")
    if done.returncode:
        raise NotMeasuredError(f"{' '.join(map(str, command))[:80]} failed: {said[-500:]}")
    seconds, kibibytes = map(float, measured.split())
    return said, seconds, kibibytes * 1024 / 1e6


def call(function: str, *arguments: str) -> tuple[Any, float, float]:
    """Calls `package.module.function(*arguments)` in a new process, see `compare_processes`.

    Returns:
        The value, which JSON can hold; the seconds and the peak memory in MB of the process.
    """
    module, _, name = function.rpartition(".")
    code = "import json, sys\nfrom benchmarks.measure import load\n"
    code += f"print(json.dumps(load({module!r}).{name}(*sys.argv[1:])))"
    env = environment(arguments)
    said, seconds, peak = run(sys.executable, "-c", code, *arguments, env=env)
    return json.loads(said.splitlines()[-1]), seconds, peak

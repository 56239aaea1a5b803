"""Timing two sides in turn, in one process or in two, and the result of a row."""

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
ARCHIVE = SHARED / "data/aclImdb_v1.tar.gz"  # where `--archive` names no other
SAMPLE = PROJECT / "data/sample/reviews.tar.gz"
SCRIPT = "script"  # the name of the published script's side


# The peak memory of a new process includes that of the process it was forked from, so a small one
# stands in between.
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
    """The choices of the command line.

    Attributes:
        archive: The 50,000 reviews.
        seed: The folder of the published script's document.
        rounds: Measurements of each side.
        epochs: Epochs of the row `losses`.
        every: Step from one review to the next in the row `scale`; 1: all reviews.
    """

    archive: Path
    seed: Path
    rounds: int = 5
    epochs: int = 2
    every: int = 1


@dataclass(frozen=True)
class Result:
    """The measurements of one row, in the row's unit.

    Attributes:
        here: Our side.
        there: The other side; empty where there is none.
        facts: What else was found.
    """

    here: list[float]
    there: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class NotMeasuredError(Exception):
    """The row can't be measured here, and why."""


def compare(
    here: Callable[[], Any],
    there: Callable[[], Any],
    rounds: int,
    *,
    units: tuple[int, int] = (1, 1),
) -> tuple[list[float], list[float]]:
    """Times both sides in turn, after one warm-up each.

    Args:
        here: Our side.
        there: The other side.
        rounds: Measurements of each side.
        units: Units that a call of each side produces, such as tokens.

    Returns:
        Seconds per unit of each side.
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
    """Times both sides in turn, each in a process of its own, so that they share no memory.

    A side whose first argument is SCRIPT runs TensorFlow as it is shipped, without the settings
    of `backend.choose`.

    Args:
        function: `package.module.name`; called with a side's arguments, it returns the function
            to time.
        here: Arguments of our side.
        there: Arguments of the other side.
        rounds: Measurements of each side.
        units: Units that a call of each side produces, such as tokens.

    Returns:
        Seconds per unit of each side.

    Raises:
        NotMeasuredError: The process of a side ended.
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
            # JAX would give the first process nearly all memory of an accelerator.
            env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **environment(arguments)}
            side = started.enter_context(subprocess.Popen(command, cwd=PROJECT, env=env, **pipes))
            started.callback(side.kill)
            sides.append(side)

        def step(side: "subprocess.Popen[str]") -> float:
            assert side.stdin and side.stdout
            with contextlib.suppress(BrokenPipeError):
                print("on", file=side.stdin, flush=True)
            if not (said := side.stdout.readline()):
                raise NotMeasuredError(f"{function} failed; its error is printed above")
            return float(said)

        seconds = [[step(side) for side in sides] for _ in range(rounds + 1)][1:]
    return [pair[0] / units[0] for pair in seconds], [pair[1] / units[1] for pair in seconds]


def load(module: str) -> Any:
    """Imports a module for a side; ours skips the same libraries as the stages do."""
    as_it_is = sys.argv[1:2] == [SCRIPT]
    with (
        backend.silenced(),
        contextlib.nullcontext() if as_it_is else backend.without_the_unused(),
    ):
        return importlib.import_module(module)


def environment(arguments: Sequence[str]) -> dict[str, str]:
    """Returns the environment for a side's process, see `compare_processes`."""
    left_out = {backend.ONEDNN} if list(arguments[:1]) == [SCRIPT] else set()
    return {name: value for name, value in os.environ.items() if name not in left_out}


def timed(function: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def median(values: Sequence[float]) -> float:
    """Returns the median, or NaN of no values."""
    return statistics.median(values) if values else float("nan")


def run(
    *command: str | Path, cwd: Path = PROJECT, env: Mapping[str, str] | None = None
) -> tuple[str, float, float]:
    """Runs a command in a process of its own.

    Returns:
        Its output, its seconds, and its peak memory in MB.

    Raises:
        NotMeasuredError: It failed; the message holds the end of its output.
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
        The value, as JSON holds it; the seconds and the peak memory in MB of the process.
    """
    module, _, name = function.rpartition(".")
    code = "import json, sys\nfrom benchmarks.measure import load\n"
    code += f"print(json.dumps(load({module!r}).{name}(*sys.argv[1:])))"
    env = environment(arguments)
    said, seconds, peak = run(sys.executable, "-c", code, *arguments, env=env)
    return json.loads(said.splitlines()[-1]), seconds, peak

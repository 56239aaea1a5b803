"""Retraining on any machine: pull, reproduce, report, push.

Environment variables say what to do, so that nothing from outside is ever part of a command:
RETRAIN_EXPERIMENT (a file of conf/experiment/), RETRAIN_OVERRIDES (such as `train.epochs=3
sample.seed=7`), RETRAIN_BASE (the revision that the report compares with) and RETRAIN_PUSH (false:
nothing is pushed to the DVC remote).
"""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minigpt.common import files
from minigpt.common.errors import InputError

REPORT = Path("reports/retrain.md")
OVERRIDE = re.compile(r"\+?[a-z_]+(\.[a-z0-9_]+)+=[^$]*")  # no `$`: nothing is interpolated
# What DVC prints about a stage, and what that means for it.
STAGE_LINES = {
    "ran": re.compile(r"Running stage '(\w+)'"),
    "from the run-cache": re.compile(r"Stage '(\w+)' is cached"),
    "unchanged": re.compile(r"Stage '(\w+)' didn't change"),
}


@dataclass
class Stage:
    """What became of a stage, and the seconds that it took."""

    name: str
    outcome: str
    seconds: float = 0.0


def main() -> int:
    """Retrains and writes the report, also if the pipeline fails.

    Returns:
        The exit code of the first command that failed.

    Raises:
        InputError: An override makes no sense, or MLflow can't be used for the report.
    """
    command = reproduce_command(os.environ)
    remote = bool(_printed("dvc", "remote", "list"))
    if remote:
        # Without a lock, or if the remote lacks some of it, the stages make what is missing.
        _run("dvc", "pull", "--run-cache", "--allow-missing")
    code, stages = _reproduce(command)
    from minigpt.retraining import report  # only now: it loads MLflow

    base = os.environ.get("RETRAIN_BASE") or "HEAD"
    files.write_text(REPORT, report.page(Path.cwd(), base, stages, failed=bool(code)))
    print(f"the report: {REPORT}")
    if remote and not code and os.environ.get("RETRAIN_PUSH") != "false":
        code = _run("dvc", "push", "--run-cache")
    return code


def reproduce_command(environment: Mapping[str, str]) -> list[str]:
    """Returns the command that runs the pipeline as the environment asks for it.

    Raises:
        InputError: An override is not of the form key=value, or would be interpolated.
    """
    choices = []
    if experiment := environment.get("RETRAIN_EXPERIMENT", "").strip():
        choices.append(f"groups.experiment={experiment}")
    try:
        choices += shlex.split(environment.get("RETRAIN_OVERRIDES", ""))
    except ValueError as error:
        raise InputError(f"RETRAIN_OVERRIDES can't be read: {error}") from None
    for choice in choices:
        if not OVERRIDE.fullmatch(choice):
            raise InputError(
                f"the override {choice!r} is refused: expected section.key=value (or +section.key="
                "value for a key that params.yaml lacks), without a `$`"
            )
    if not choices:
        return ["dvc", "repro"]
    return ["dvc", "exp", "run", *(part for choice in choices for part in ("-S", choice))]


def _reproduce(command: Sequence[str]) -> tuple[int, list[Stage]]:
    """Runs the pipeline, passes on what it prints, and measures the time of each stage."""
    print("$", shlex.join(command), flush=True)
    stages: list[Stage] = []
    began = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as running:
        assert running.stdout
        for line in running.stdout:
            print(line, end="", flush=True)
            for outcome, pattern in STAGE_LINES.items():
                if found := pattern.match(line):
                    now = time.monotonic()
                    if stages:
                        stages[-1].seconds = now - began
                    stages.append(Stage(found[1], outcome))
                    began = now
    if stages:
        stages[-1].seconds = time.monotonic() - began
        if running.returncode:
            stages[-1].outcome = "failed"
    return running.returncode, stages


def _run(*command: str) -> int:
    print("$", shlex.join(command), flush=True)
    return subprocess.run(command).returncode


def _printed(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()

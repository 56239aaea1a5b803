"""Retraining on any machine: pull, reproduce, push, report.

Environment variables say what to do, so that nothing from outside is ever part of a command:
RETRAIN_EXPERIMENT (a file of conf/experiment/), RETRAIN_OVERRIDES (such as `train.epochs=3
sample.seed=7`), RETRAIN_BASE (the revision that the report compares with) and RETRAIN_PUSH (false:
nothing is pushed to the DVC remote).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minigpt.common import files, paths
from minigpt.common.errors import InputError
from minigpt.common.redaction import holds_secret, redact

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
    """Retrains, pushes what finished, and writes the report, also if the pipeline fails.

    Returns:
        The exit code of the first command that failed; 2 if the report lacks a part.

    Raises:
        InputError: A variable makes no sense, or DVC is not on PATH.
    """
    REPORT.unlink(missing_ok=True)  # it would pass for this run's if this one wrote none
    command = reproduce_command(os.environ)
    push = os.environ.get("RETRAIN_PUSH") or "true"
    if push not in {"true", "false"}:
        raise InputError(f"RETRAIN_PUSH is {push!r}: allowed are true, false")
    require_dvc()
    remote = bool(_printed("dvc", "remote", "list"))
    if remote:
        # Without a lock, or if the remote lacks some of it, the stages make what is missing.
        _run("dvc", "pull", "--run-cache", "--allow-missing")
        command.append("--pull")  # the outputs of earlier runs that dvc.lock doesn't name
    code, stages = _reproduce(command)
    # Before anything else can fail. If a stage failed, this keeps the work of those before it.
    pushed = _run("dvc", "push", "--run-cache") if remote and push == "true" else 0
    from minigpt.retraining import report  # only now: it loads MLflow
    from minigpt.tracking import gate

    base = os.environ.get("RETRAIN_BASE") or "HEAD"
    text, lacking = report.page(Path.cwd(), base, stages, failed=bool(code))
    files.write_text(REPORT, text)
    for part in lacking:
        print(f"error: the report lacks {part}", file=sys.stderr)
    print(f"the report: {REPORT}")
    if not code and paths.GATE.exists() and (notice := gate.notice(files.read_json(paths.GATE))):
        print(notice)
    return code or pushed or (2 if lacking else 0)


def require_dvc() -> None:
    """Refuses to begin without DVC, whose stages find Python in the same place.

    Raises:
        InputError: There is no such command.
    """
    if not shutil.which("dvc"):
        raise InputError("there is no command dvc: `source .venv/bin/activate`, then try again")


def reproduce_command(environment: Mapping[str, str]) -> list[str]:
    """Returns the command that runs the pipeline as the environment asks for it.

    Raises:
        InputError: An override is not of the form key=value, would be interpolated, or holds a
            secret, which params.yaml would keep.
    """
    choices = []
    if experiment := environment.get("RETRAIN_EXPERIMENT", "").strip():
        choices.append(f"groups.experiment={experiment}")
    try:
        choices += shlex.split(environment.get("RETRAIN_OVERRIDES", ""))
    except ValueError as error:
        raise InputError(f"RETRAIN_OVERRIDES can't be read: {error}") from None
    for choice in choices:
        if holds_secret(choice):
            raise InputError(
                f"the override {redact(choice)!r} is refused: it holds a name, a password or a "
                "token, and params.yaml is committed"
            )
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
    print("$", redact(shlex.join(command)), flush=True)
    stages: list[Stage] = []
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        assert running.stdout
        for printed in running.stdout:  # in any encoding, so the bytes are passed on
            line = printed.decode("utf-8", "surrogateescape")
            sys.stdout.buffer.write(redact(line).encode("utf-8", "surrogateescape"))
            sys.stdout.buffer.flush()
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


def _printed(*command: str) -> bytes:
    return subprocess.run(command, stdout=subprocess.PIPE).stdout.strip()

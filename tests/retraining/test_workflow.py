"""What retrain.yml decides before it runs anything; pipeline/test_retrain.py runs its steps."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt.retraining import report

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW: dict[str, Any] = yaml.safe_load(
    (ROOT / ".github/workflows/retrain.yml").read_text(encoding="utf-8")
)


class Context(dict[str, Any]):
    """A context of GitHub's expressions, in which everything else is null."""

    def __getattr__(self, name: str) -> Any:
        value = self.get(name)
        return Context(value or {}) if isinstance(value, dict | None) else value


def evaluate(text: str, github: Context) -> Any:
    """The value of an expression, by the operators that the workflow uses."""
    code = " ".join(text.split()).replace("&&", " and ").replace("||", " or ")
    code = re.sub(r"!(?!=)", " not ", code)
    names = {"github": github, "startsWith": lambda text, start: (text or "").startswith(start)}
    return eval(code, names)


def event(name: str = "pull_request", label: str = "", number: int = 1) -> Context:
    happened: dict[str, Any] = {"action": "labeled" if label else "synchronize"}
    if label:
        happened["label"] = {"name": label}
    if name != "pull_request":
        happened = {}
    given = {"event_name": name, "event": happened, "ref": f"refs/pull/{number}/merge"}
    return Context(given, run_id="99", head_ref="a-branch")


def group(github: Context) -> str:
    text = WORKFLOW["concurrency"]["group"]
    start, expression = re.fullmatch(r"(.*)\$\{\{(.*)\}\}", text, re.DOTALL).groups()
    return f"{start}{evaluate(expression, github)}"


def runs(github: Context) -> bool:
    return bool(evaluate(WORKFLOW["jobs"]["retrain"]["if"], github))


def test_an_unrelated_label_does_not_take_the_place_of_a_retraining() -> None:
    waiting = group(event())
    assert runs(event()) and runs(event(label="retrain-whole"))
    assert group(event(label="retrain-whole")) == waiting
    assert not runs(event(label="documentation"))
    assert group(event(label="documentation")) == "retrain-99" != waiting


def test_runs_that_write_to_the_registry_wait_for_each_other() -> None:
    scheduled, by_hand = event("schedule"), event("workflow_dispatch")
    assert runs(scheduled) and runs(by_hand)
    assert group(scheduled) == group(by_hand) == "retrain-registry"
    assert group(event(number=1)) != group(event(number=2))
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is False


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is absent")
def test_only_the_bot_s_own_comment_is_updated() -> None:
    (step,) = (step for step in WORKFLOW["jobs"]["comment"]["steps"] if "run" in step)
    found = re.search(r"--jq '([^']*)'", step["run"])
    assert found
    comments = [
        {"id": 1, "user": {"login": "someone"}, "body": f"{report.MARKER} mine"},
        {"id": 2, "user": {"login": "github-actions[bot]"}, "body": "another report"},
        {
            "id": 3,
            "user": {"login": "github-actions[bot]"},
            "body": f"{report.MARKER}\n# Retraining",
        },
        {"id": 4, "user": {"login": "other[bot]"}, "body": report.MARKER},
    ]
    done = subprocess.run(
        ["jq", found[1]], input=json.dumps(comments), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["3"]

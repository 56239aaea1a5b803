"""What a retraining runs, in which order, and its exit code."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from minigpt.common import files, paths
from minigpt.common.errors import InputError
from minigpt.retraining import report, run


@pytest.mark.parametrize(
    ("experiment", "overrides", "command"),
    [
        ("", "", ["dvc", "repro"]),
        ("demo", "", ["dvc", "exp", "run", "-S", "groups.experiment=demo"]),
        ("", "train.epochs=2 'sample.prompts=[a b]'",
         ["dvc", "exp", "run", "-S", "train.epochs=2", "-S", "sample.prompts=[a b]"]),
    ],
)  # fmt: skip
def test_the_environment_says_what_is_run(
    experiment: str, overrides: str, command: list[str]
) -> None:
    env = {"RETRAIN_EXPERIMENT": experiment, "RETRAIN_OVERRIDES": overrides}
    assert run.reproduce_command(env) == command


@pytest.mark.parametrize(
    "overrides", ["--force", "train.epochs", "a.b=${oc.env:HOME}", "'a.b=1", "; rm=1", "~train.x"]
)
def test_other_overrides_are_refused(overrides: str) -> None:
    with pytest.raises(InputError):
        run.reproduce_command({"RETRAIN_OVERRIDES": overrides})


@pytest.mark.parametrize("url", ["https://me:hunter2@a/b", "https://a/b?X-Amz-Signature=hunter2"])
def test_a_secret_is_refused_before_params_yaml_has_it(url: str) -> None:
    with pytest.raises(InputError, match="holds a name, a password or a token") as caught:
        run.reproduce_command({"RETRAIN_OVERRIDES": shlex.quote(f"corpus.url={url}")})
    assert "hunter2" not in str(caught.value)


class Calls:
    """What main called, in order, and what each call gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.made: list[str] = []
        self.code = self.pushed = 0
        self.lacking: list[str] = []
        monkeypatch.chdir(folder)
        for name in ("RETRAIN_EXPERIMENT", "RETRAIN_OVERRIDES", "RETRAIN_BASE", "RETRAIN_PUSH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(run, "_printed", lambda *command: b"storage")
        monkeypatch.setattr(run, "_run", self.run)
        monkeypatch.setattr(run, "_reproduce", self.reproduce)
        monkeypatch.setattr(report, "page", self.page)

    def run(self, *command: str) -> int:
        self.made.append(command[1])
        return self.pushed if command[1] == "push" else 0

    def reproduce(self, command: Any) -> tuple[int, list[Any]]:
        assert command == ["dvc", "repro", "--pull"]
        self.made.append("repro")
        return self.code, []

    def page(self, *arguments: Any, failed: bool) -> tuple[str, list[str]]:
        self.made.append("report")
        return f"failed: {failed}", self.lacking


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    return Calls(monkeypatch, tmp_path)


def test_what_was_made_is_pushed_before_the_report(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main() == 0
    assert calls.made == ["pull", "repro", "push", "report"]
    calls.lacking = ["the links to MLflow: away"]
    assert run.main() == 2
    assert "error: the report lacks the links to MLflow: away" in capsys.readouterr().err
    assert run.REPORT.read_text(encoding="utf-8") == "failed: False"


def test_a_refusal_is_the_last_thing_that_is_said(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = {"verdict": "refused", "reason": "too many [UNK]", "way_on": "add texts"}
    files.write_json(paths.GATE, outcome)
    assert run.main() == 0
    *_, first, why, way_on, _ = capsys.readouterr().out.splitlines()
    assert first == "NOT REGISTERED: the gate refused this model."
    assert why.endswith("too many [UNK]") and way_on.endswith("add texts")
    calls.code = 255  # the verdict is of an earlier run
    assert run.main() == 255
    assert "NOT REGISTERED" not in capsys.readouterr().out


def test_a_report_that_fails_comes_after_the_push(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(report, "page", fail)
    run.REPORT.parent.mkdir()
    run.REPORT.write_text("of an earlier run", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        run.main()
    assert calls.made == ["pull", "repro", "push"]
    assert not run.REPORT.exists()


def test_a_failed_stage_loses_nothing_of_those_before_it(calls: Calls) -> None:
    calls.code, calls.pushed = 255, 1
    assert run.main() == 255
    assert calls.made == ["pull", "repro", "push", "report"]
    assert run.REPORT.read_text(encoding="utf-8") == "failed: True"


def test_a_failed_push_is_told_after_the_report(calls: Calls) -> None:
    calls.pushed = 1
    assert run.main() == 1
    assert calls.made[-1] == "report"


def test_nothing_is_pushed_where_that_is_not_wanted(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRAIN_PUSH", "false")
    assert run.main() == 0
    assert calls.made == ["pull", "repro", "report"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("RETRAIN_PUSH", "False", "RETRAIN_PUSH is 'False': allowed are true, false"),
        ("PATH", "/nowhere", "there is no command dvc: `source .venv/bin/activate`"),
    ],
)
def test_an_environment_that_makes_no_sense(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=says):
        run.main()
    assert calls.made == []


def test_what_the_pipeline_prints_is_passed_on_without_secrets(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    lines = b"Running stage 'train':\n" + "é\x85\u2028 https://me:hunter2@a/b\n".encode()
    lines += b"\xff\nStage 'vocab' didn't change, skipping\n"
    program = f"import sys; sys.stdout.buffer.write({lines!r}); sys.exit(3)"
    code, stages = run._reproduce([sys.executable, "-c", program])
    assert code == 3
    outcomes = [(stage.name, stage.outcome) for stage in stages]
    assert outcomes == [("train", "ran"), ("vocab", "failed")]
    assert capfdbinary.readouterr().out.endswith(b"\n" + lines.replace(b"me:hunter2@", b""))

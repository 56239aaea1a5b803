"""The command `minigpt`."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tracked import OlderFormat, fake_model

from minigpt import cli, composition, config
from minigpt.common.errors import InputError
from minigpt.tracking import champion

pytestmark = pytest.mark.usefixtures("clean_environment")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def store(tmp_path: Path, empty_store: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store with two versions of `mini`; its folder is the working directory."""
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("mini")
    for _ in range(2):
        client.create_model_version("mini", "file:///nowhere")
    monkeypatch.chdir(tmp_path)
    return client.tracking_uri


def minigpt(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main([*arguments, "--model", "mini"])
    except SystemExit as error:  # argparse's
        code = int(str(error.code))
    return code, *capsys.readouterr()


def test_the_champion_by_hand(store: str, capsys: Any) -> None:
    none = "@champion of mini is no version\n"
    assert minigpt(capsys, "history") == (0, none, "")
    promoted = "version 1 of mini is @champion; before it was no version\n"
    assert minigpt(capsys, "promote", "1", "--reason", "the first") == (0, promoted, "")
    minigpt(capsys, "promote", "2", "--reason", "reads better")
    back = "version 1 of mini is @champion; before it was version 2\n"
    assert minigpt(capsys, "rollback", "--reason", "it swears") == (0, back, "")
    code, printed, _ = minigpt(capsys, "history")
    title, columns, *rows = printed.splitlines()
    assert (code, title) == (0, "@champion of mini is version 1")
    assert columns.split() == ["time", "version", "from", "how", "who", "reason"]
    cells = [row.split(maxsplit=6) for row in rows]  # date and time are two
    assert [cell[2:5] for cell in cells] == [
        ["1", "2", "rollback"],
        ["2", "1", "promote"],
        ["1", "-", "promote"],
    ]
    assert [cell[6] for cell in cells] == ["it swears", "reads better", "the first"]


def test_refused_commands(store: str, capsys: Any) -> None:
    for arguments, says in (
        (["promote", "7", "--reason", "x"], "error: mini has no version 7; there are: 1, 2"),
        (["promote", "two", "--reason", "x"], "error: mini has no version two"),
        (["promote", "1", "--reason", ""], "error: the reason has 0 characters"),
        (["promote", "1"], "required: --reason"),
        (["rollback", "--reason", "x"], "error: mini has no champion to go back to"),
        (["rollback"], "required: --reason"),
        (["demote"], "invalid choice: 'demote'"),
    ):
        code, printed, error = minigpt(capsys, *arguments)
        assert (code, printed) == (2, "")
        assert says in error
        if error.startswith("error: "):
            assert error.count("\n") == 1
    assert champion.state(store, "mini") == (None, [])


def test_the_store_is_needed(
    store: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, error = minigpt(capsys, "history")
    assert code == 2 and error.startswith("error: there is no MLflow store at sqlite:////")
    assert not list(Path().iterdir())
    for uri in ("http://me:hunter2@127.0.0.1:9", f"sqlite:///{tmp_path}/broken.db"):
        (tmp_path / "broken.db").write_text("not a database " * 100)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        code, _, error = minigpt(capsys, "history")
        assert code == 2 and "can't be used: " in error and error.count("\n") == 1
        assert "hunter2" not in error


def test_a_command_ends_although_a_server_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process of its own, which also has to exit; test_outages.py has the other commands."""
    code = "import sys; from minigpt import cli; from minigpt.tracking import store; "
    code += "store.OPERATION_S = 1; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "promote", "1", "--reason", "x", "--model", "mini"]
    with socket.create_server(("127.0.0.1", 0)) as server:  # it takes requests, and is silent
        address = f"http://me:hunter2@127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.endswith("can't be used: no answer within 1 s\n")
    assert ran.stderr.count("\n") == 1 and "hunter2" not in ran.stderr


def test_the_model_is_that_of_the_configuration(store: str, capsys: Any) -> None:
    assert cli.main(["history"]) == 2  # there is no resolved.yaml
    assert "resolved.yaml is missing; run `dvc repro`" in capsys.readouterr().err
    composed = composition.compose(ROOT / "conf", ROOT / "params.yaml")
    tracking = composed.tracking.model_copy(update={"model_name": "mini"})
    config.save(composed.model_copy(update={"tracking": tracking}))
    assert cli.main(["history"]) == 0
    assert capsys.readouterr().out == "@champion of mini is no version\n"


def test_export_writes_beside_the_folder(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    written: list[tuple[Path, Path]] = []

    def export(folder: Path, file: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder} is missing")
        if folder.name == "old":
            raise OlderFormat("old has the older format 1")
        written.append((folder, file))

    fake_model(tmp_path, monkeypatch)
    fake = sys.modules["minigpt.model.directory"]
    monkeypatch.setattr(fake, "export", export, raising=False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "model/"]) == 0
    assert cli.main(["export", "model", "--out", "other.keras"]) == 0
    assert written == [(Path("model"), Path("model.keras")), (Path("model"), Path("other.keras"))]
    assert cli.main(["export", "nowhere"]) == 2
    assert capsys.readouterr().err == "error: nowhere is missing\n"
    (tmp_path / "old").mkdir()
    assert cli.main(["export", "old"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: old has the older format 1: ") and "`minigpt promote`" in error


def test_retrain_refuses_an_override_that_would_be_interpolated(
    capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("RETRAIN_OVERRIDES", "a.b=${oc.env:HOME}")
    assert cli.main(["retrain"]) == 2
    assert capsys.readouterr().err.startswith("error: the override 'a.b=${oc.env:HOME}' is refused")


def test_help_is_quick_and_lists_the_commands(tmp_path: Path) -> None:
    code = "import sys; from minigpt.cli import main\ntry: main(['--help'])\nfinally: "
    code += "print(json.dumps(sorted({'mlflow', 'keras', 'tensorflow'} & set(sys.modules))))"
    command = [sys.executable, "-c", f"import json; {code}"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(ran.stdout.splitlines()[-1]) == []
    for name in ("promote", "rollback", "history", "search", "retrain", "export"):
        assert name in ran.stdout

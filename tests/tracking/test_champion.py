"""The alias @champion moved by hand, in real sqlite stores, and the command that does it."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from minigpt import config
from minigpt.cli import main
from minigpt.common.errors import InputError
from minigpt.tracking import champion
from minigpt.tracking.champion import move, promote, rollback, state

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture(scope="module")
def four_versions(tmp_path_factory: pytest.TempPathFactory, empty_store: bytes) -> bytes:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    path.write_bytes(empty_store)
    client = MlflowClient(f"sqlite:///{path}")
    client.create_registered_model("mini")
    for _ in range(4):
        client.create_model_version("mini", "file:///nowhere")
    return path.read_bytes()


@pytest.fixture
def store(tmp_path: Path, four_versions: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store with four versions of `mini`; its folder is the working directory."""
    (tmp_path / "mlflow.db").write_bytes(four_versions)
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


def moves(uri: str) -> list[tuple[str | None, str | None]]:
    return [(entry["from"], entry["version"]) for entry in state(uri, "mini").history]


def minigpt(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    try:
        code = main([*arguments, "--model", "mini"])
    except SystemExit as error:  # argparse's
        code = int(str(error.code))
    return code, *capsys.readouterr()


# The alias and its history.


def test_a_promotion_is_recorded(store: str) -> None:
    assert state(store, "mini") == (None, [])
    assert promote(store, "mini", "2", reason=" reads\n better ") is None
    assert promote(store, "mini", "3", reason="ödd “quotes”, {braces}") == "2"
    now, (first, second) = state(store, "mini")
    assert now == "3"
    assert MlflowClient(store).get_model_version_by_alias("mini", "champion").version in ("3", 3)
    seconds = datetime.now(UTC) - datetime.fromisoformat(str(first.pop("time")))
    assert 0 <= seconds.total_seconds() < 60
    assert first.pop("who")
    assert first == {"version": "2", "from": None, "how": "promote", "reason": "reads better"}
    assert second["reason"] == "ödd “quotes”, {braces}"


def test_a_rollback_goes_further_back_each_time(store: str) -> None:
    for version in ("1", "2", "3"):
        promote(store, "mini", version, reason="better")
    assert rollback(store, "mini", reason="worse") == ("2", "3")
    assert rollback(store, "mini", reason="worse") == ("1", "2")
    with pytest.raises(InputError, match=r"no champion to go back to \(now: version 1\)"):
        rollback(store, "mini", reason="worse")
    promote(store, "mini", "4", reason="better")
    assert rollback(store, "mini", reason="worse") == ("1", "4")
    assert moves(store)[3:] == [("3", "2"), ("2", "1"), ("1", "4"), ("4", "1")]


def test_a_rollback_without_a_history(store: str) -> None:
    with pytest.raises(InputError, match=r"no champion to go back to \(now: none\)"):
        rollback(store, "mini", reason="worse")
    promote(store, "mini", "1", reason="first")
    with pytest.raises(InputError, match=r"no champion to go back to \(now: version 1\)"):
        rollback(store, "mini", reason="worse")


def test_a_rollback_passes_over_a_deleted_version(store: str) -> None:
    for version in ("1", "2", "3"):
        promote(store, "mini", version, reason="better")
    MlflowClient(store).delete_model_version("mini", "2")
    assert rollback(store, "mini", reason="worse") == ("1", "3")


def test_a_champion_that_was_set_or_deleted_in_the_ui(store: str) -> None:
    client = MlflowClient(store)
    client.set_registered_model_alias("mini", "champion", "1")
    assert promote(store, "mini", "2", reason="better") == "1"
    assert rollback(store, "mini", reason="worse") == ("1", "2")
    client.set_registered_model_alias("mini", "champion", "3")
    assert rollback(store, "mini", reason="worse") == ("1", "3")
    client.delete_registered_model_alias("mini", "champion")
    assert rollback(store, "mini", reason="who deleted it?") == ("1", None)
    assert state(store, "mini").version == "1"


@pytest.mark.parametrize("reason", ["", " \n ", "x" * 1001])
def test_a_reason_is_needed(store: str, reason: str) -> None:
    with pytest.raises(InputError, match=r"the reason has \d+ characters: 1 to 1000 are allowed"):
        promote(store, "mini", "1", reason=reason)
    assert state(store, "mini") == (None, [])


def test_the_longest_reason_fits(store: str) -> None:
    promote(store, "mini", "1", reason="\U0001f600" * 1000)
    assert len(str(state(store, "mini").history[0]["reason"])) == 1000


def test_what_can_not_be_promoted(store: str) -> None:
    with pytest.raises(InputError, match="mini has no version 9; there are: 1, 2, 3, 4"):
        promote(store, "mini", "9", reason="better")
    with pytest.raises(InputError, match="has no registered model 'maxi'; there are: mini"):
        promote(store, "maxi", "1", reason="better")
    promote(store, "mini", "1", reason="better")
    with pytest.raises(InputError, match="version 1 of mini is the champion already"):
        promote(store, "mini", "1", reason="better")
    assert moves(store) == [(None, "1")]


# At the same time.

PROMOTE = """
import sys
from multiprocessing import get_context
from minigpt.tracking import champion

uri, processes, times = sys.argv[1], 3, 4

def promote(barrier, number):
    barrier.wait()
    for time in range(times):
        while not champion.move(
            uri, "mini", str(1 + (number + time) % 4), how="gate", reason=f"{number}.{time}",
            expected=champion.state(uri, "mini").version,
        ):
            pass

context = get_context("fork")
barrier = context.Barrier(processes)
running = [context.Process(target=promote, args=(barrier, n)) for n in range(processes)]
[process.start() for process in running]
[process.join() for process in running]
raise SystemExit(any(process.exitcode for process in running))
"""


def test_processes_that_promote_at_once_leave_one_champion_and_the_whole_history(
    store: str,
) -> None:
    command = [sys.executable, "-c", PROMOTE, store]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.stderr, ran.returncode) == ("", 0)
    now, history = state(store, "mini")
    assert now == history[-1]["version"]
    assert [entry["from"] for entry in history] == [None, *(e["version"] for e in history[:-1])]
    told = {str(entry["reason"]) for entry in history}
    assert len(told) == len(history)
    # A move to the version that is the champion already, by another process, adds no entry.
    assert told <= {f"{number}.{time}" for number in range(3) for time in range(4)}
    assert len(told) >= 4


def test_a_move_is_not_made_where_the_champion_is_another_by_now(store: str) -> None:
    promote(store, "mini", "1", reason="better")
    assert not move(store, "mini", "2", how="gate", reason="better", expected=None)
    assert moves(store) == [(None, "1")]


def test_of_two_that_promote_by_hand_the_later_is_told(store: str, monkeypatch: Any) -> None:
    real = champion.move

    def overtaken(*args: Any, **kwargs: Any) -> bool:
        monkeypatch.setattr(champion, "move", real)
        promote(store, "mini", "3", reason="faster")
        return real(*args, **kwargs)

    monkeypatch.setattr(champion, "move", overtaken)
    with pytest.raises(InputError, match="was moved at the same time, to version 3"):
        promote(store, "mini", "2", reason="better")
    assert moves(store) == [(None, "3")]


def test_a_later_write_on_a_server_is_told(store: str, monkeypatch: Any) -> None:
    """A server has no lock: another may write between our writing and our reading."""
    real = MlflowClient.set_registered_model_tag

    def crossed(self: MlflowClient, *args: Any) -> None:
        real(self, *args)
        self.set_registered_model_alias("mini", "champion", "3")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_tag", crossed)
        with pytest.raises(InputError, match="only for a moment: version 3 was promoted"):
            promote(store, "mini", "2", reason="better")
    assert rollback(store, "mini", reason="it was 2 that I wanted") == ("2", "3")


# The command.


def test_the_command(store: str, capsys: Any) -> None:
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["promote", "7", "--reason", "x"], "error: mini has no version 7; there are: 1, 2, 3, 4"),
        (["promote", "two", "--reason", "x"], "error: mini has no version two"),
        (["promote", "1", "--reason", ""], "error: the reason has 0 characters"),
        (["promote", "1"], "required: --reason"),
        (["rollback", "--reason", "x"], "error: mini has no champion to go back to"),
        (["rollback"], "required: --reason"),
        (["demote"], "invalid choice: 'demote'"),
    ],
)
def test_what_the_command_refuses(store: str, capsys: Any, arguments: list[str], says: str) -> None:
    code, printed, error = minigpt(capsys, *arguments)
    assert (code, printed) == (2, "")
    assert says in error
    if error.startswith("error: "):
        assert error.count("\n") == 1
    assert state(store, "mini") == (None, [])


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


def test_the_model_is_that_of_the_configuration(store: str, capsys: Any) -> None:
    assert main(["history"]) == 2  # there is no resolved.yaml
    assert "resolved.yaml is missing; run `dvc repro`" in capsys.readouterr().err
    project = Path(__file__).resolve().parents[1]
    made = config.compose(project / "conf", project / "params.yaml")
    made.tracking.model_name = "mini"
    config.save(made)
    assert main(["history"]) == 0
    assert capsys.readouterr().out == "@champion of mini is no version\n"


def test_help_is_quick_and_lists_the_commands(tmp_path: Path) -> None:
    code = "import sys; from minigpt.cli import main\ntry: main(['--help'])\nfinally: "
    code += "print(json.dumps(sorted({'mlflow', 'keras', 'tensorflow'} & set(sys.modules))))"
    command = [sys.executable, "-c", f"import json; {code}"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(ran.stdout.splitlines()[-1]) == []
    assert all(name in ran.stdout for name in ("promote", "rollback", "history"))

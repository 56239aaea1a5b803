"""The address of the store, and several processes that use it at once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from minigpt.common.errors import InputError
from minigpt.tracking import champion, store

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_where_the_runs_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.tracking_uri(Path()) == f"sqlite:///{tmp_path}/mlflow.db"
    for given, expected in (
        ("sqlite:///runs/my.db", f"sqlite:///{tmp_path}/runs/my.db"),
        ("sqlite:///my.db?timeout=5", f"sqlite:///{tmp_path}/my.db?timeout=5"),
        ("sqlite:////srv/my.db", "sqlite:////srv/my.db"),
        ("http://mlflow:5000", "http://mlflow:5000"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert store.tracking_uri(tmp_path) == expected
    awkward = tmp_path / "50%20 #1?/ä"
    monkeypatch.setenv("DVC_ROOT", str(awkward))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    uri = store.tracking_uri(tmp_path)
    assert uri == f"sqlite:///{tmp_path}/50%2520 #1%3F/ä/mlflow.db"
    assert store.sqlite_path(uri) == awkward / "mlflow.db"
    assert store.sqlite_path("http://mlflow:5000") is None


@pytest.mark.parametrize("name", ["a?b", "a?mode=memory", "100%25", "a%b", "#1 ä;+&=@"])
def test_a_store_is_where_its_address_says_and_nowhere_else(
    name: str, tmp_path: Path, empty_store: bytes
) -> None:
    root = tmp_path / name
    root.mkdir()
    uri = store.tracking_uri(root)
    (root / "mlflow.db").write_bytes(empty_store)
    with store.open_store(uri) as client:
        location = (root / "mlartifacts").as_uri()
        run = client.create_run(client.create_experiment("a", location)).info.run_id
        client.log_text(run, "text", "a.txt")
        local = client.download_artifacts(run, "a.txt", str(tmp_path))
    assert Path(local).read_text(encoding="utf-8") == "text"
    assert list(root.glob("mlartifacts/*/artifacts/a.txt"))
    assert {path.name for path in tmp_path.iterdir()} == {name, "a.txt"}


def test_a_store_that_was_not_finished_takes_no_place(
    tmp_path: Path, empty_store: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mlflow.db"

    class Killed:
        def __init__(self, uri: str) -> None:
            Path(uri.removeprefix("sqlite:///")).write_bytes(b"half of it")
            assert not path.exists()
            raise KeyboardInterrupt

    class Finished:
        def __init__(self, uri: str) -> None:
            Path(uri.removeprefix("sqlite:///")).write_bytes(empty_store)

        def search_experiments(self) -> None: ...

    monkeypatch.setattr(store, "MlflowClient", Killed)
    with pytest.raises(KeyboardInterrupt):
        store.create(f"sqlite:///{path}")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(store, "MlflowClient", Finished)
    store.create(f"sqlite:///{path}")
    assert [found.name for found in tmp_path.iterdir()] == ["mlflow.db"]
    monkeypatch.setattr(store, "MlflowClient", Killed)
    store.create(f"sqlite:///{path}")  # it is there
    assert path.read_bytes() == empty_store


def test_a_full_disk_is_not_a_fault_of_the_store(tmp_path: Path, empty_store: bytes) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    with (
        pytest.raises(OSError, match="No space"),
        store.open_store(f"sqlite:///{tmp_path}/mlflow.db"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(InputError, match="there is no MLflow store at sqlite:////"):
        champion.state(f"sqlite:///{tmp_path}/other.db", "mini")


AT_ONCE = """
import sys
from multiprocessing import get_context
from pathlib import Path
from mlflow import MlflowClient
from tracked import CONFIG, write_run
from minigpt.tracking import champion
from minigpt.tracking.mirror import Mirror

root, processes, moves = Path(sys.argv[1]), 3, 4

def log(barrier, number):
    folder = root / str(number)
    barrier.wait()
    mirror = Mirror(folder, CONFIG, strict=True)
    for epochs in range(1, 5):
        write_run(folder, epochs, train_id="t1" if number == 1 else "t2", model=None)
        mirror.send()

def promote(barrier, number):
    uri = f"sqlite:///{root}/mlflow.db"
    barrier.wait()
    for move in range(moves):
        while not champion.move(
            uri, "mini", str(1 + (number + move) % 4), how="gate", reason=f"{number}.{move}",
            expected=champion.state(uri, "mini").version,
        ):
            pass

def at_once(function):
    context = get_context("fork")
    barrier = context.Barrier(processes)
    running = [context.Process(target=function, args=(barrier, n)) for n in range(processes)]
    [process.start() for process in running]
    [process.join() for process in running]
    if any(process.exitcode for process in running):
        sys.exit(1)

at_once(log)
client = MlflowClient(f"sqlite:///{root}/mlflow.db")
client.create_registered_model("mini")
for _ in range(4):
    client.create_model_version("mini", "file:///nowhere")
at_once(promote)
"""


@pytest.mark.slow
def test_processes_create_a_store_and_use_it_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    command = [sys.executable, "-c", AT_ONCE, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.stderr, ran.returncode) == ("", 0)

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("minigpt")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags["minigpt.train_id"] for run in runs) == ["t1", "t2"]
    for run in runs:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
        assert sorted(steps) == [1, 2, 3, 4]

    # One champion, and the whole history.
    now, history = champion.state(client.tracking_uri, "mini")
    assert now == history[-1]["version"]
    assert [entry["from"] for entry in history] == [None, *(e["version"] for e in history[:-1])]
    told = {str(entry["reason"]) for entry in history}
    assert len(told) == len(history) >= 4
    # A move to the version that another process made the champion already adds no entry.
    assert told <= {f"{number}.{move}" for number in range(3) for move in range(4)}

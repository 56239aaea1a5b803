"""A store that is absent, refuses, hangs or fails: nothing stops, and nothing is lost."""

import logging
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from mlflow import MlflowClient
from tracked import CONFIG, client, held, points, runs, write_evaluation, write_run

from minigpt.common.errors import InputError
from minigpt.tracking import mirror, store
from minigpt.tracking.mirror import Mirror

pytestmark = pytest.mark.usefixtures("clean_environment")


class Silent(BaseHTTPRequestHandler):
    """A server that takes a request and never answers."""

    def handle(self) -> None:
        time.sleep(30)


class Broken(BaseHTTPRequestHandler):
    """A server that answers each request with 500."""

    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET  # noqa: N815 - the name of http.server

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    "kind", ["refusing", "hanging", "500", "unwritable", "not a database", "locked"]
)
def test_an_outage_costs_seconds_and_loses_nothing(
    kind: str, project: Path, monkeypatch: Any, caplog: Any, capfd: Any
) -> None:
    monkeypatch.setattr(mirror, "PATIENCE_S", 1)
    monkeypatch.setattr(store, "LOCK_WAIT_S", 0.1)
    uri = "http://me:hunter2@127.0.0.1:9"
    if kind in ("hanging", "500"):
        handler = Silent if kind == "hanging" else Broken
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://me:hunter2@127.0.0.1:{server.server_port}"
    elif kind == "unwritable":
        uri = f"sqlite:///{project.as_posix().replace('%', '%25').replace('?', '%3F')}/dvc.lock/db"
    elif kind in ("not a database", "locked"):
        uri = f"sqlite:///{project.parent}/{kind}.db"
        (project.parent / "not a database.db").write_text("not a database " * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    write_run(project)
    write_evaluation(project)
    tried = Mirror(project, CONFIG)
    with (
        FileLock(project.parent / "locked.db.lock"),
        caplog.at_level(logging.WARNING),
    ):
        began = time.monotonic()
        for _ in range(5):  # a hanging server takes the patience at once, the others some of it
            tried.send()
        tried.finish()
        assert time.monotonic() - began < 2.5
    (warning,) = caplog.messages
    assert "can't be used" in warning and "logged later" in warning
    everything = caplog.text + "".join(capfd.readouterr())
    assert "hunter2" not in everything and "Traceback" not in everything
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    Mirror(project, CONFIG).send()
    assert len(points(project, "loss")) == 3
    assert runs(project)[0].info.status == "FINISHED"


def test_what_an_outage_left_out_is_sent_by_a_later_call(
    project: Path, monkeypatch: Any, caplog: Any
) -> None:
    write_run(project)
    write_evaluation(project)
    Mirror(project, CONFIG).send()
    whole = held(project)
    client(project).delete_run(runs(project)[0].info.run_id)

    monkeypatch.setattr(mirror, "PATIENCE_S", 60)
    sent, chance, failed = Mirror(project, CONFIG), random.Random(4), set[str]()
    with monkeypatch.context() as patch:
        for method in ("log_batch", "log_text", "get_metric_history", "log_artifact", "get_run"):
            real = getattr(MlflowClient, method)

            def fails_at_times(
                *args: Any, method: str = method, real: Any = real, **kwargs: Any
            ) -> Any:
                if chance.random() < 0.3:  # in the middle of an epoch, too
                    failed.add(method)
                    raise OSError("no space left on device")
                return real(*args, **kwargs)

            patch.setattr(MlflowClient, method, fails_at_times)
        for epochs in (1, 2, 3):
            write_run(project, epochs=epochs, model=None)
            sent.send()
        write_run(project)
        for _ in range(10):
            sent.send()
    assert len(failed) == 5
    assert len(caplog.messages) == 1 and "no space left" in caplog.text
    sent.send()  # it is back
    again = held(project)
    assert again["tags"].pop("mlflow.runName") != whole["tags"].pop("mlflow.runName")
    assert again == whole


def test_a_store_that_took_all_the_patience_is_left_to_the_next_stage(
    project: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(mirror, "PATIENCE_S", 0.01)
    write_run(project, epochs=1, model=None)
    sent = Mirror(project, CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_experiment_by_name", lambda *args: time.sleep(0.02) or 1)
        sent.send()
    write_run(project)
    sent.send()
    assert runs(project) == []
    Mirror(project, CONFIG).send()
    assert len(points(project, "loss")) == 3


def test_a_strict_mirror_raises(project: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    write_run(project)
    with pytest.raises(InputError, match=r"MLflow at http://127.0.0.1:9 can't be used") as raised:
        Mirror(project, CONFIG, strict=True).send()
    assert "hunter2" not in str(raised.value)

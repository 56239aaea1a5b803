"""A store that is absent, refuses, hangs or fails: nothing stops, and nothing is lost."""

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from mlflow import MlflowClient
from tracked import CONFIG, client, held, points, runs, write_evaluation, write_run

from minigpt.common.errors import InputError
from minigpt.tracking import champion, deadline, mirror, registry, store
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


class Later(BaseHTTPRequestHandler):
    """A server that asks to come back in an hour."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.send_header("Retry-After", "3600")
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


class Dripping(BaseHTTPRequestHandler):
    """A server whose answer comes byte by byte."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(150):
                self.wfile.write(b"{")
                time.sleep(0.2)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


SERVERS: dict[str, type[BaseHTTPRequestHandler]] = {
    "hanging": Silent,
    "500": Broken,
    "later": Later,
    "dripping": Dripping,
}


def serve(kind: str) -> str:
    """Starts a server, and returns its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), SERVERS[kind])
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://me:hunter2@127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(
    "kind", [*SERVERS, "refusing", "unwritable", "not a database", "locked", "locked database"]
)
def test_an_outage_costs_seconds_and_loses_nothing(
    kind: str, project: Path, monkeypatch: Any, caplog: Any, capfd: Any
) -> None:
    uri = serve(kind) if kind in SERVERS else "http://me:hunter2@127.0.0.1:9"
    if kind == "unwritable":
        uri = f"sqlite:///{project.as_posix().replace('%', '%25').replace('?', '%3F')}/dvc.lock/db"
    elif kind in ("not a database", "locked"):
        uri = f"sqlite:///{project.parent}/{kind}.db"
        (project.parent / "not a database.db").write_text("not a database " * 100)
    elif kind == "locked database":
        uri = store.tracking_uri(project)
    write_run(project)
    write_evaluation(project)
    held = locked_database(uri) if kind == "locked database" else contextlib.nullcontext()
    with FileLock(project.parent / "locked.db.lock"), held, monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setattr(mirror, "PATIENCE_S", 0.5)
        patch.setattr(mirror, "SQLITE_S", 0.5)
        patch.setattr(store, "LOCK_WAIT_S", 0.1)
        tried = Mirror(project, CONFIG)
        began = time.monotonic()
        for _ in range(60):  # half a minute, if each lost half a second
            tried.send()
        tried.finish()
        assert time.monotonic() - began < 15
    (warning,) = caplog.messages
    assert "can't be used" in warning and "logged later" in warning
    if kind.startswith("locked"):
        assert f"process {os.getpid()} " in warning
    everything = caplog.text + "".join(capfd.readouterr())
    assert "hunter2" not in everything and "Traceback" not in everything
    Mirror(project, CONFIG).send()
    assert len(points(project, "loss")) == 3
    assert runs(project)[0].info.status == "FINISHED"


@contextlib.contextmanager
def locked_database(uri: str) -> Iterator[None]:
    """Another process that was stopped in the middle of a transaction."""
    path = store.sqlite_path(uri)
    assert path
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    yield
    database.close()


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


@pytest.mark.parametrize("kind", ["later", "dripping", "locked database"])
def test_a_command_ends_in_time_and_says_why(
    kind: str, project: Path, monkeypatch: Any, empty_store: bytes
) -> None:
    # What a server says at once is said in time on a busy machine, too.
    monkeypatch.setattr(store, "OPERATION_S", 30 if kind == "later" else 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    (project.parent / "other.db").write_bytes(empty_store)
    uri = serve(kind) if kind in SERVERS else f"sqlite:///{project.parent}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    write_run(project)
    actions: dict[str, Callable[[], object]] = {
        "history": lambda: champion.state(uri, "mini"),
        "promote": lambda: champion.promote(uri, "mini", "1", reason="better"),
        "rollback": lambda: champion.rollback(uri, "mini", reason="worse"),
        "fetch": lambda: registry.fetch(uri, "mini", "1", project / "fetched"),
        "register": lambda: Mirror(project, CONFIG, strict=True).send(),
    }
    reason = {
        "later": "503",
        "dripping": r"no answer within 0\.\d s",
        "locked database": rf"no answer within .* s; process {os.getpid()} has locked it: wait",
    }[kind]
    held = locked_database(uri) if kind == "locked database" else contextlib.nullcontext()
    with held:
        for action in actions.values():
            began = time.monotonic()
            with pytest.raises(InputError, match=f"can't be used: .*{reason}") as raised:
                action()
            assert time.monotonic() - began < 15
            assert "hunter2" not in str(raised.value)


def test_a_server_that_is_slow_each_time_does_not_take_for_ever(
    project: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(store, "STAGE_S", 1)
    monkeypatch.setattr(mirror, "SEND_S", 1)
    monkeypatch.setattr(mirror, "PATIENCE_S", 1)
    write_run(project)
    for method in ("get_run", "log_batch", "log_text", "set_experiment_tag"):
        real = getattr(MlflowClient, method)

        def slow(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            time.sleep(0.3)
            return real(*args, **kwargs)

        monkeypatch.setattr(MlflowClient, method, slow)
    began, strict = time.monotonic(), Mirror(project, CONFIG, strict=True)
    with pytest.raises(InputError, match="no answer within"):
        strict.send()
    assert time.monotonic() - began < 3
    strict.attempt(lambda client: client.get_run(strict.run_id))  # another operation, another end
    began, training = time.monotonic(), Mirror(project, CONFIG)
    for _ in range(5):
        training.send()
    assert time.monotonic() - began < 3
    (warning,) = caplog.messages
    assert "no answer within" in warning and "logged later" in warning


LEAVES = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from minigpt.tracking import deadline

def slow():
    pool = ThreadPoolExecutor()
    return pool.submit(time.sleep, 60).result()

try:
    deadline.within(0.2, slow)
except deadline.LateError as error:
    print(error)
"""


def test_a_process_ends_although_a_call_does_not() -> None:
    """MLflow downloads in pools, whose workers Python would wait for."""
    command = [sys.executable, "-c", LEAVES]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=45)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("no answer within 0.2 s\n", "", 0)


def test_what_is_sent_puts_the_end_off() -> None:
    operation = deadline.Operation(2, call_s=1)
    assert 0.9 < operation.left_s() <= 1
    assert 10.9 < operation.left_s(10 * deadline.SLOWEST_BYTES_S) <= 11
    assert 0.9 < operation.left_s() <= 1
    assert 1.5 < deadline.Operation(2).left_s() <= 2


def test_what_comes_in_extends_the_time() -> None:
    came: list[int] = []

    def receive() -> str:
        for _ in range(4):
            came.append(deadline.SLOWEST_BYTES_S * 5)
            time.sleep(0.1)
        return "all of it"

    assert deadline.within(0.3, receive, received=lambda: sum(came)) == "all of it"
    with pytest.raises(deadline.LateError, match=r"no answer within 0\.2 s"):
        deadline.within(0.2, lambda: time.sleep(1))
    with pytest.raises(ZeroDivisionError):
        deadline.within(5, lambda: 1 // 0)

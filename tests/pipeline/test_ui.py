"""`make ui`: who can reach it, and what it and a client with a password leave behind."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from tracked import CONFIG, write_run

from minigpt.tracking.mirror import Mirror

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.slow,
    pytest.mark.usefixtures("clean_environment"),
]

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def port(tmp_path: Path, empty_store: bytes) -> Iterator[int]:
    """The port of `make ui`, on a store whose path is a secret."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / f"hunter{port}.db").write_bytes(empty_store)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/hunter{port}.db",
    }
    command = ["make", "--old-file=.venv/.done", "ui", f"PORT={port}"]  # here it is made already
    with (tmp_path / "server.log").open("w") as log:
        running = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(480):
            try:
                requests.get(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except requests.RequestException:
                assert running.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.5)
        else:
            raise AssertionError((tmp_path / "server.log").read_text())
        yield port
    finally:
        os.killpg(running.pid, signal.SIGTERM)
        running.wait(30)


def test_the_ui_is_for_this_machine_and_keeps_secrets(
    port: int, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    url = f"http://127.0.0.1:{port}"
    listening = [
        fields[1].rpartition(":")[0]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for fields in map(str.split, Path(table).read_text(encoding="utf-8").splitlines()[1:])
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port
    ]
    assert listening == ["0100007F"], "127.0.0.1 alone"
    # A page of elsewhere whose name was made to lead here (DNS rebinding) sends its own name.
    statuses = {
        host: requests.get(url, headers={"Host": host}, timeout=30).status_code
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example")
    }
    assert set(statuses.values()) == {403}, statuses
    assert requests.get(url, timeout=30).status_code == 200
    commands = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            commands.append(file.read_bytes())
    assert any(b"mlflow" in command and str(port).encode() in command for command in commands)
    secret = f"hunter{port}".encode()
    assert not any(secret in command for command in commands), "who lists processes reads it"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter3@127.0.0.1:{port}")
    write_run(tmp_path, epochs=1)
    mirror = Mirror(tmp_path, CONFIG, strict=True)
    mirror.send()
    assert requests.get(f"{url}/api/2.0/mlflow/runs/get?run_id={mirror.run_id}").ok
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(mirror.run_id.encode() in content for content in left.values())
    for path, content in left.items():
        assert not re.search(rb"hunter3|bWU6aHVudGVyMw", content), path  # or in base64
    assert "hunter3" not in caplog.text

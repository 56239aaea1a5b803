"""MLflow elsewhere, as docs/remote.md sets it up: PostgreSQL, passwords, artifacts on S3."""

import hashlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import mlflow
import pandas as pd
import pytest
import requests
from helpers import DATABASE_PASSWORD, free_port, wait
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer
from tracked import CONFIG, fake_model, write_evaluation, write_run

from minigpt.common.errors import InputError
from minigpt.tracking.mirror import Mirror
from minigpt.tracking.registry import MEASURED, challenge, register

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.slow,
    pytest.mark.usefixtures("clean_environment"),
]

USER, PASSWORD = "trainer", "a long pass-phrase/of ours"


class Server(NamedTuple):
    url: str
    log: Path
    objects: Callable[[], list[str]]


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`mlflow server` as docs/remote.md starts it, on a bucket of moto's S3, with one user."""
    folder = tmp_path_factory.mktemp("server")
    s3 = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    s3.start()
    host, s3_port = s3.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}
    bucket = boto3.resource(
        "s3", endpoint_url=f"http://{host}:{s3_port}", region_name="us-east-1",
        aws_access_key_id="id", aws_secret_access_key="key",
    ).create_bucket(Bucket="minigpt")  # fmt: skip
    settings = {"database_uri": database, "default_permission": "READ"}
    settings["auth_cache_ttl_seconds"] = "60"
    lines = [f"{key} = {value}" for key, value in settings.items()]
    (folder / "auth.ini").write_text("\n".join(["[mlflow]", *lines]))
    env = {
        **os.environ,
        **keys,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{s3_port}",
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": f"admin's {PASSWORD}",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--app-name=basic-auth", "--workers=1"]
    command += ["--host=127.0.0.1", f"--port={port}", "--artifacts-destination=s3://minigpt/runs"]
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    with log.open("w") as out:
        running = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        wait(running, lambda: urllib.request.urlopen(f"{url}/health", timeout=1).close())
        user = {"username": USER, "password": PASSWORD}
        admin = ("admin", f"admin's {PASSWORD}")
        users = requests.post(f"{url}/api/2.0/mlflow/users/create", json=user, auth=admin)
        assert users.ok, users.text
        yield Server(url, log, lambda: [entry.key for entry in bucket.objects.all()])
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        s3.stop()


def sign_in(patch: pytest.MonkeyPatch, url: str, user: str = "", password: str = "") -> None:
    """What docs/remote.md tells each client to set."""
    settings = {"URI": url, "USERNAME": user, "PASSWORD": password}
    for name, value in settings.items():
        if value:
            patch.setenv(f"MLFLOW_TRACKING_{name}", value)


def test_a_run_and_a_model_go_there_and_come_back(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sign_in(monkeypatch, server.url, USER, PASSWORD)
    write_run(tmp_path)
    write_evaluation(tmp_path)
    mirror = Mirror(tmp_path, CONFIG, strict=True)
    for _ in range(2):
        mirror.send()
    model = fake_model(tmp_path, monkeypatch)
    registered = register(
        mirror,
        model,
        evaluated=hashlib.sha256((model / "config.json").read_bytes()).hexdigest(),
        name="minigpt",
        alias="challenger",
        prompts=["this movie"],
        tags={"bits_per_byte": 1.5, MEASURED["measure"]: 2, MEASURED["measured_on"]: "reviews"},
        description=lambda version: "a card " * 1000,
    )
    assert registered["version"] == "1"
    challenger = {"version": "1", "measure": 2, "measured_on": "reviews", "bits_per_byte": 1.5}
    outcomes = [
        challenge(server.url, "minigpt", challenger, {"min_improvement": 0.0}, dict)
        for _ in range(2)
    ]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["verdict"] == "promoted"

    run = MlflowClient(server.url).get_run(mirror.run_id)
    assert run.info.status == "FINISHED"
    points = MlflowClient(server.url).get_metric_history(mirror.run_id, "loss")
    assert [point.step for point in points] == [1, 2, 3]
    assert run.data.metrics["evaluate/loss"] == 4.5
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")  # clients hold no keys of S3's
    objects = server.objects()
    assert [key for key in objects if key.endswith("/texts/epoch_001.txt")]
    assert [key for key in objects if key.endswith("/artifacts/model/config.json")]
    assert all(key.startswith("runs/") for key in objects)

    mlflow.set_tracking_uri(server.url)
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/texts/epoch_001.txt")
    assert text.startswith("> the\nthe ä")
    loaded = mlflow.pyfunc.load_model("models:/minigpt@challenger")
    assert loaded.predict(pd.DataFrame({"prompt": ["a", "b"]})) == ["a", "b"]


@pytest.mark.parametrize("given", ["nothing", "a wrong password", "a wrong password in the URI"])
def test_who_does_not_sign_in_is_refused_in_one_line(
    server: Server, given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    wrong, url = "not-the-password", server.url
    if given == "a wrong password":
        sign_in(monkeypatch, url, USER, wrong)
    elif given == "a wrong password in the URI":
        url = url.replace("//", f"//{USER}:{wrong}@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    write_run(tmp_path)
    with pytest.raises(InputError) as refused:
        Mirror(tmp_path, CONFIG, strict=True).send()
    line = str(refused.value)
    assert line.startswith(f"MLflow at {server.url} can't be used: ")
    assert "401" in line and "not authenticated" in line
    assert "\n" not in line

    Mirror(tmp_path, CONFIG).send()
    (record,) = caplog.records
    warning = record.getMessage()
    assert warning.startswith(f"MLflow at {server.url} can't be used: ")
    for text in (line, warning, caplog.text):
        assert wrong not in text


def test_the_server_logs_no_password(server: Server) -> None:
    for secret in (PASSWORD, DATABASE_PASSWORD):
        assert secret not in server.log.read_text()

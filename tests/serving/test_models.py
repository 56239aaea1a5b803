"""A new version takes over beside the old one; a broken one does not."""

import asyncio
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tracked import changed

from minigpt.common.errors import InputError
from minigpt.config import RequestConfig, ServingConfig
from minigpt.serving import models as followed
from minigpt.serving import server, sources
from minigpt.serving.completions import Completion
from minigpt.serving.metrics import Metrics
from minigpt.serving.models import Models
from minigpt.serving.requests import parse
from minigpt.serving.sources import Folder, Found, Registry

LIMITS = RequestConfig()


class Moving:
    """A registry whose champion is moved by hand."""

    id, alias = "mini", "@champion"

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.version = folders, "1"
        self.away: Exception | None = None

    def find(self) -> Found:
        if self.away:
            raise self.away
        return Found(f"mini/{self.version}", self.version)

    def fetch(self, found: Found, folder: Path) -> Path | None:
        return self.folders.get(str(found.version))


@pytest.fixture
def moving(make_directory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Moving:
    monkeypatch.setattr(followed, "POLL_S", 0.05)
    folders = {str(seed): make_directory(tmp_path / str(seed), seed) for seed in (1, 2)}
    folders["3"] = shutil.copytree(folders["1"], tmp_path / "3")
    with (folders["3"] / "weights.safetensors").open("ab") as file:
        file.write(b"!")
    return Moving(folders)


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.02)


def test_the_registry_is_followed(moving: Moving, caplog: Any) -> None:
    asyncio.run(follow(moving, caplog))


async def follow(moving: Moving, caplog: Any) -> None:
    metrics = Metrics()
    models = Models([moving], ServingConfig(slots=2), LIMITS, metrics)
    assert not models.ready
    await models.load()
    model = models.by_id["mini"]
    task = asyncio.create_task(models.follow())
    asked = parse(b'{"model": "mini", "prompt": "this", "max_tokens": 600, "seed": 1}', LIMITS)
    running = Completion(asked, model, metrics)
    answer = asyncio.create_task(running.whole())
    first = model.loaded
    moving.version = "2"
    await until(lambda: model.loaded is not first)
    found = await answer  # of the old version, which finished what it had begun
    assert found["model"] == "mini/1" and found["usage"]["completion_tokens"] == 600
    again = await Completion(asked, model, metrics).whole()
    assert again["model"] == "mini/2"
    assert again["choices"][0]["text"] != found["choices"][0]["text"]
    second = model.loaded
    moving.version = "3"
    await until(lambda: model.refused)
    moving.version = "4"
    await until(lambda: model.refused and model.refused.version == "4")
    assert model.loaded is second
    moving.away = ValueError("a figure that is no number")
    await until(lambda: "goes on with version 2: ValueError" in caplog.text)
    moving.away = InputError("MLflow can't be used: no answer")
    await until(lambda: "no answer" in caplog.text)
    await asyncio.sleep(0.3)
    assert caplog.text.count("no answer") == 1  # and not every few seconds
    assert "mini goes on with version 2; 3: " in caplog.text and "was altered" in caplog.text
    assert "mini/4 holds no model directory" in caplog.text
    assert 'minigpt_load_failures_total{model="mini"} 2.0' in metrics.page().decode()
    assert 'minigpt_model_info{model="mini",' in metrics.page().decode()
    task.cancel()
    models.close()


def test_what_model_may_name(store: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    client = MlflowClient(store)
    for loss in ("4.5", "4.4"):
        client.create_model_version(name, "file:///nowhere", tags={"loss": loss})
    client.set_registered_model_alias(name, "champion", "1")
    client.set_registered_model_alias(name, "challenger", "2")

    def found(model: str | None) -> tuple[str, Found]:
        source = sources.source(model, name, Path())
        return source.id, source.find()

    champion = Found(f"{name}/1", "1")
    assert found(None) == (name, champion)
    assert found(f"models:/{name}@champion") == (name, champion)
    assert found(f"models:/{name}@challenger") == (f"{name}@challenger", Found(f"{name}/2", "2"))
    assert found(f"models:/{name}/2") == (f"{name}/2", Found(f"{name}/2", "2"))
    assert found(f"models:/{name}/2")[1].figures == {"loss": 4.4}
    client.delete_registered_model_alias(name, "champion")
    for model, message in (
        (None, f"has no {name} @champion; its versions: 1, 2; `minigpt history`"),
        (f"models:/{name}/7", f"has no {name} 7"),
        ("models:/nothing@champion", "has no nothing @champion; its versions: none"),
        ("models:/", "allowed are a model directory, models:/NAME/NUMBER and models:/NAME@ALIAS"),
        ("nowhere", "there is no such folder"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            found(model)


def test_what_is_not_safe_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server.KEY, " ")  # is none
    folder = tmp_path / "model"
    folder.mkdir()
    config = changed().serving
    for given, message in (
        ({"host": "0.0.0.0"}, "others could reach the server without a key; set MINIGPT_API_KEY"),
        ({"models": [Folder(folder)] * 2}, "two models are called model"),
        ({"models": [Folder(tmp_path / "nowhere")]}, "there is no such folder"),
        ({"port": 70_000}, "--port 70000: a port is a number up to 65535"),
    ):
        defaults: dict[str, Any] = {"models": [Folder(folder)], "host": "127.0.0.1", "port": 0}
        with pytest.raises(InputError, match=message):
            server.serve(**defaults | given, allowed_hosts=[], config=config, limits=LIMITS)


def test_under_which_names_the_server_may_be_asked() -> None:
    loopback = {"127.0.0.1", "localhost", "[::1]"}
    assert server._hosts("::", ["Mini.example"]) == {*loopback, "mini.example"}
    assert server._hosts("2001:DB8::1", []) == {*loopback, "[2001:db8::1]"}


def test_an_id_tells_what_is_followed() -> None:
    assert [Registry("", "m", wanted).id for wanted in ("@champion", "@new", "3")] == [
        "m",
        "m@new",
        "m/3",
    ]

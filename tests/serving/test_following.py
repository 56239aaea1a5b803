"""A server that follows a real registry, while clients ask it without a pause."""

import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from served import Served
from tracked import CONFIG, changed

from minigpt import cli, config
from minigpt.model import directory
from minigpt.tracking import version

pytestmark = pytest.mark.slow


def ask(served: Served, name: str, stream: bool) -> tuple[str, str]:
    """Which version wrote, and what."""
    fields = {"model": name, "prompt": "this movie", "max_tokens": 50, "seed": 3}
    request = urllib.request.Request(
        f"http://127.0.0.1:{served.port}/v1/completions",
        json.dumps({**fields, "stream": stream}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        said = answer.read().decode()
    events = [said]
    if stream:
        *events, end = said.removesuffix("\n\n").split("\n\n")
        assert end == "data: [DONE]"
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    (model,) = {event["model"] for event in found}
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    return model, "".join(event["choices"][0]["text"] for event in found)


def test_no_request_is_dropped_when_the_champion_changes(
    store: str, name: str, make_directory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        model = make_directory(tmp_path / "models" / str(number), number)
        folder = tmp_path / "versions" / str(number)
        version.build(folder, model, directory.digest(model), ["this"], CONFIG)
        MlflowClient(store).create_model_version(name, folder.as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(tmp_path)
    config.save(changed(tracking={"model_name": name}), tmp_path / "resolved.yaml")
    assert cli.main(["promote", "1", "--reason", "the first"]) == 0
    served, stopped = Served(tmp_path), threading.Event()
    texts: dict[str, set[str]] = {}
    last = ""

    def client(stream: bool) -> None:
        nonlocal last
        while not stopped.is_set():
            model, text = ask(served, name, stream)
            texts.setdefault(model, set()).add(text)
            last = model

    def until(number: str) -> None:
        served.wait(lambda: last == f"{name}/{number}" or any(each.done() for each in clients))

    try:
        served.wait(lambda: served.get("/health")[0] == 200)
        with ThreadPoolExecutor() as pool:
            clients = [pool.submit(client, stream) for stream in (True, False, True)]
            try:
                until("1")
                assert cli.main(["promote", "2", "--reason", "better"]) == 0
                until("2")
                assert cli.main(["rollback", "--reason", "worse"]) == 0
                until("1")
            finally:
                stopped.set()
            for each in clients:
                each.result()  # every request had its whole answer
    finally:
        served.process.kill()
        served.process.wait()
    assert set(texts) == {f"{name}/1", f"{name}/2"}
    assert [len(each) for each in texts.values()] == [1, 1]
    assert texts[f"{name}/1"] != texts[f"{name}/2"]

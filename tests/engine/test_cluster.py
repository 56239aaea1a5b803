"""Ray is started or joined, and what must not be joined is refused."""

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from minigpt.common.errors import InputError
from minigpt.config import EngineConfig
from minigpt.engine import cluster


def refused(**settings: Any) -> str:
    """Connects with settings that must be refused; returns the message."""
    with (
        pytest.raises(InputError) as raised,
        cluster.connected(EngineConfig(kind="ray", **settings)),
    ):
        pass
    return str(raised.value)


def test_without_ray_the_message_says_how_it_is_installed(monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused() == (
        "engine.kind is ray, but Ray is not installed: run `make ray`, or choose "
        "groups.engine=local"
    )


@pytest.mark.parametrize(
    "settings", [{}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x" * 32}]
)
def test_beyond_loopback_a_token_is_needed(
    settings: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(cluster, "TOKEN_FILE", tmp_path / "auth_token")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    message = refused(address="192.0.2.1:6379")
    assert message.startswith("engine.address is 192.0.2.1:6379, but there is no token: ")


def test_ray_is_started_twice_at_most(caplog: Any, monkeypatch: Any) -> None:
    pytest.importorskip("ray")
    left: list[subprocess.Popen[bytes]] = []

    def time_out(*arguments: Any, **options: Any) -> None:
        left.append(subprocess.Popen(["sleep", "60"]))
        raise TimeoutError("timed out")

    monkeypatch.setattr(cluster, "_init", time_out)
    with mock.patch.dict(os.environ):
        message = refused()
    assert message.startswith("Ray did not start on this machine: timed out\n")
    assert caplog.messages.count("Ray did not start: timed out; trying once more") == 1
    assert [process.wait(10) for process in left] == [-9, -9]


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not see the project's folder: each machine of"):
        cluster.enter(tmp_path / "elsewhere", {})

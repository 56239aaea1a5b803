"""What tools/environment.py says before it installs, and what uv gets of pip's settings."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import environment


@pytest.fixture
def project(tmp_path: Path, monkeypatch: Any) -> Path:
    """A project with one commit, on a disk with room."""
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    (tmp_path / "dvc.yaml").touch()
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "start"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment, "PROJECT", tmp_path)
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(environment, "DISK_BYTES", 0)
    return tmp_path


def test_a_complete_machine_misses_nothing(project: Path) -> None:
    assert list(environment.missing()) == []


def test_git_is_missing(project: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (problem,) = environment.missing()
    assert problem.startswith("git is missing")


def test_there_is_no_commit(project: Path) -> None:
    shutil.rmtree(project / ".git")
    (problem,) = environment.missing()
    assert "not a git repository" in problem and "git init" in problem


def test_a_parent_folders_commit_does_not_count(project: Path, monkeypatch: Any) -> None:
    copy = project / "copy"
    copy.mkdir()
    monkeypatch.setattr(environment, "PROJECT", copy)
    (problem,) = environment.missing()
    assert problem.startswith("no commit of this project")


def test_the_disk_is_full(project: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(environment, "DISK_BYTES", 10**18)
    (problem,) = environment.missing()
    assert "GB are free" in problem
    (project / ".venv").mkdir()
    (project / ".venv/.done").touch()
    assert list(environment.missing()) == [], "a finished environment is replaced"


def test_a_linked_environment_is_not_emptied(project: Path) -> None:
    (project / "shared").mkdir()
    (project / ".venv").symlink_to("shared")
    (problem,) = environment.missing()
    assert f"is a link to {project / 'shared'}" in problem and "remove the link" in problem


@pytest.mark.parametrize("letter", [*"#?%é漢{}", "\t"])
def test_dvc_refuses_the_path(project: Path, monkeypatch: Any, letter: str) -> None:
    moved = project.rename(project.with_name(f"a{letter}b"))
    monkeypatch.setattr(environment, "PROJECT", moved)
    (problem,) = environment.missing()
    assert f"holds {letter if letter.isprintable() else ascii(letter)}:" in problem


def test_uv_gets_pips_settings() -> None:
    listed = """\
:env:.cert='/ca.crt'
:env:.find-links='/wheels /more'
global.extra-index-url='\\nhttps://one.example/simple\\nhttps://two.example/simple'
global.index-url='https://global.example/simple'
global.timeout='60'
install.index-url='https://install.example/simple'
"""
    assert environment.uv_environment(listed) == {
        "UV_DEFAULT_INDEX": "https://install.example/simple",
        "UV_INDEX": "https://one.example/simple https://two.example/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "SSL_CERT_FILE": "/ca.crt",
    }


def test_pip_lists_its_settings_in_that_form(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://here.example/simple\n", encoding="utf-8"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_CERT", "/ca.crt")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    command = [sys.executable, *environment.PIP[1:], "config", "list"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = environment.uv_environment(listed)
    assert found["UV_DEFAULT_INDEX"] == "https://here.example/simple"
    assert found["SSL_CERT_FILE"] == "/ca.crt"

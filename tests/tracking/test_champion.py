"""The alias @champion moved by hand, in real sqlite stores."""

import contextlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from mlflow import MlflowClient

from minigpt.common.errors import InputError
from minigpt.tracking import champion, history
from minigpt.tracking.champion import move, promote, rollback, state

pytestmark = pytest.mark.usefixtures("clean_environment")


Mini = tuple[str, str]  # the store's address, and the name of a registered model


@pytest.fixture
def mini(store: str, name: str) -> Mini:
    """A registered model with four versions."""
    for _ in range(4):
        MlflowClient(store).create_model_version(name, "file:///nowhere")
    return store, name


def by_alias(mini: Mini) -> Any:
    return MlflowClient(mini[0]).get_model_version_by_alias(mini[1], "champion")


def moves(mini: Mini) -> list[tuple[str | None, str | None]]:
    return [(entry["from"], entry["version"]) for entry in state(*mini).history]


# The alias and its history.


def test_a_promotion_is_recorded(mini: Mini) -> None:
    assert state(*mini) == (None, [])
    assert promote(*mini, "2", reason=" reads\n better ") is None
    assert promote(*mini, "3", reason="ödd “quotes”, {braces}") == "2"
    now, (first, second) = state(*mini)
    assert now == "3"
    assert str(by_alias(mini).version) == "3"
    seconds = datetime.now(UTC) - datetime.fromisoformat(str(first.pop("time")))
    assert 0 <= seconds.total_seconds() < 60
    assert first.pop("who")
    assert first == {"version": "2", "from": None, "how": "promote", "reason": "reads better"}
    assert second["reason"] == "ödd “quotes”, {braces}"


def test_a_rollback_goes_further_back_each_time(mini: Mini) -> None:
    for version in ("1", "2", "3"):
        promote(*mini, version, reason="better")
    assert rollback(*mini, reason="worse") == ("2", "3")
    assert rollback(*mini, reason="worse") == ("1", "2")
    with pytest.raises(InputError, match=r"no champion to go back to \(now: version 1\)"):
        rollback(*mini, reason="worse")
    promote(*mini, "4", reason="better")
    assert rollback(*mini, reason="worse") == ("1", "4")
    assert moves(mini)[3:] == [("3", "2"), ("2", "1"), ("1", "4"), ("4", "1")]


def test_a_rollback_without_a_history(mini: Mini) -> None:
    with pytest.raises(InputError, match=r"no champion to go back to \(now: none\)"):
        rollback(*mini, reason="worse")
    promote(*mini, "1", reason="first")
    with pytest.raises(InputError, match=r"no champion to go back to \(now: version 1\)"):
        rollback(*mini, reason="worse")


def test_a_rollback_skips_a_deleted_version(mini: Mini) -> None:
    for version in ("1", "2", "3"):
        promote(*mini, version, reason="better")
    MlflowClient(mini[0]).delete_model_version(mini[1], "2")
    assert rollback(*mini, reason="worse") == ("1", "3")


def test_a_champion_that_was_set_or_deleted_in_the_ui(mini: Mini) -> None:
    client, name = MlflowClient(mini[0]), mini[1]
    client.set_registered_model_alias(name, "champion", "1")
    assert promote(*mini, "2", reason="better") == "1"
    assert rollback(*mini, reason="worse") == ("1", "2")
    client.set_registered_model_alias(name, "champion", "3")
    assert rollback(*mini, reason="worse") == ("1", "3")
    client.delete_registered_model_alias(name, "champion")
    assert rollback(*mini, reason="who deleted it?") == ("1", None)
    assert state(*mini).version == "1"


def test_a_reason_is_needed(mini: Mini) -> None:
    for reason in ("", " \n ", "x" * 1001):
        with pytest.raises(InputError, match=r"the reason has \d+ characters: 1 to 1000 are"):
            promote(*mini, "1", reason=reason)
    assert state(*mini) == (None, [])
    longest = "\U0001f600" * 1000
    promote(*mini, "1", reason=longest)
    assert state(*mini).history[0]["reason"] == longest


def test_versions_that_can_not_be_promoted(mini: Mini) -> None:
    with pytest.raises(InputError, match=f"{mini[1]} has no version 9; there are: 1, 2, 3, 4"):
        promote(*mini, "9", reason="better")
    with pytest.raises(InputError, match=r"has no registered model 'maxi'; there are: .*mini"):
        promote(mini[0], "maxi", "1", reason="better")
    promote(*mini, "1", reason="better")
    with pytest.raises(InputError, match=f"version 1 of {mini[1]} is the champion already"):
        promote(*mini, "1", reason="better")
    assert moves(mini) == [(None, "1")]


# Interruptions: whatever reply is lost, the same command again ends where one alone would have.


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("method", ["set_registered_model_tag", "set_registered_model_alias"])
def test_a_rollback_whose_reply_was_lost_is_repeated(
    mini: Mini, monkeypatch: Any, method: str, arrives: bool
) -> None:
    for version in ("1", "2", "3"):
        promote(*mini, version, reason="better")
    real = getattr(MlflowClient, method)

    def cut_off(self: MlflowClient, *args: Any) -> None:
        if arrives:
            real(self, *args)
        raise ConnectionError("the reply was lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, method, cut_off)
        with pytest.raises(InputError, match="the reply was lost; the same command again"):
            rollback(*mini, reason="worse")
    assert rollback(*mini, reason="worse") == ("2", "3")
    assert moves(mini)[3:] == [("3", "2")]
    assert rollback(*mini, reason="worse") == ("1", "2")


@pytest.mark.parametrize("arrives", [True, False])
def test_a_move_that_was_made_is_no_failure(mini: Mini, monkeypatch: Any, arrives: bool) -> None:
    """The last write only says that the alias was moved."""
    for version in ("1", "2", "3"):
        promote(*mini, version, reason="better")
    real, written = MlflowClient.set_registered_model_tag, []

    def cut_off(self: MlflowClient, *args: Any) -> None:
        written.append(args)
        if len(written) < 2 or arrives:
            real(self, *args)
        if len(written) == 2:
            raise ConnectionError("the reply was lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_tag", cut_off)
        assert rollback(*mini, reason="worse") == ("2", "3")
    assert moves(mini)[3:] == [("3", "2")]
    if not arrives:  # the move looks interrupted, and the next rollback ends it
        assert rollback(*mini, reason="worse") == ("2", "3")
    assert rollback(*mini, reason="worse") == ("1", "2")
    assert moves(mini)[3:] == [("3", "2"), ("2", "1")]


def test_a_promotion_whose_reply_was_lost_is_repeated(mini: Mini, monkeypatch: Any) -> None:
    promote(*mini, "1", reason="better")
    real = MlflowClient.set_registered_model_alias

    def cut_off(self: MlflowClient, *args: Any) -> None:
        real(self, *args)
        raise ConnectionError("the reply was lost")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="the reply was lost"):
        patch.setattr(MlflowClient, "set_registered_model_alias", cut_off)
        promote(*mini, "2", reason="better")
    assert promote(*mini, "2", reason="better") == "1"
    assert moves(mini) == [(None, "1"), ("1", "2")]
    with pytest.raises(InputError, match="is the champion already"):
        promote(*mini, "2", reason="better")


def test_a_promotion_that_was_not_made_is_no_champion_to_go_back_to(
    mini: Mini, monkeypatch: Any
) -> None:
    for version in ("1", "2"):
        promote(*mini, version, reason="better")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="the server is away"):
        patch.setattr(MlflowClient, "set_registered_model_alias", away)
        promote(*mini, "3", reason="better")
    promote(*mini, "4", reason="better")
    assert moves(mini) == [(None, "1"), ("1", "2"), ("2", "4")]
    assert [rollback(*mini, reason="worse")[0] for _ in range(2)] == ["2", "1"]


def away(*args: Any) -> None:
    raise ConnectionError("the server is away")


# What the order of the history does not depend on; test_history.py has more.


def test_clocks_do_not_order_the_history(mini: Mini, monkeypatch: Any) -> None:
    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(minutes=5)

    with monkeypatch.context() as patch:
        patch.setattr(history, "datetime", Ahead)
        for version in ("1", "2", "3"):
            promote(*mini, version, reason="better")
    assert [rollback(*mini, reason="worse")[0] for _ in range(2)] == ["2", "1"]
    with pytest.raises(InputError, match=r"no champion to go back to \(now: version 1\)"):
        rollback(*mini, reason="worse")


def test_a_tag_made_by_hand_breaks_nothing(mini: Mini) -> None:
    client, name = MlflowClient(mini[0]), mini[1]
    promote(*mini, "1", reason="better")
    values = ["a note", "[1]", "{}", "null", '{"version": 3, "from": null}', "[" * 5000]
    for number, value in enumerate(values):
        client.set_registered_model_tag(name, f"minigpt.champion.{number}", value)
    client.set_registered_model_tag(name, "minigpt.champion.zz", '{"version": "4"}')
    promote(*mini, "2", reason="better")
    assert moves(mini) == [(None, "1"), ("1", "2")]
    assert rollback(*mini, reason="worse") == ("1", "2")


# Several at once, on a sqlite file.


AT_ONCE = """
import sys
from multiprocessing import get_context
from minigpt.common.errors import InputError
from minigpt.tracking import champion, history

uri, name, *kinds = sys.argv[1:]

def act(barrier, number, kind):
    barrier.wait()
    try:
        if kind == "rollback":
            champion.rollback(uri, name, reason=f"worse {number}")
        else:
            champion.promote(uri, name, kind, reason=f"better {number}")
    except InputError as error:
        print(error)

context = get_context("fork")
barrier = context.Barrier(len(kinds))
running = [context.Process(target=act, args=(barrier, *each)) for each in enumerate(kinds)]
[process.start() for process in running]
[process.join() for process in running]
sys.exit(any(process.exitcode for process in running))
"""


def at_once(mini: Mini, *kinds: str) -> list[str]:
    """Runs commands at once, and returns what those that were refused say."""
    command = [sys.executable, "-c", AT_ONCE, *mini, *kinds]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.stderr, ran.returncode) == ("", 0)
    return ran.stdout.splitlines()


@pytest.mark.slow
def test_twenty_rollbacks_at_once(mini: Mini) -> None:
    for version in ("1", "2", "3"):
        promote(*mini, version, reason="better")
    refused = at_once(mini, *["rollback"] * 20)
    assert len(refused) == 18
    assert all("no champion to go back to (now: version 1)" in line for line in refused)
    assert state(*mini).version == "1"
    assert moves(mini)[3:] == [("3", "2"), ("2", "1")]


@pytest.mark.slow
def test_twenty_moves_at_once(mini: Mini) -> None:
    promote(*mini, "1", reason="better")
    refused = at_once(mini, *["rollback", "2", "3", "rollback", "4"] * 4)
    allowed = ("is the champion already", "no champion to go back to")
    assert all(any(text in line for text in allowed) for line in refused)
    now, entries = state(*mini)
    assert len(entries) == 21 - len(refused)
    assert now == entries[-1]["version"]
    assert [entry["from"] for entry in entries] == [None, *(e["version"] for e in entries[:-1])]


def test_a_move_is_not_made_if_the_champion_has_changed(mini: Mini) -> None:
    promote(*mini, "1", reason="better")
    assert not move(*mini, "2", how="gate", reason="better", expected=None)
    assert moves(mini) == [(None, "1")]


# Several at once on a server, which has no lock.


@pytest.fixture
def no_lock(monkeypatch: Any) -> None:
    monkeypatch.setattr(champion, "lock", lambda uri: contextlib.nullcontext())
    monkeypatch.setattr(champion, "sqlite_path", lambda uri: None)
    monkeypatch.setattr(champion, "UNDER_WAY_S", 1)


@pytest.mark.usefixtures("no_lock")
@pytest.mark.parametrize("by_hand", [True, False])
def test_two_that_promote_at_once_do_not_overwrite_each_other(
    mini: Mini, monkeypatch: Any, by_hand: bool
) -> None:
    promote(*mini, "1", reason="better")
    real, called = MlflowClient.set_registered_model_tag, []

    def overtaken(self: MlflowClient, *args: Any) -> None:
        called.append(args)
        if len(called) == 1:
            promote(*mini, "3", reason="faster")
        real(self, *args)

    monkeypatch.setattr(MlflowClient, "set_registered_model_tag", overtaken)
    if by_hand:
        with pytest.raises(InputError, match="was moved at the same time, to version 3"):
            promote(*mini, "2", reason="better")
    else:  # the gate decides again
        assert not move(*mini, "2", how="gate", reason="better", expected="1")
    assert moves(mini) == [(None, "1"), ("1", "3")]


@pytest.mark.usefixtures("no_lock")
def test_two_that_withdraw_for_each_other_try_again(mini: Mini, monkeypatch: Any) -> None:
    for version in ("1", "2", "3"):
        promote(*mini, version, reason="better")
    real, other = MlflowClient.set_registered_model_tag, MlflowClient(mini[0])
    foreign = history.new("1", "3", "promote", "older, but better", [])
    called = []

    def crossed(self: MlflowClient, *args: Any) -> None:
        called.append(args)
        if len(called) == 1:
            real(other, mini[1], foreign.key, foreign.text())
        if len(called) == 2:
            other.delete_registered_model_tag(mini[1], foreign.key)
        real(self, *args)

    monkeypatch.setattr(MlflowClient, "set_registered_model_tag", crossed)
    assert rollback(*mini, reason="worse") == ("2", "3")
    assert len(called) == 3
    assert moves(mini)[3:] == [("3", "2")]


@pytest.mark.usefixtures("no_lock")
def test_a_later_write_on_a_server_is_reported(mini: Mini, monkeypatch: Any) -> None:
    """Another may write between our writing and our reading."""
    real = MlflowClient.set_registered_model_alias

    def crossed(self: MlflowClient, *args: Any) -> None:
        real(self, *args)
        real(self, mini[1], "champion", "3")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", crossed)
        with pytest.raises(InputError, match="only for a moment: version 3 was promoted"):
            promote(*mini, "2", reason="better")
    assert moves(mini) == []
    promote(*mini, "4", reason="better")
    assert rollback(*mini, reason="it was 3 that I wanted") == ("3", "4")


@pytest.mark.usefixtures("no_lock")
def test_a_move_that_is_under_way_on_a_server_is_waited_for(mini: Mini, monkeypatch: Any) -> None:
    for version in ("1", "2", "3"):
        promote(*mini, version, reason="better")
    real, begun = MlflowClient.set_registered_model_alias, threading.Event()

    def slow(self: MlflowClient, *args: Any) -> None:
        begun.set()
        time.sleep(0.5)
        real(self, *args)

    with monkeypatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(MlflowClient, "set_registered_model_alias", slow)
        first = pool.submit(rollback, *mini, reason="worse")
        begun.wait()
        assert rollback(*mini, reason="worse") in [("2", "3"), ("1", "2")]
        assert first.result() == ("2", "3")
    assert moves(mini)[3:] in [[("3", "2")], [("3", "2"), ("2", "1")]]


@pytest.mark.usefixtures("no_lock")
def test_a_move_that_never_ends_is_not_waited_for(mini: Mini, monkeypatch: Any) -> None:
    monkeypatch.setattr(champion, "UNDER_WAY_S", 0.3)
    for version in ("1", "2", "3"):
        promote(*mini, version, reason="better")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="the server is away"):
        patch.setattr(MlflowClient, "set_registered_model_alias", away)
        rollback(*mini, reason="worse")
    assert rollback(*mini, reason="worse") == ("2", "3")

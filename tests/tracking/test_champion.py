"""The alias @champion moved by hand, in real sqlite stores."""

from datetime import UTC, datetime
from typing import Any

import pytest
from mlflow import MlflowClient

from minigpt.common.errors import InputError
from minigpt.tracking import champion
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


# Several at once; test_store.py has processes that do it for real.


def test_a_move_is_not_made_if_the_champion_has_changed(mini: Mini) -> None:
    promote(*mini, "1", reason="better")
    assert not move(*mini, "2", how="gate", reason="better", expected=None)
    assert moves(mini) == [(None, "1")]


def test_two_that_promote_by_hand_do_not_overwrite_each_other(mini: Mini, monkeypatch: Any) -> None:
    real = champion.move

    def overtaken(*args: Any, **kwargs: Any) -> bool:
        monkeypatch.setattr(champion, "move", real)
        promote(*mini, "3", reason="faster")
        return real(*args, **kwargs)

    monkeypatch.setattr(champion, "move", overtaken)
    with pytest.raises(InputError, match="was moved at the same time, to version 3"):
        promote(*mini, "2", reason="better")
    assert moves(mini) == [(None, "3")]


def test_a_later_write_on_a_server_is_reported(mini: Mini, monkeypatch: Any) -> None:
    """A server has no lock: another may write between our writing and our reading."""
    real = MlflowClient.set_registered_model_tag

    def crossed(self: MlflowClient, *args: Any) -> None:
        real(self, *args)
        self.set_registered_model_alias(mini[1], "champion", "3")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_tag", crossed)
        with pytest.raises(InputError, match="only for a moment: version 3 was promoted"):
            promote(*mini, "2", reason="better")
    assert rollback(*mini, reason="it was 2 that I wanted") == ("2", "3")

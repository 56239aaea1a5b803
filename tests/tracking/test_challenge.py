"""Whether a registered version becomes the champion, in a real sqlite store."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from tracked import fake_model

from minigpt.common.errors import InputError
from minigpt.tracking import champion, registry

pytestmark = pytest.mark.usefixtures("clean_environment")

SETTINGS = {"max_perplexity": 1000.0, "min_improvement": 0.01}


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


never = raising(AssertionError("nothing is to be measured"))


class Registered:
    """A registered model, its versions and the challenges to its champion."""

    def __init__(self, uri: str, name: str) -> None:
        self.uri, self.name, self.client = uri, name, MlflowClient(uri)

    def version(
        self, bits_per_byte: float | None, source: str = "file:///nowhere", **other: Any
    ) -> dict[str, Any]:
        """Makes a version with the tags that `register` gives; returns what it says of itself."""
        experiment = self.client.get_experiment_by_name("minigpt")
        assert experiment
        run = self.client.create_run(experiment.experiment_id).info.run_id
        figures = {} if bits_per_byte is None else {"bits_per_byte": bits_per_byte}
        own = {"measure": 2, "measured_on": "reviews", **figures, **other}
        tags = {key: str(value) for key, value in figures.items()} | registry.measured_tags(own)
        version = self.client.create_model_version(self.name, source, run, tags)
        return {"version": str(version.version), **own}

    def challenge(
        self,
        challenger: dict[str, Any],
        measure: Any = never,
        promotes: bool = True,
        **settings: float,
    ) -> dict[str, Any]:
        return registry.challenge(
            self.uri,
            self.name,
            challenger,
            {**SETTINGS, **settings},
            measure,
            promotes=promotes,
        )

    def state(self) -> champion.State:
        return champion.state(self.uri, self.name)

    def moves(self) -> list[tuple[str | None, ...]]:
        return [(move["from"], move["version"], move["how"]) for move in self.state().history]


@pytest.fixture
def mini(store: str, name: str) -> Registered:
    return Registered(store, name)


def test_the_first_that_passes_then_only_a_better_one(mini: Registered) -> None:
    verdicts = []
    for bits_per_byte in (1.5, 1.495, 1.6, 1.48):
        mine = mini.version(bits_per_byte)
        outcome = mini.challenge(mine)
        verdicts.append((outcome["verdict"], (outcome["champion"] or {}).get("version")))
    assert verdicts == [("promoted", None), ("kept", "1"), ("kept", "1"), ("promoted", "1")]
    assert mini.state().version == "4"
    assert mini.moves() == [(None, "1", "gate"), ("1", "4", "gate")]
    reason = (
        "bits per byte 1.4800 against the champion's 1.5000 (version 1): better by 0.0200, needed "
        "0.01"
    )
    assert mini.state().history[1]["reason"] == outcome["reason"] == reason
    assert outcome["challenger"] == mine
    assert outcome["champion"] == {"version": "1", "bits_per_byte": 1.5, "measured": "recorded"}
    # The outcome is an artifact of the version's run, and one line of it a tag of the version.
    version = mini.client.get_model_version(mini.name, "4")
    assert version.tags["minigpt.gate"] == f"promoted: {reason}"
    run = mini.client.get_run(str(version.run_id))
    recorded = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/gate/{mini.name}_4.json")
    assert json.loads(recorded) == outcome


def test_a_decision_stands_unless_the_settings_change(mini: Registered) -> None:
    first, second = (mini.version(bits_per_byte) for bits_per_byte in (1.5, 1.4))
    outcomes = [mini.challenge(mine) for mine in (first, second)]
    champion.rollback(mini.uri, mini.name, reason="it swears")
    before = mini.state()
    assert [mini.challenge(mine) for mine in (first, second)] == outcomes
    assert mini.state() == before
    assert before.version == "1"

    third = mini.version(1.495)
    assert mini.challenge(third)["verdict"] == "kept"
    assert mini.challenge(third, min_improvement=0.0)["verdict"] == "promoted"
    outcome = mini.challenge(third, min_improvement=0.0, max_perplexity=0.0)
    assert (outcome["verdict"], outcome["reason"]) == ("promoted", "it is the champion already")
    assert len(mini.moves()) == 4


def test_nothing_held_out_is_never_the_champion(mini: Registered) -> None:
    for _ in range(2):  # without a champion and with one
        outcome = mini.challenge(mini.version(None, measured_on=None))
        assert outcome["verdict"] == "not compared"
        assert "nothing is held out" in outcome["reason"]
        mini.challenge(mini.version(1.5))
    assert outcome["champion"] == {"version": "2"}


def test_an_experiment_in_a_copy_is_promoted_by_hand(mini: Registered) -> None:
    first = mini.version(1.5)
    outcome = mini.challenge(first, promotes=False)
    assert outcome["verdict"] == "not promoted"
    assert outcome["reason"] == (
        "bits per byte 1.5000; there was no champion; an experiment in a copy of the project is "
        "promoted by hand: `minigpt promote 1 --reason ...`"
    )
    assert mini.state() == (None, [])
    version = mini.client.get_model_version(mini.name, "1")
    assert version.tags["minigpt.gate"] == f"not promoted: {outcome['reason']}"
    assert mini.challenge(first, promotes=False) == outcome

    # In the project itself the same version is decided on.
    assert mini.challenge(first)["verdict"] == "promoted"
    assert mini.challenge(first, promotes=False)["verdict"] == "promoted"
    worse, better = mini.version(1.6), mini.version(1.4)
    assert mini.challenge(worse, promotes=False)["verdict"] == "kept"
    outcome = mini.challenge(better, promotes=False)
    assert outcome["reason"].startswith("bits per byte 1.4000 against the champion's 1.5000 ")
    assert outcome["champion"]["bits_per_byte"] == 1.5
    assert mini.state().version == "1"
    champion.promote(mini.uri, mini.name, outcome["challenger"]["version"], reason="as it says")


# A champion that was measured on other reviews, or in another vocabulary.


@pytest.fixture
def measured_elsewhere(mini: Registered, tmp_path: Path, monkeypatch: Any) -> Registered:
    """The champion, version 1, holds a model directory."""
    fake_model(tmp_path, monkeypatch)
    flavor = {"artifacts": {"model": {"path": "model"}}}
    (tmp_path / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": flavor}}))
    mine = mini.version(0.5, source=tmp_path.as_uri(), measured_on="other reviews")
    assert mini.challenge(mine)["verdict"] == "promoted"
    return mini


def test_a_champion_measured_elsewhere_is_measured_again(measured_elsewhere: Registered) -> None:
    for theirs, verdict in ((1.1, "kept"), (1.3, "promoted")):

        def measure(model: Any, theirs: float = theirs) -> dict[str, float]:
            assert (model.path / "config.json").read_text() == "a model"
            return {"bits_per_byte": theirs, "perplexity": 90.0}

        outcome = measured_elsewhere.challenge(measured_elsewhere.version(1.2), measure)
        assert outcome["verdict"] == verdict
        measured = {"bits_per_byte": theirs, "perplexity": 90.0, "measured": "again"}
        assert outcome["champion"] == {"version": "1", **measured}


@pytest.mark.parametrize("measure", [1, None])
def test_a_figure_under_another_measure_is_never_compared(
    mini: Registered, tmp_path: Path, monkeypatch: Any, measure: int | None
) -> None:
    """The champion's tags are of the measure before: on the same reviews, and much better."""
    fake_model(tmp_path, monkeypatch)
    flavor = {"artifacts": {"model": {"path": "model"}}}
    (tmp_path / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": flavor}}))
    assert mini.challenge(mini.version(0.5, tmp_path.as_uri(), measure=measure))
    mine = mini.version(1.2)
    outcome = mini.challenge(mine, lambda model: {"bits_per_byte": 1.3})
    assert outcome["verdict"] == "promoted"
    assert outcome["champion"] == {"version": "1", "bits_per_byte": 1.3, "measured": "again"}
    champion.rollback(mini.uri, mini.name, reason="once more, without its model")
    (tmp_path / "MLmodel").unlink()
    outcome = mini.challenge(mini.version(1.1))
    assert outcome["verdict"] == "not compared"
    assert outcome["champion"]["problem"] == (
        "version 1 can't be loaded: it holds no model directory"
    )


def test_a_champion_that_can_not_be_loaded_is_not_compared(
    measured_elsewhere: Registered, monkeypatch: Any
) -> None:
    directory = sys.modules["minigpt.model.directory"]
    for error, reason in (
        (InputError("a weight is missing"), "version 1 can't be loaded: a weight is missing"),
        (directory.OlderFormat("model/ has format 1"), "version 1 has an older format"),
    ):
        monkeypatch.setattr(directory, "load", raising(error))
        mine = measured_elsewhere.version(1.2)
        outcome = measured_elsewhere.challenge(mine)
        next_step = f"`minigpt promote {mine['version']} --reason ...` makes this version the"
        assert outcome["verdict"] == "not compared"
        assert outcome["reason"] == f"{reason}; {next_step} champion"
        assert outcome["champion"] == {"version": "1", "measured": "not", "problem": reason}
    assert measured_elsewhere.state().version == "1"


def test_an_error_of_the_environment_is_no_verdict(
    measured_elsewhere: Registered, monkeypatch: Any
) -> None:
    mine = measured_elsewhere.version(1.2)
    places = {
        "fetch": (mlflow.artifacts, "download_artifacts"),
        "load": (sys.modules["minigpt.model.directory"], "load"),
    }
    for where, error, raised in (
        ("fetch", ConnectionError("the server is away"), InputError),
        ("fetch", OSError(28, "No space left on device"), OSError),
        ("load", MemoryError("out of memory"), MemoryError),
        ("load", OSError(5, "Input/output error"), OSError),
        ("measure", InputError("data/reviews.parquet is missing"), InputError),
        ("measure", OSError(28, "No space left on device"), OSError),
    ):
        with monkeypatch.context() as patch, pytest.raises(raised, match=str(error.args[-1])):
            if where in places:
                patch.setattr(*places[where], raising(error))
            measured_elsewhere.challenge(mine, raising(error))
    version = measured_elsewhere.client.get_model_version(measured_elsewhere.name, "2")
    assert "minigpt.gate" not in version.tags


def test_artifacts_that_are_out_of_reach_are_no_verdict(
    measured_elsewhere: Registered, tmp_path: Path
) -> None:
    mine, away = measured_elsewhere.version(1.2), tmp_path.with_name(f"{tmp_path.name} away")
    tmp_path.rename(away)
    for is_there in (False, True):  # a disk that is not mounted, as a rule, leaves an empty folder
        if is_there:
            tmp_path.mkdir()
        with pytest.raises(InputError, match=r"no file of version 1 .*: bring its artifacts back"):
            measured_elsewhere.challenge(mine)
    tmp_path.rmdir()
    away.rename(tmp_path)
    outcome = measured_elsewhere.challenge(mine, lambda model: {"bits_per_byte": 1.1})
    assert outcome["verdict"] == "kept"


# Interruptions, and several at once.


def test_a_champion_of_the_last_moment_counts(mini: Registered, monkeypatch: Any) -> None:
    """Another run's model becomes the champion between the decision and the move."""
    mini.challenge(mini.version(1.5))
    mine, other = mini.version(1.4), mini.version(1.3)
    move: Callable[..., bool] = champion.move

    def overtaken(*args: Any, **kwargs: Any) -> bool:
        monkeypatch.setattr(champion, "move", move)
        assert mini.challenge(other)["verdict"] == "promoted"
        return move(*args, **kwargs)

    monkeypatch.setattr(champion, "move", overtaken)
    outcome = mini.challenge(mine)
    assert (outcome["verdict"], outcome["champion"]["version"]) == ("kept", "3")
    assert mini.state().version == "3"


def test_an_interrupted_challenge_is_finished_by_the_next(
    mini: Registered, monkeypatch: Any
) -> None:
    mini.challenge(mini.version(1.5))
    mine = mini.version(1.4)
    for method in ("set_registered_model_tag", "set_model_version_tag", "log_dict"):
        with monkeypatch.context() as patch, pytest.raises(InputError, match="the store is away"):
            patch.setattr(MlflowClient, method, raising(OSError("the store is away")))
            mini.challenge(mine)
    outcome = mini.challenge(mine)
    assert mini.state().version == "2"
    assert mini.moves() == [(None, "1", "gate"), ("1", "2", "gate")]
    # What an undisturbed one says.
    assert outcome["verdict"] == "promoted"
    assert outcome["champion"]["bits_per_byte"] == 1.5
    assert mini.state().history[-1]["reason"] == outcome["reason"]
    assert outcome["reason"].startswith("bits per byte 1.4000 against the champion's 1.5000")


def test_a_version_promoted_by_hand_before_its_challenge_stays(mini: Registered) -> None:
    mini.challenge(mini.version(1.5))
    mine = mini.version(1.6)
    champion.promote(mini.uri, mini.name, "2", reason="it reads better")
    outcome = mini.challenge(mine)
    assert (outcome["verdict"], outcome["reason"]) == ("promoted", "it is the champion already")
    assert len(mini.moves()) == 2

"""A model directory becomes a version, and the version a champion, in real sqlite stores."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import mlflow
import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import minigpt
from minigpt.common.errors import InputError
from minigpt.tracking import champion, registry
from minigpt.tracking.mirror import Tracker
from minigpt.tracking.registry import challenge, register

pytestmark = pytest.mark.usefixtures("clean_environment")

CONFIG: dict[str, Any] = {
    "vocabulary": {"style": "spaced"},
    "sample": {
        "prompts": ["this movie"],
        "max_tokens": 40,
        "temperature": 0.9,
        "top_k": 0,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "allow_unknown": False,
        "seed": 7,
    },
    "tracking": {
        "request": {
            "max_prompts": 2,
            "max_prompt_bytes": 100,
            "max_tokens": 50,
            "max_total_tokens": 100,
        }
    },
}
SETTINGS = {"max_perplexity": 1000.0, "min_improvement": 0.01}


@pytest.fixture
def project(tmp_path: Path, empty_store: bytes) -> Path:
    """A project's folder before its model is registered; its name is an awkward one."""
    root = tmp_path / "pro ject#1"
    root.mkdir()
    (root / "mlflow.db").write_bytes(empty_store)
    outs = {"data/reviews.parquet": "a" * 32, "data/sequences": "b" * 32, "model": "c" * 32}
    entries = [{"path": path, "md5": md5} for path, md5 in outs.items()]
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"train": {"outs": entries}}}))
    return root


class Echo:
    settings: ClassVar[dict[str, Any]]

    def __init__(self, *args: Any) -> None: ...

    def __call__(self, prompts: list[str], sampling: Any) -> list[str]:
        self.__class__.settings = vars(sampling)
        return prompts


@pytest.fixture
def model_dir(project: Path, monkeypatch: Any) -> Path:
    (project / "model").mkdir()
    (project / "model/vocabulary.txt").write_text("\n[UNK]\nfilm\n")
    loaded = SimpleNamespace(network=None, vocabulary=None, config=CONFIG)
    fakes = {
        "model": SimpleNamespace(load=lambda path: loaded if path.is_dir() else None),
        "decoding": SimpleNamespace(Generator=Echo, Sampling=SimpleNamespace),
    }
    for name, fake in fakes.items():  # no TensorFlow here; tests/test_serving.py is nearer to it
        monkeypatch.setitem(sys.modules, f"minigpt.{name}", fake)
        monkeypatch.setattr(minigpt, name, fake, raising=False)
    return project / "model"


def test_registering_twice_gives_one_version(
    project: Path, model_dir: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # anywhere but the project
    tracker = Tracker("t1", CONFIG, project, strict=True)
    first = register(
        tracker, model_dir, name="mini", alias="newest", prompts=["this movie"], tags={}
    )
    assert first["uri"] == "models:/mini/1" and first["run_id"] == tracker.run_id
    again = Tracker("t1", CONFIG, project, strict=True)
    assert register(
        again, model_dir, name="mini", alias="best", prompts=["this movie"], tags={}
    ) == {
        **first,
        "alias": "best",
    }
    (model_dir / "vocabulary.txt").write_text("\n[UNK]\nmovie\n")
    other = register(again, model_dir, name="mini", alias="newest", prompts=["this movie"], tags={})
    assert other["version"] == "2" and other["model_sha256"] != first["model_sha256"]

    client = MlflowClient(tracker.uri)
    assert client.get_model_version_by_alias("mini", "newest").run_id == tracker.run_id
    versions = [client.get_model_version_by_alias("mini", a).version for a in ("best", "newest")]
    assert [str(version) for version in versions] == ["1", "2"]

    own = {k: v for k, v in CONFIG["sample"].items() if k != "prompts"}
    prompts = pd.DataFrame({"prompt": ["a", "b"]})
    loaded = mlflow.pyfunc.load_model("models:/mini@best")
    assert loaded.predict(prompts, params={"top_k": 3}) == ["a", "b"]
    assert Echo.settings == {**own, "top_k": 3}
    for asked, message in (
        ({"max_tokens": 51}, "max_tokens is 51: allowed is 1 to 50"),
        ({"temperature": float("nan")}, "temperature is nan: allowed"),
        ({"top_p": float("inf")}, "top_p is inf: allowed"),
        ({"seed": "seven"}, "seed"),
    ):
        with pytest.raises(MlflowException, match=message):
            loaded.predict(prompts, params=asked)
    loaded.predict(prompts, params={"top_q": 10**9})  # MLflow itself leaves it out, and warns
    assert Echo.settings == own

    local = Path(mlflow.artifacts.download_artifacts("models:/mini@best"))
    files = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    assert {"serving.py", "code/minigpt/serving.py", "artifacts/model/vocabulary.txt"} <= files
    pickled = (".pkl", ".pickle", ".joblib", ".pt", ".npy", ".pyc")
    assert not [name for name in files if Path(name).suffix in pickled]
    assert not [name for name in files if (local / name).read_bytes()[:1] == b"\x80"]
    requirements = (local / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in requirements} == set(registry.REQUIREMENTS)
    recorded = yaml.safe_load((local / "MLmodel").read_text())
    flavor = recorded["flavors"]["python_function"]
    assert flavor["model_code_path"].endswith("serving.py") and "python_model" not in flavor
    assert flavor["config"] == CONFIG["tracking"]["request"]
    parameters = {p["name"]: p["default"] for p in json.loads(recorded["signature"]["params"])}
    assert parameters == own


def test_other_limits_of_a_request_are_another_version(project: Path, model_dir: Path) -> None:
    wanted = {"name": "mini", "alias": "newest", "prompts": ["a"], "tags": {}}
    request = {**CONFIG["tracking"]["request"], "max_tokens": 60}
    versions = []
    for config in (CONFIG, {**CONFIG, "tracking": {"request": request}}, CONFIG):
        tracker = Tracker("t1", config, project, strict=True)
        versions.append(register(tracker, model_dir, **wanted)["version"])
    assert versions == ["1", "2", "1"]


@pytest.mark.parametrize(
    "path", ["artifacts/model", "../elsewhere", "/etc", None, 5, {"a": "b"}, "\0"]
)
def test_no_code_of_a_version_from_elsewhere_is_run(
    project: Path, tmp_path: Path, path: Any
) -> None:
    foreign = tmp_path / "foreign"
    (foreign / "artifacts/model").mkdir(parents=True)
    (foreign / "artifacts/model/vocabulary.txt").write_text("theirs")
    mark = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for file in ("serving.py", "code/minigpt/__init__.py", "code/mlflow.py"):
        (foreign / file).parent.mkdir(parents=True, exist_ok=True)
        (foreign / file).write_text(mark)
    flavor = {
        "loader_module": "serving",
        "model_code_path": "serving.py",
        "code": "code",
        "python_model": "python_model.pkl",
        "artifacts": {"model": {"path": path, "uri": "file:///etc"}},
    }
    (foreign / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": flavor}}))
    (foreign / "python_model.pkl").write_bytes(pickle.dumps(Opens(mark)))
    uri = f"sqlite:///{project}/mlflow.db"
    client = MlflowClient(uri)
    client.create_registered_model("mini")
    version = client.create_model_version("mini", foreign.as_uri()).version
    held = registry.fetch(uri, "mini", str(version), tmp_path / "fetched")
    if path == "artifacts/model":
        assert held and (held / "vocabulary.txt").read_text() == "theirs"
        assert held.is_relative_to(tmp_path / "fetched")
    else:
        assert held is None
    assert not (tmp_path / "ran").exists()


class Opens:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return exec, (self.code,)


def test_a_model_that_does_not_work_is_not_registered(
    project: Path, model_dir: Path, monkeypatch: Any
) -> None:
    def broken(path: Path) -> None:
        raise InputError("a weight is missing")

    monkeypatch.setattr(sys.modules["minigpt.model"], "load", broken)
    tracker = Tracker("t1", CONFIG, project, strict=True)
    with pytest.raises(InputError, match="a weight is missing"):
        register(tracker, model_dir, name="mini", alias="best", prompts=["a"], tags={})
    assert not MlflowClient(tracker.uri).search_registered_models()


def test_registering_needs_the_model_and_the_store(
    project: Path, model_dir: Path, monkeypatch: Any
) -> None:
    tracker = Tracker("t1", CONFIG, project, strict=True)
    with pytest.raises(InputError, match="is missing; run `dvc repro train`"):
        register(tracker, project / "nowhere", name="mini", alias="best", prompts=["a"], tags={})
    with pytest.raises(InputError, match="can't be used"):
        register(tracker, model_dir, name="a/b:c", alias="best", prompts=["a"], tags={})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    offline = Tracker("t1", CONFIG, project)
    with pytest.raises(InputError, match="is not registered"):
        register(offline, model_dir, name="mini", alias="best", prompts=["a"], tags={})


def test_a_version_is_tagged_with_where_it_came_from(project: Path, model_dir: Path) -> None:
    tracker = Tracker("t1", CONFIG, project, strict=True)
    client = MlflowClient(tracker.uri)
    client.set_tag(tracker.run_id, "mlflow.source.git.commit", "f" * 40)
    wanted = {"name": "mini", "alias": "newest", "prompts": ["a"]}
    register(tracker, model_dir, tags={"bits_per_byte": "1.5"}, **wanted)
    tags = client.get_model_version("mini", "1").tags
    assert tags.pop("minigpt.model_sha256")
    assert json.loads(tags.pop("minigpt.request")) == CONFIG["tracking"]["request"]
    assert tags == {
        "bits_per_byte": "1.5",
        "minigpt.run_id": tracker.run_id,
        "git.commit": "f" * 40,
        "dvc.lock:data/reviews.parquet": "a" * 32,
        "dvc.lock:data/sequences": "b" * 32,
    }
    register(tracker, model_dir, tags={"bits_per_byte": "1.4"}, **wanted)  # measured again since
    assert client.get_model_version("mini", "1").tags["bits_per_byte"] == "1.4"


# The challenge.


@pytest.fixture
def store(project: Path) -> str:
    uri = f"sqlite:///{project}/mlflow.db"
    MlflowClient(uri).create_registered_model("mini")
    return uri


def challenger(uri: str, bits_per_byte: float | None, **other: Any) -> dict[str, Any]:
    """A new version without a model; what it says of itself."""
    version = MlflowClient(uri).create_model_version("mini", "file:///nowhere")
    figures = {} if bits_per_byte is None else {"bits_per_byte": bits_per_byte}
    data = {"held_out": "reviews", "byte_unigram": "others", "vocabulary": "words", **other}
    return {"version": str(version.version), **data, **figures}


def never(directory: Path) -> dict[str, float]:
    raise AssertionError("nothing is to be measured")


def test_the_first_that_passes_then_only_a_better_one(store: str) -> None:
    verdicts = []
    for bits_per_byte in (1.5, 1.495, 1.6, 1.48):
        mine = challenger(store, bits_per_byte)
        outcome = challenge(store, "mini", mine, SETTINGS, never)
        verdicts.append((outcome["verdict"], (outcome["champion"] or {}).get("version")))
    assert verdicts == [("promoted", None), ("kept", "1"), ("kept", "1"), ("promoted", "1")]
    now, history = champion.state(store, "mini")
    assert now == "4"
    assert [(move["from"], move["version"], move["how"]) for move in history] == [
        (None, "1", "gate"),
        ("1", "4", "gate"),
    ]
    assert (
        history[1]["reason"]
        == outcome["reason"]
        == (
            "bits per byte 1.4800 against the champion's 1.5000 (version 1): better by 0.0200, "
            "needed 0.01"
        )
    )
    assert outcome["challenger"]["bits_per_byte"] == 1.48
    assert outcome["champion"]["bits_per_byte"] == 1.5
    assert outcome["champion"]["measured"] == "recorded"


def test_the_outcome_is_a_tag_of_the_version(store: str) -> None:
    outcome = challenge(store, "mini", challenger(store, 1.5), SETTINGS, never)
    tags = MlflowClient(store).get_model_version("mini", "1").tags
    assert tags["minigpt.gate"] == "promoted: bits per byte 1.5000; there was no champion"
    assert json.loads(tags["minigpt.outcome"]) == outcome


def test_what_was_decided_stays_decided(store: str) -> None:
    first, second = (challenger(store, bits_per_byte) for bits_per_byte in (1.5, 1.4))
    outcomes = [challenge(store, "mini", mine, SETTINGS, never) for mine in (first, second)]
    champion.rollback(store, "mini", reason="it swears")
    before = champion.state(store, "mini")
    again = [challenge(store, "mini", mine, SETTINGS, never) for mine in (first, second)]
    assert again == outcomes
    assert champion.state(store, "mini") == before
    assert before.version == "1"


def test_other_settings_are_another_decision(store: str) -> None:
    challenge(store, "mini", challenger(store, 1.5), SETTINGS, never)
    mine = challenger(store, 1.495)
    assert challenge(store, "mini", mine, SETTINGS, never)["verdict"] == "kept"
    loose = {**SETTINGS, "min_improvement": 0.0}
    assert challenge(store, "mini", mine, loose, never)["verdict"] == "promoted"
    looser = {**loose, "max_perplexity": 0.0}
    outcome = challenge(store, "mini", mine, looser, never)
    assert (outcome["verdict"], outcome["reason"]) == ("promoted", "it is the champion already")
    assert len(champion.state(store, "mini").history) == 2


def test_nothing_held_out_is_never_the_champion(store: str) -> None:
    for _ in range(2):  # without a champion and with one
        outcome = challenge(store, "mini", challenger(store, None, held_out=None), SETTINGS, never)
        assert outcome["verdict"] == "not compared"
        assert "nothing is held out" in outcome["reason"]
        challenge(store, "mini", challenger(store, 1.5), SETTINGS, never)
    assert outcome["champion"] == {"version": "2"}


@pytest.mark.parametrize(
    ("changed", "theirs", "verdict"),
    [("held_out", 1.3, "promoted"), ("byte_unigram", 1.3, "promoted"), ("vocabulary", 1.1, "kept")],
)
def test_a_champion_measured_elsewhere_is_measured_again(
    project: Path, model_dir: Path, changed: str, theirs: float, verdict: str
) -> None:
    tracker = Tracker("t1", CONFIG, project, strict=True)
    register(tracker, model_dir, name="mini", alias="newest", prompts=["a"], tags={})
    data = {"held_out": "reviews", "byte_unigram": "others", "vocabulary": "words"}
    old = {"version": "1", **data, "bits_per_byte": 0.5}
    assert challenge(tracker.uri, "mini", old, SETTINGS, never)["verdict"] == "promoted"
    words = (model_dir / "vocabulary.txt").read_text()

    def measure(directory: Path) -> dict[str, float]:
        assert directory != model_dir
        assert (directory / "vocabulary.txt").read_text() == words
        return {"bits_per_byte": theirs, "perplexity": 90.0}

    mine = challenger(tracker.uri, 1.2, **{changed: "other"})
    outcome = challenge(tracker.uri, "mini", mine, SETTINGS, measure)
    assert outcome["verdict"] == verdict
    assert outcome["champion"] == {
        "version": "1",
        "bits_per_byte": theirs,
        "perplexity": 90.0,
        "held_out": mine["held_out"],
        "byte_unigram": mine["byte_unigram"],
        "measured": "again",
    }


def test_a_champion_that_can_not_be_measured(project: Path, model_dir: Path) -> None:
    tracker = Tracker("t1", CONFIG, project, strict=True)
    register(tracker, model_dir, name="mini", alias="newest", prompts=["a"], tags={})
    champion.promote(tracker.uri, "mini", "1", reason="from before the gate")

    def measure(directory: Path) -> dict[str, float]:
        raise InputError("a weight is missing")

    outcome = challenge(tracker.uri, "mini", challenger(tracker.uri, 1.2), SETTINGS, measure)
    assert outcome["verdict"] == "not compared"
    assert outcome["reason"] == (
        "the champion (version 1) could not be measured: a weight is missing"
    )
    assert champion.state(tracker.uri, "mini").version == "1"


def test_a_champion_of_the_last_moment_counts(store: str, monkeypatch: Any) -> None:
    """Another run's model becomes the champion between the decision and the move."""
    challenge(store, "mini", challenger(store, 1.5), SETTINGS, never)
    mine, other = challenger(store, 1.4), challenger(store, 1.3)
    move: Callable[..., bool] = champion.move

    def overtaken(*args: Any, **kwargs: Any) -> bool:
        monkeypatch.setattr(champion, "move", move)
        assert challenge(store, "mini", other, SETTINGS, never)["verdict"] == "promoted"
        return move(*args, **kwargs)

    monkeypatch.setattr(champion, "move", overtaken)
    outcome = challenge(store, "mini", mine, SETTINGS, never)
    assert (outcome["verdict"], outcome["champion"]["version"]) == ("kept", "3")
    assert champion.state(store, "mini").version == "3"


def test_an_interrupted_challenge_is_finished_by_the_next(store: str, monkeypatch: Any) -> None:
    challenge(store, "mini", challenger(store, 1.5), SETTINGS, never)
    mine = challenger(store, 1.4)
    for method in ("set_registered_model_tag", "set_model_version_tag"):
        with monkeypatch.context() as patch, pytest.raises(InputError, match="disk is full"):
            patch.setattr(MlflowClient, method, full)
            challenge(store, "mini", mine, SETTINGS, never)
    outcome = challenge(store, "mini", mine, SETTINGS, never)
    now, history = champion.state(store, "mini")
    assert (now, [(move["from"], move["version"]) for move in history]) == (
        "2",
        [(None, "1"), ("1", "2")],
    )
    # What an undisturbed one says.
    assert outcome["verdict"] == "promoted"
    assert outcome["champion"]["bits_per_byte"] == 1.5
    assert history[-1]["reason"] == outcome["reason"]
    assert outcome["reason"].startswith("bits per byte 1.4000 against the champion's 1.5000")


def test_a_version_promoted_by_hand_before_its_challenge_stays(store: str) -> None:
    challenge(store, "mini", challenger(store, 1.5), SETTINGS, never)
    mine = challenger(store, 1.6)
    champion.promote(store, "mini", "2", reason="it reads better")
    outcome = challenge(store, "mini", mine, SETTINGS, never)
    assert (outcome["verdict"], outcome["reason"]) == ("promoted", "it is the champion already")
    assert len(champion.state(store, "mini").history) == 2


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError("the disk is full")

"""The stage `register`, with a stand-in for the model and a real sqlite store."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tracked import CONFIG, MODEL, changed, fake_model, runs, write_model, write_run

from minigpt import config
from minigpt.common import files, paths
from minigpt.common.errors import InputError
from minigpt.data import corpus
from minigpt.data.tokenizer import WordTokenizer
from minigpt.evaluation import held_out
from minigpt.stages import register
from minigpt.tracking import champion, gate, store

pytestmark = pytest.mark.usefixtures("clean_environment")

MEASURED = {"reviews": 1, "all_reviews": 1, "targets": 9, "digest": "d", "learned": "e"}
EVALUATION: dict[str, Any] = {
    "measure": held_out.MEASURE,
    "loss": 4.5,
    "bits_per_byte": 1.7,
    "perplexity": 90.0,
    "training": {"reviews": 9, "all_reviews": 9},
    "held_out": MEASURED,
    "samples": {"reviews": 8, "copied_run_p95": 3.0},
}


@pytest.fixture
def stage(project: Path, monkeypatch: Any) -> Path:
    """A project in which everything but the registration is done."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri(project))
    fill(project, monkeypatch)
    return project


def fill(project: Path, monkeypatch: Any) -> None:
    model = write_model(project)
    config.save(CONFIG, project / paths.RESOLVED)
    write_run(project, model=model)
    files.write_json(project / paths.EVALUATION, {**EVALUATION, "model": model})
    files.write_json_lines(
        project / paths.SAMPLES, [{"prompt": "this", "text": "a", "model": model}]
    )
    trained = SimpleNamespace(
        sha256=model,
        tokenizer=WordTokenizer(("", "[UNK]", "film"), "spaced"),
        config=CONFIG.model_dump(),
    )
    monkeypatch.setattr(register.directory, "load", lambda path: trained)


def verdict() -> dict[str, Any]:
    return dict(json.loads(paths.GATE.read_text(encoding="utf-8")))


@pytest.fixture
def loads(monkeypatch: Any, tmp_path: Path) -> None:
    """Lets the registered version load, whose model directory has no weights."""
    (tmp_path / "unused").mkdir()
    fake_model(tmp_path / "unused", monkeypatch)


@pytest.mark.usefixtures("loads")
def test_a_model_is_registered_with_what_it_was_made_with(stage: Path, monkeypatch: Any) -> None:
    register.run()
    assert verdict()["verdict"] == "promoted"
    later = changed(train={"seed": 8}, model={"dropout": 0.5})
    config.save(later)
    register.run()
    page = paths.MODEL_CARD.read_text(encoding="utf-8")
    assert "seed 1," in page and "dropout 0," in page
    (run,) = runs(stage)
    assert run.data.params["train.seed"] == "1"


def test_a_refusal_is_not_to_be_overlooked(stage: Path, caplog: Any) -> None:
    evaluation = files.read_json(paths.EVALUATION)
    files.write_json(paths.EVALUATION, {**evaluation, "unk_share": 0.5})
    config.save(changed(gate={"max_unk_share": 0.2}))
    with caplog.at_level("INFO"):
        register.run()
    last = caplog.messages[-1]
    assert "NOT REGISTERED" in last and "unk_share is 0.5, above 0.2" in last
    assert "add more texts" in last and "raise gate.max_unk_share" in last
    assert gate.notice(verdict()) == last
    assert "mini, not registered" in paths.MODEL_CARD.read_text(encoding="utf-8")


def test_reports_of_another_model_are_refused(stage: Path) -> None:
    for path, name in ((paths.EVALUATION, "evaluate"), (paths.RUN, "train")):
        content = path.read_text(encoding="utf-8")
        files.write_json(path, {**json.loads(content), "model": MODEL})
        refused = f"{path} describes another model than model: run `dvc repro {name}`"
        with pytest.raises(InputError, match=refused):
            register.run()
        path.unlink()
        if path == paths.RUN:
            with pytest.raises(InputError, match=refused):
                register.run()
        files.write_text(path, content)
    assert runs(stage) == []


def test_figures_under_an_older_measure_are_refused(stage: Path) -> None:
    content = files.read_json(paths.EVALUATION)
    for number in (1, None):
        files.write_json(paths.EVALUATION, {**content, "measure": number})
        with pytest.raises(InputError, match=r"another measure than .*: run `dvc repro evaluate`"):
            register.run()
    assert runs(stage) == []


@pytest.mark.usefixtures("loads")
def test_an_experiment_in_a_copy_registers_and_does_not_promote(
    stage: Path, monkeypatch: Any
) -> None:
    copy = stage / ".dvc/tmp/exps/tmp1"
    copy.mkdir(parents=True)
    fill(copy, monkeypatch)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_EXP_NAME", "puffy-dawn")
    register.run()
    assert verdict()["verdict"] == "not promoted"
    assert verdict()["reason"].endswith("by hand: `minigpt promote 1 --reason ...`")
    assert champion.state(store.tracking_uri(stage), "mini") == (None, [])
    monkeypatch.chdir(stage)  # dvc exp run in the project itself, and dvc repro
    register.run()
    assert verdict()["verdict"] == "promoted"


def test_a_champion_is_measured_on_the_reviews_of_the_evaluation(
    stage: Path, monkeypatch: Any
) -> None:
    reviews = pa.table({"id": [str(i) for i in range(40)], "text": ["a film"] * 40})
    paths.REVIEWS.parent.mkdir()
    pq.write_table(reviews, paths.REVIEWS)
    mask = corpus.is_validation(reviews["id"].combine_chunks(), 0.25)
    digest = held_out.digest(reviews.filter(pa.array(mask)))
    monkeypatch.setattr(held_out, "measure", lambda *args, **kwargs: {"bits_per_byte": 2.0})
    monkeypatch.setattr(register.charges, "learn", lambda *args: None)
    model = SimpleNamespace(network=None, tokenizer=None)
    assert register._measure(model, 0.25, 10**6, digest) == {"bits_per_byte": 2.0}  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"other reviews than .*: run `dvc repro evaluate`"):
        register._measure(model, 0.5, 10**6, digest)  # type: ignore[arg-type]

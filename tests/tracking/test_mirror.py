"""The files of a run and what MLflow holds of it, in real sqlite stores."""

import json
import math
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import mlflow
import mlflow.cli
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Run
from tracked import (
    CONFIG,
    MD5,
    MODEL,
    changed,
    client,
    held,
    points,
    runs,
    write_evaluation,
    write_run,
)

from minigpt.common import files, paths
from minigpt.common.errors import InputError
from minigpt.tracking.mirror import Mirror

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_a_run_is_complete_and_sending_again_adds_nothing(project: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "puffy-dawn")
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(project), *identity, *command], check=True)
    write_run(project)
    write_evaluation(project)
    Mirror(project, CONFIG).send()
    sent = held(project)

    by_epoch = {1: 5.6667, 2: 5.3333, 3: 5.0}
    time = {epoch: 1700000000000 + epoch * 1000 for epoch in by_epoch}
    assert sent["points"]["loss"] == [(e, time[e], loss) for e, loss in by_epoch.items()]
    assert [step for step, _, _ in sent["points"]["tokens_per_s"]] == [1, 2, 3]
    assert "val_loss" not in sent["points"]  # nothing was held out: its cells are empty
    steps = [(4 * (e - 1) + s, time[e], pytest.approx(7 - e / 3)) for e in by_epoch for s in (2, 4)]
    assert sent["points"]["train_loss"] == steps
    assert [step for step, _, _ in sent["points"]["train_learning_rate"]] == [2, 4, 6, 8, 10, 12]
    # Digests, texts and truth values are no metrics.
    assert {key: at for key, at in sent["points"].items() if "/" in key} == {
        "vocabulary/tokens": [(0, time[3], 1000)],
        "vocabulary/unknown_share": [(0, time[3], 0.01)],
        "train/loss": [(0, time[3], 5.0)],
        "train/epochs": [(0, time[3], 3)],
        "evaluate/loss": [(0, time[3], 4.5)],
        "evaluate/unigram/loss": [(0, time[3], 6.4)],
        "evaluate/held_out/targets": [(0, time[3], 9)],
    }
    parameters = {
        "train.epochs": "3",
        "train.learning_rate": "1e-05",
        "checkpointing.resume": "true",
        "preview.prompts": '["ä"]',
        "corpus.folders": '["pos", "neg"]',
        "tracking.model_name": "mini",
        "run.backend": "tensorflow",
        "run.cpus": "2",
    }
    assert parameters.items() <= sent["params"].items()
    assert sent["artifacts"] == {
        "samples/samples.jsonl": (project / paths.SAMPLES).read_text(),
        "samples/samples.txt": "a film\n",
        "evaluation/evaluation.txt": "model 4.5\n",
        "figures/loss_by_epoch.png": "a picture",
        **{f"texts/epoch_00{e}.txt": f"> the\nthe ä\x85{e}\n" for e in by_epoch},
    }
    assert sent["datasets"] == [("reviews", MD5["reviews"]), ("sequences", MD5["sequences"])]
    tags = sent["tags"]
    assert tags["dvc.lock:model"] == MD5["model"]
    assert tags["dvc.exp"] == tags["mlflow.runName"] == "puffy-dawn"
    head = subprocess.check_output(["git", "-C", str(project), "rev-parse", "HEAD"], text=True)
    assert tags["mlflow.source.git.commit"] == head.strip()
    assert tags["minigpt.gate"] == "kept: no better"
    assert sent["status"] == "FINISHED"
    assert (project / "mlartifacts").is_dir()

    again = Mirror(project, CONFIG)
    again.send()
    assert held(project) == sent
    assert again.provenance() == {
        "commit": head.strip(),
        "data/reviews.parquet": MD5["reviews"],
        "data/sequences": MD5["sequences"],
    }


def test_a_training_is_sent_as_it_goes_and_resumed_in_its_run(project: Path) -> None:
    write_run(project, epochs=0, model=None)
    live = Mirror(project, CONFIG)
    live.send()
    write_run(project, epochs=2, model=None)
    live.send()
    live.finish("KILLED")
    sent = held(project)
    assert [step for step, _, _ in sent["points"]["loss"]] == [1, 2]
    assert sent["status"] == "KILLED"
    assert not [key for key in sent["points"] if "/" in key]  # the stage has not ended
    # It is resumed on another machine, whose files have their own digits and number of cores.
    write_run(project)
    for path, old, new in ((paths.LOSSES, "5.6667", "5.66667"), (paths.RUN, "2,", "64,")):
        text = (project / path).read_text().replace(old, new)
        (project / path).write_text(text)
    Mirror(project, CONFIG).send()
    sent = held(project)
    assert [point[::2] for point in sent["points"]["loss"]] == [(1, 5.6667), (2, 5.3333), (3, 5.0)]
    assert (sent["params"]["run.cpus"], sent["status"]) == ("2", "FINISHED")


def test_only_reports_of_this_training_and_this_model_are_sent(project: Path) -> None:
    write_run(project)
    write_evaluation(project, model="e" * 64)
    trained = {"loss": 9.0, "training": "another"}
    files.write_json(project / paths.TRAIN_METRICS, trained)
    Mirror(project, CONFIG).send()
    sent = held(project)
    assert {key for key in sent["points"] if "/" in key} == {
        "vocabulary/tokens",
        "vocabulary/unknown_share",
    }
    assert set(sent["artifacts"]) == {f"texts/epoch_00{epoch}.txt" for epoch in (1, 2, 3)}
    assert "minigpt.gate" not in sent["tags"]


def test_a_retraining_to_an_equal_model_shows_its_evaluation(project: Path) -> None:
    write_run(project)
    write_evaluation(project)
    first = Mirror(project, CONFIG)
    first.send()
    write_run(project, train_id="t2")  # evaluate, sample and register don't run again
    second = Mirror(project, CONFIG)
    second.send()
    assert second.run_id != first.run_id
    sent = held(project)
    assert sent["points"]["evaluate/loss"][0][2] == 4.5
    assert {"evaluation/evaluation.txt", "samples/samples.txt"} <= set(sent["artifacts"])
    assert sent["tags"]["minigpt.gate"] == "kept: no better"


def test_a_summary_is_sent_again_if_it_has_changed(project: Path) -> None:
    write_run(project)
    write_evaluation(project, nan=math.nan, inf=math.inf)
    for _ in range(2):
        Mirror(project, CONFIG).send()
    write_evaluation(project, loss=4.25)
    Mirror(project, CONFIG).send()
    assert runs(project)[0].data.metrics["evaluate/loss"] == 4.25
    assert [value for _, _, value in points(project, "evaluate/loss")] == [4.5, 4.25]
    assert len(points(project, "evaluate/nan")) == len(points(project, "evaluate/inf")) == 1


def test_a_long_text_can_be_read_in_the_ui(project: Path) -> None:
    text = "a word and another " * 30
    write_run(project, epochs=1)
    files.write_json_lines(project / paths.EPOCH_TEXTS, [{"epoch": 1, "prompt": "a", "text": text}])
    Mirror(project, CONFIG).send()
    page = held(project)["artifacts"]["texts/epoch_001.txt"]
    assert max(map(len, page.splitlines())) <= 100
    assert page.split() == [">", "a", *text.split()]


def test_a_new_experiment_has_a_view_with_losses_and_links_to_it(project: Path) -> None:
    write_run(project, epochs=0, model=None)
    Mirror(project, CONFIG).send()
    experiment = client(project).get_experiment_by_name("minigpt")
    assert experiment
    key = "mlflow.sharedViewState.losses"
    view = json.loads(experiment.tags[key])
    assert (view["name"], view["createdAt"]) == ("Losses", 0)  # without them the UI reads no view
    shown = json.loads(view["state"])
    assert {"metrics.`loss`", "metrics.`val_loss`"} <= set(shown["selectedColumns"])
    charts = [chart.get("metricKey") for chart in shown["compareRunCharts"]]
    assert charts[:4] == ["loss", "val_loss", "val_bits_per_byte", "train_loss"]
    page = f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    note = experiment.tags["mlflow.note.content"]
    assert f"]({page}&viewStateShareKey=losses&compareRunsMode=TABLE)" in note
    # No documentation says that views are tags: the UI itself has to.
    scripts = Path(mlflow.__file__).parent.glob("server/js/build/static/js/main.*.js")
    assert any("mlflow.sharedViewState." in script.read_text() for script in scripts)

    # One of an older version gets the view of this one, and keeps what a person wrote.
    for tag, value in ((key, "{}"), ("mlflow.note.content", "our own")):
        client(project).set_experiment_tag(experiment.experiment_id, tag, value)
    Mirror(project, CONFIG).send()
    found = client(project).get_experiment_by_name("minigpt")
    assert found and found.tags["mlflow.note.content"] == "our own"
    assert json.loads(found.tags[key]) == view


def test_another_configuration_or_training_is_another_run(project: Path) -> None:
    def run_id(train_id: str = "t1", **sections: dict[str, Any]) -> str:
        write_run(project, epochs=0, train_id=train_id, model=None)
        mirror = Mirror(project, changed(**sections))
        return str(mirror.attempt(lambda client: mirror.run_id))

    first = run_id()
    assert run_id(sample={"seed": 8}) != first
    assert run_id("t2") != first
    neutral = {"preview": {"seed": 9}, "checkpointing": {"steps": 9}, "logging": {"steps": 9}}
    neutral["serving"] = {"slots": 9}
    assert run_id(tracking={"model_name": "other"}, **neutral) == first
    jax = {"backend": "jax"}
    assert run_id(train=jax, engine={"workers": 9}) == run_id(train=jax)
    assert len(runs(project)) == 4


def test_two_that_make_the_run_at_once_on_a_server_take_the_same(
    project: Path, monkeypatch: Any
) -> None:
    """A server has no lock: another process makes the run between our search and our own."""
    write_run(project, epochs=0, model=None)
    real, made = MlflowClient.create_run, []

    def crossed(self: MlflowClient, *args: Any, **settings: Any) -> Run:
        early = {**settings, "start_time": 1}
        made.extend([real(self, *args, **early), real(self, *args, **settings)])
        return made[1]

    monkeypatch.setattr(MlflowClient, "create_run", crossed)
    mirror = Mirror(project, CONFIG)
    mirror.send()
    assert mirror.run_id == made[0].info.run_id
    assert [run.info.run_id for run in runs(project)] == [mirror.run_id]


def test_an_experiment_that_another_has_just_made_is_taken(project: Path, monkeypatch: Any) -> None:
    real = MlflowClient.create_experiment

    def crossed(self: MlflowClient, *args: Any, **settings: Any) -> str:
        real(self, *args, **settings)
        return real(self, *args, **settings)

    monkeypatch.setattr(MlflowClient, "create_experiment", crossed)
    write_run(project, epochs=0, model=None)
    Mirror(project, CONFIG, strict=True).send()
    assert len(runs(project)) == 1


def test_a_deleted_experiment_names_the_ways_on(
    project: Path, monkeypatch: Any, caplog: Any
) -> None:
    write_run(project)
    Mirror(project, CONFIG).send()
    (run,) = runs(project)
    client(project).delete_experiment(run.info.experiment_id)
    restore = rf"`(.* mlflow experiments restore -x {run.info.experiment_id})`"
    with pytest.raises(
        InputError, match=rf"'minigpt' was deleted: restore it \({restore}\)"
    ) as told:
        Mirror(project, CONFIG, strict=True).send()
    assert "MLFLOW_EXPERIMENT_NAME" in str(told.value)
    assert "\n" not in str(told.value)
    Mirror(project, CONFIG).send()
    (warning,) = caplog.messages
    assert str(told.value) in warning

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    Mirror(project, CONFIG, strict=True).send()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    found = re.search(restore, str(told.value))
    assert found
    assignment, command, *arguments = shlex.split(found[1])
    environment = dict([assignment.split("=", 1)])
    assert command == "mlflow"
    assert CliRunner().invoke(mlflow.cli.cli, arguments, env=environment).exit_code == 0
    Mirror(project, CONFIG, strict=True).send()
    assert [found.info.run_id for found in runs(project)] == [run.info.run_id]


def test_a_run_that_was_deleted_meanwhile(project: Path, caplog: Any) -> None:
    write_run(project, epochs=1, model=None)
    live = Mirror(project, CONFIG)
    live.send()
    first = live.run_id
    client(project).delete_run(first)
    strict = Mirror(project, CONFIG, strict=True)
    write_run(project)
    live.send()
    (warning,) = caplog.messages
    assert f"the run {first} was deleted: restore it (`MLFLOW_TRACKING_URI=" in warning
    assert f"mlflow runs restore --run-id {first}`)" in warning
    live.send()  # as the next epoch does
    assert live.run_id != first
    assert len(points(project, "loss")) == 3
    strict.send()
    assert strict.run_id == live.run_id


def test_a_mirror_follows_the_training_that_run_json_names(project: Path) -> None:
    write_run(project)
    mirror = Mirror(project, CONFIG)
    mirror.send()
    first = mirror.run_id
    write_run(project, epochs=1, train_id="t2", model=None)
    mirror.send()
    assert mirror.run_id != first
    assert [step for step, _, _ in points(project, "loss")] == [1]


def test_stages_that_dvc_has_yet_to_finish_have_no_digest(project: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("DVC_STAGE", "train")  # its entry and that of sample are of an earlier run
    write_run(project, epochs=0, model=None)
    Mirror(project, CONFIG).send()
    locked = {key for key in runs(project)[0].data.tags if key.startswith("dvc.lock")}
    assert locked == {"dvc.lock:data/reviews.parquet", "dvc.lock:data/sequences"}


def test_a_copy_of_the_project_logs_to_the_project(project: Path, monkeypatch: Any) -> None:
    copy = project / ".dvc/tmp/exps/1"
    write_run(copy)
    write_evaluation(copy)
    monkeypatch.setenv("DVC_ROOT", str(project))
    Mirror(copy, CONFIG).send()
    assert "samples/samples.txt" in held(project)["artifacts"]
    assert {path.name for path in copy.iterdir()} == {"reports"}


def test_without_run_json_there_is_nothing_to_send(project: Path) -> None:
    mirror = Mirror(project, CONFIG)
    mirror.send()
    mirror.finish()
    assert mirror.attempt(MlflowClient.search_experiments) is None
    assert runs(project) == []
    with pytest.raises(InputError, match=r"reports/run.json is missing; run `dvc repro train`"):
        Mirror(project, CONFIG, strict=True).send()


def test_no_secret_and_no_overlong_value_is_logged(project: Path) -> None:
    write_run(project)
    write_evaluation(project)
    files.write_json(
        project / paths.GATE,
        {"verdict": "kept", "reason": "http://me:hunter2@host is away", "model": MODEL},
    )
    run = json.loads((project / paths.RUN).read_text())
    run["settings"] = {f"k{i}": i for i in range(150)} | {"a": "x" * 9000, "b": "x" * 8000}
    run["settings"]["where"] = "https://me:hunter2@example.org/reviews.tar.gz"
    files.write_json(project / paths.RUN, run)
    Mirror(project, CONFIG, strict=True).send()
    params = held(project)["params"]
    assert params["run.where"] == "https://example.org/reviews.tar.gz"
    assert len(params["run.a"]) <= 6000 and params["run.a"] != params["run.b"]
    assert len(params) > 150
    assert b"hunter2" not in (project / "mlflow.db").read_bytes()

"""A configuration, the files of a run, a model's stand-in, and what MLflow holds of a run."""

import hashlib
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from minigpt.common import files, paths
from minigpt.common.errors import InputError
from minigpt.config import Config
from minigpt.tracking import store

MODEL = "d" * 64
MD5 = {"reviews": "a" * 32, "sequences": "b" * 32 + ".dir", "model": "c" * 32 + ".dir"}
REQUEST = {
    "max_prompts": 2,
    "max_prompt_bytes": 100,
    "max_tokens": 50,
    "max_total_tokens": 100,
}
SAMPLING = {"max_tokens": 40, "temperature": 0.9, "top_p": 0.9, "seed": 7}
PLAIN: dict[str, Any] = {
    "corpus": {"format": "files", "url": "reviews.jsonl", "folders": ["pos", "neg"]},
    "vocabulary": {"style": "spaced", "max_tokens": 1000},
    "sequences": {"policy": "windows", "length": 16, "validation_fraction": 0.05},
    "model": {
        "context_length": 16,
        "embed_dim": 16,
        "num_blocks": 1,
        "num_heads": 2,
        "key_dim": 8,
        "feed_forward_dim": 16,
    },
    "train": {"epochs": 3, "batch_size": 32, "learning_rate": 1e-5},
    "preview": {"max_tokens": 8, "prompts": ["ä"]},
    "evaluate": {"max_tokens": 8, "prompts": ["a"], "reviews": 8, "ngram_order": 3},
    "sample": {**SAMPLING, "prompts": ["this movie"]},
    "tracking": {"model_name": "mini", "alias": "newest", "request": REQUEST},
}
CONFIG = Config.model_validate(PLAIN)


def changed(**sections: dict[str, Any]) -> Config:
    """The configuration with other values in some sections."""
    merged = {name: {**PLAIN.get(name, {}), **values} for name, values in sections.items()}
    return Config.model_validate({**PLAIN, **merged})


def write_run(root: Path, epochs: int = 3, train_id: str = "t1", model: str | None = MODEL) -> None:
    """Writes what the train stage writes, after some epochs or at the end."""
    numbers = range(1, epochs + 1)
    losses = [
        {"epoch": e, "loss": f"{6 - e / 3:.4f}", "learning_rate": "1e-05", "val_loss": ""}
        for e in numbers
    ]
    files.write_csv(root / paths.LOSSES, ["epoch", "loss", "learning_rate", "val_loss"], losses)
    steps = [
        {"epoch": e, "step": 4 * (e - 1) + s, "loss": 7 - e / 3, "learning_rate": 1e-5}
        for e in numbers
        for s in (2, 4)
    ]
    files.write_csv(root / paths.STEPS, ["epoch", "step", "loss", "learning_rate"], steps)
    texts = [{"epoch": e, "prompt": "the", "text": f"the ä\x85{e}"} for e in numbers]
    files.write_json_lines(root / paths.EPOCH_TEXTS, texts)
    files.write_json(root / paths.VOCABULARY_METRICS, {"tokens": 1000, "unknown_share": 0.01})
    if model:
        trained = {"loss": 5.0, "epochs": 3, "stopped": False, "training": "identity"}
        files.write_json(root / paths.TRAIN_METRICS, trained)
    timings = [
        {"epoch": e, "finished_ms": 1700000000000 + e * 1000, "seconds": 1.5, "tokens_per_s": 99.0}
        for e in numbers
    ]
    settings = {"backend": "tensorflow", "keras": "3.15.1", "cpus": 2, "parameters": 1234}
    settings["dtype_policy"] = "float32"
    run = {"train_id": train_id, "training": "identity", "model": model, "settings": settings}
    files.write_json(root / paths.RUN, {**run, "epochs": timings})


def write_model(root: Path, config: Config = CONFIG) -> str:
    """Writes what tells with what a model was made, and returns the model's digest."""
    plain = config.model_dump(mode="json")
    sections = {name: plain[name] for name in ("vocabulary", "sequences", "model", "train")}
    sections["model"] |= {"vocabulary_size": 1000, "dtype_policy": "float32"}
    files.write_json(root / paths.MODEL / "config.json", {"format": 2, "config": sections})
    return files.sha256(root / paths.MODEL / "config.json")


def write_evaluation(root: Path, model: str = MODEL, **other: float) -> None:
    """Writes what the stages after train write of a model."""
    numbers = {"loss": 4.5, "unigram": {"loss": 6.4}, "held_out": {"targets": 9, "digest": "ab"}}
    files.write_json(root / paths.EVALUATION, {**numbers, **other, "model": model})
    files.write_text(root / paths.EVALUATION_TEXT, "model 4.5\n")
    files.write_text(root / paths.FIGURES / "loss_by_epoch.png", "a picture")
    files.write_json_lines(root / paths.SAMPLES, [{"text": "a film", "model": model}])
    files.write_text(root / paths.SAMPLES_TEXT, "a film\n")
    gate = {"verdict": "kept", "reason": "no better", "model": model}
    files.write_json(root / paths.GATE, gate)


def write_lock(root: Path) -> None:
    """Writes a dvc.lock of the stages up to sample."""

    def stage(deps: dict[str, str], outs: dict[str, str]) -> dict[str, Any]:
        parts = {"deps": deps, "outs": outs}
        return {
            part: [{"path": path, "md5": md5} for path, md5 in entries.items()]
            for part, entries in parts.items()
        }

    reviews = {"data/reviews.parquet": MD5["reviews"]}
    sequences, model = {"data/sequences": MD5["sequences"]}, {"model": MD5["model"]}
    stages = {
        "download": stage({}, reviews),
        "sequences": stage(reviews, sequences),
        "train": stage(sequences, model),
        "sample": stage(model, {"reports/samples.txt": "e" * 32}),
    }
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def client(root: Path) -> MlflowClient:
    return MlflowClient(store.sqlite_uri(root.resolve() / "mlflow.db"))


def runs(root: Path) -> list[Run]:
    """The runs of the project, the newest first."""
    experiment = client(root).get_experiment_by_name("minigpt")
    return list(client(root).search_runs([experiment.experiment_id])) if experiment else []


def points(root: Path, key: str) -> list[tuple[int, int, float]]:
    """Step, time and value of each point that the newest run has of a metric."""
    history = client(root).get_metric_history(runs(root)[0].info.run_id, key)
    return sorted((point.step, point.timestamp, point.value) for point in history)


def held(root: Path) -> dict[str, Any]:
    """Everything that MLflow holds of the newest run."""
    run, mlflow_client = runs(root)[0], client(root)
    inputs = run.inputs.dataset_inputs if run.inputs else []
    uri = mlflow_client.tracking_uri
    folder = Path(mlflow.artifacts.download_artifacts(run.info.artifact_uri, tracking_uri=uri))
    return {
        "points": {key: points(root, key) for key in run.data.metrics},
        "params": run.data.params,
        "tags": run.data.tags,
        "datasets": sorted((d.dataset.name, d.dataset.digest) for d in inputs),
        "artifacts": {
            file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8")
            for file in folder.rglob("*")
            if file.is_file()
        },
        "status": run.info.status,
    }


class OlderFormat(InputError):  # noqa: N818 - as in minigpt.model.directory
    pass


class Echo:
    """A generator that returns the prompts, and keeps the settings that it was called with."""

    sampling: Any

    def __init__(self, network: Any, tokenizer: Any) -> None: ...

    def __call__(self, prompts: list[str], sampling: Any) -> list[str]:
        type(self).sampling = sampling
        return prompts


def fake_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a directory that stands for a model's, with modules that don't load Keras."""

    def load(path: Path) -> SimpleNamespace:
        if not (path / "config.json").exists():
            raise InputError("config.json is missing")
        return SimpleNamespace(network=None, tokenizer=None, path=path)

    def digest(path: Path) -> str:
        return hashlib.sha256((path / "config.json").read_bytes()).hexdigest()

    fakes = {
        "model.directory": SimpleNamespace(load=load, digest=digest, OlderFormat=OlderFormat),
        "generation.decoding": SimpleNamespace(Generator=Echo),
    }
    for name, fake in fakes.items():
        package, _, module = f"minigpt.{name}".rpartition(".")
        monkeypatch.setitem(sys.modules, f"minigpt.{name}", fake)
        monkeypatch.setattr(importlib.import_module(package), module, fake, raising=False)
    (folder / "model").mkdir()
    write_fake(folder / "model", "a model")
    return folder / "model"


def write_fake(model: Path, text: str) -> str:
    """Writes the only file of such a directory, and returns the directory's digest."""
    (model / "config.json").write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()

"""What is recorded of a training: the digest that identifies it, its facts and its reports."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras

from minigpt.common import backend, files, paths
from minigpt.config import TrainConfig
from minigpt.data import sequences
from minigpt.model.network import MiniGPT
from minigpt.training.checkpoints import Checkpoints, best_epoch
from minigpt.training.parallel import World


def identity(
    network: MiniGPT, config: TrainConfig, manifest: dict[str, Any], code: Iterable[Path]
) -> str:
    """Returns a digest of all that decides the weights, in hexadecimal.

    Args:
        network: The network.
        config: The section `train`.
        manifest: What `sequences.verify` returns.
        code: The modules that decide them, and folders of such modules.
    """
    modules = {file for path in code for file in (path.rglob("*.py") if path.is_dir() else [path])}
    parts = {
        "model": network.config.model_dump(mode="json"),
        "train": config.model_dump(mode="json"),
        "sequences": sequences.without_addresses(manifest),
        "versions": _versions(),
        "code": {module.as_posix(): files.sha256(module) for module in modules},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def facts(network: MiniGPT, world: World) -> dict[str, Any]:
    """Returns what this machine and its libraries add to the configuration."""
    return {
        "backend": keras.backend.backend(),
        **_versions(),
        "onednn": os.environ.get(backend.ONEDNN, "as TensorFlow chooses"),
        "cpus": backend.processors(),
        "processes": world.processes,
        "devices": world.devices,
        "dtype_policy": network.config.dtype_policy,
        "parameters": network.count_params(),
    }


def _versions() -> dict[str, str]:
    name = keras.backend.backend()
    return {"keras": keras.__version__, name: importlib.metadata.version(name)}


def write(checkpoints: Checkpoints, run: dict[str, Any], steps: int) -> None:
    """Writes losses.csv, epoch_texts.jsonl, steps.csv and run.json, of the epochs so far.

    Args:
        checkpoints: Those of the training.
        run: What run.json holds besides the epochs' times.
        steps: Steps of each epoch.
    """
    done = checkpoints.epochs
    if done:
        files.write_csv(paths.LOSSES, list(done[0].row), (epoch.row for epoch in done))
        files.write_json_lines(paths.EPOCH_TEXTS, (text for epoch in done for text in epoch.texts))
        rows = [
            {
                "epoch": row.epoch,
                "step": (row.epoch - 1) * steps + row.step,
                "loss": f"{row.loss:.6g}",
                "learning_rate": f"{row.learning_rate:.6g}",
            }
            for row in checkpoints.logged
            if row.epoch <= len(done)
        ]
        files.write_csv(paths.STEPS, ["epoch", "step", "loss", "learning_rate"], rows)
    timings = [epoch.timing for epoch in done]  # last: they say which epochs the others hold
    files.write_json(paths.RUN, {"model": None, **run, "epochs": timings})


def write_metrics(checkpoints: Checkpoints, training: str, keep: str) -> None:
    """Writes train.json, the metrics of the epoch whose weights the model has.

    Args:
        checkpoints: Those of the training, with an epoch at least.
        training: What `identity` returned.
        keep: `train.keep`.
    """
    done = checkpoints.epochs
    kept = done[best_epoch(done) - 1] if keep == "best" else done[-1]
    metrics = {**kept.row, "epochs": len(done), "training": training}
    files.write_json(paths.TRAIN_METRICS, metrics)

"""What a training goes on from after it was stopped, at any step."""

import hashlib
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from minigpt.common import files
from minigpt.common.errors import InputError

STATE_FILE = "state.json"


class Epoch(NamedTuple):
    """What one epoch gave.

    Attributes:
        row: losses and learning rate; the same on every run of one configuration.
        timing: when it finished and how fast it was; never the same twice.
        texts: what the model wrote after it.
    """

    row: dict[str, float]
    timing: dict[str, float]
    texts: list[dict[str, Any]]


def best_epoch(done: Sequence[Epoch]) -> int:
    """The number, from 1, of the epoch with the lowest val_loss (the last without validation)."""
    if "val_loss" not in done[-1].row:
        return len(done)
    return 1 + min(range(len(done)), key=lambda epoch: done[epoch].row["val_loss"])


class Checkpoints:
    """The variables after some step, after the one before, and after the best epoch.

    Each is a file of arrays, counted in by state.json with its checksum once it is whole.

    Args:
        directory: made, and emptied of what can't be used.
        identity: what a checkpoint must agree with to be used: configuration, data, versions.
        resume: whether to go on from a checkpoint at all.
        recorded: the mark of a training that needs no going on with, as `finish` was given it.

    Attributes:
        train_id: names this training, also after it was resumed.
        epochs: those that are done.
        step: steps that are done of the epoch under way.
    """

    def __init__(self, directory: Path, identity: str, resume: bool, recorded: str = "") -> None:
        self.directory, self.identity, self._mark = directory, identity, ""
        self.train_id, self.epochs, self.step = uuid.uuid4().hex, list[Epoch](), 0
        self._files: list[dict[str, Any]] = []  # name, sha256, epochs and step; the newest last
        state = _read(directory / STATE_FILE) if resume else {}
        over = recorded and state.get("mark") == recorded
        if state.get("identity") == identity and not over:
            self.train_id, self._files = state["train_id"], state["files"]
            while self._files and not self._sound(self._files[-1]):
                self._files.pop()
            if self._files:
                self.step = self._files[-1]["step"]
                done = state["epochs"][: self._files[-1]["epochs"]]
                self.epochs = [Epoch(**epoch) for epoch in done]
        directory.mkdir(parents=True, exist_ok=True)
        self._write_state()

    def save(self, model: keras.Model, *, epoch: Epoch | None = None, step: int = 0) -> None:
        """Adds a checkpoint: its variables first, then the state that counts it in.

        Args:
            model: compiled, its optimizer built.
            epoch: the one that has just ended; None: it is under way.
            step: steps of it that are done.

        Raises:
            InputError: a weight is NaN or infinite, or the disk is full; nothing is added.
        """
        epochs = len(self.epochs) + bool(epoch)
        arrays = [ops.convert_to_numpy(variable) for variable in _variables(model)]
        # The loss of a step is that of the weights before it: it can't tell of these.
        if not all(np.isfinite(array).all() for array in arrays):
            raise InputError(
                f"the weights are no longer finite after step {step} of epoch "
                f"{epochs + (not epoch)}: training has diverged; lower "
                "train.learning_rate, or set train.clip_norm"
            )
        path = self.directory / f"after_{epochs:05d}_{step:08d}.npz"
        with files.replacing(path) as beside, beside.open("wb") as file:
            np.savez(file, *arrays)
        entry = {"epochs": epochs, "step": step}
        self._files.append({"name": path.name, "sha256": _sha256(path), **entry})
        if epoch:
            self.epochs.append(epoch)
        self.step = step
        self._write_state()

    def finish(self, mark: str) -> None:
        """Keeps what the end can be reached from again, until `mark` is known to be recorded.

        Args:
            mark: names what this training has led to.
        """
        self._mark = mark
        self._files = [file for file in self._files if not file["step"]]
        self._write_state()

    def load(self, model: keras.Model, epoch: int | None = None) -> None:
        """Takes the variables back to the newest checkpoint, or to the end of an epoch.

        Raises:
            InputError: the file of that epoch was altered or has gone.
        """
        if epoch is None:
            found = self._files[-1:]
        else:
            found = [f for f in self._files if (f["epochs"], f["step"]) == (epoch, 0)]
        if not found or not self._sound(found[0]):
            raise InputError(
                f"the checkpoint of epoch {epoch or len(self.epochs)} in {self.directory} is "
                "missing or was altered: remove the folder and train again"
            )
        with np.load(self.directory / found[0]["name"], allow_pickle=False) as arrays:
            for variable, name in zip(_variables(model), arrays.files, strict=True):
                variable.assign(arrays[name])

    def _sound(self, entry: dict[str, Any]) -> bool:
        path = self.directory / entry["name"]
        return path.is_file() and _sha256(path) == entry["sha256"]

    def _write_state(self) -> None:
        best = best_epoch(self.epochs) if self.epochs else 0
        newest = self._files[-2:]
        self._files = [
            f for f in self._files if f in newest or (f["epochs"], f["step"]) == (best, 0)
        ]
        state = {
            "identity": self.identity,
            "train_id": self.train_id,
            "mark": self._mark,
            "epochs": [epoch._asdict() for epoch in self.epochs],
            "files": self._files,
        }
        with files.replacing(self.directory / STATE_FILE) as beside:
            beside.write_text(json.dumps(state))
        needed = {self.directory / file["name"] for file in self._files}
        for stale in set(self.directory.iterdir()) - needed - {self.directory / STATE_FILE}:
            stale.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _variables(model: keras.Model) -> list[keras.Variable]:
    """Weights, dropout's random state (which `save_weights` leaves out), optimizer and metrics."""
    return [*model.variables, *model.optimizer.variables, *model.metrics_variables]

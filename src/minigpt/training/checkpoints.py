"""Checkpoints: a training that is stopped at any step goes on from the newest one."""

import json
import logging
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from minigpt.common import files
from minigpt.common.errors import InputError

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
DIVERGED = (
    "training has diverged; lower train.learning_rate (with muon, train.matrix_rate too), or set "
    "train.clip_norm"
)
_OWN_FILE = re.compile(r"after_\d{5,}_\d{8,}\.npz(\.tmp)?")


class DivergedError(InputError):
    """The training has diverged; all of its processes raise this at the same step."""


class Epoch(NamedTuple):
    """The results of one epoch.

    Attributes:
        row: Losses and learning rate; the same in every run of one configuration.
        timing: When it finished and how fast it was; different in every run.
        texts: What the model wrote after it.
    """

    row: dict[str, float]
    timing: dict[str, float]
    texts: list[dict[str, Any]]


class LoggedStep(NamedTuple):
    """The training loss since the logged step before.

    Attributes:
        epoch: The epoch, from 1.
        step: The step within the epoch, from 1.
        loss: The mean loss over the tokens since the logged step before, in nats.
        learning_rate: The learning rate at this step.
        total: The sum of the losses since the epoch began, from which the next row is computed.
        tokens: The number of tokens since the epoch began.
    """

    epoch: int
    step: int
    loss: float
    learning_rate: float
    total: float
    tokens: float


def best_epoch(done: Sequence[Epoch]) -> int:
    """Returns the epoch, from 1, with the lowest val_loss; without validation the last one."""
    if "val_loss" not in done[-1].row:
        return len(done)
    return 1 + min(range(len(done)), key=lambda epoch: done[epoch].row["val_loss"])


class Checkpoints:
    """Keeps the variables after the newest step, the one before it, and the best epoch.

    Each checkpoint is a file of arrays. state.json lists it with its checksum once it is complete.

    Args:
        directory: Created if it is missing; of what is in it, only unusable checkpoints are
            removed.
        identity: A digest of everything that decides the weights. A checkpoint with another one
            is not used.
        resume: Whether to use a checkpoint at all.
        recorded: The mark of a training that is complete and recorded, as given to `finish`. A
            checkpoint with this mark is not used.
        writes: Whether this process writes; of several that train together, one does.

    Attributes:
        train_id: A random name for this training, which it keeps when it is resumed.
        epochs: The completed epochs.
        step: The completed steps of the epoch under way.
        logged: The logged steps up to here.
    """

    def __init__(
        self,
        directory: Path,
        identity: str,
        resume: bool,
        recorded: str = "",
        *,
        writes: bool = True,
    ) -> None:
        self.directory, self.identity, self._mark = directory, identity, ""
        self.writes = writes
        self.train_id, self.step = uuid.uuid4().hex, 0
        self.epochs: list[Epoch] = []
        self.logged: list[LoggedStep] = []
        self._files: list[dict[str, Any]] = []  # name, sha256, epochs and step; the newest last
        state = _read(directory / STATE_FILE) if resume else {}
        is_recorded = recorded and state.get("mark") == recorded
        if state.get("identity") == identity and not is_recorded:
            self._restore(state)
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
            if (
                resume
                and not self._files
                and not is_recorded
                and any(directory.glob("after_*.npz"))
            ):
                log.warning(
                    "the training starts from its beginning: the checkpoints in %s are damaged, or "
                    "of other settings, data, code or library versions, and are removed",
                    directory,
                )
            self._write_state()

    def save(self, model: keras.Model, *, epoch: Epoch | None = None, step: int = 0) -> None:
        """Adds a checkpoint: first its variables, then the state that lists it.

        Args:
            model: The compiled model, its optimizer built.
            epoch: The epoch that has just ended; None while one is under way.
            step: The completed steps of the epoch under way.

        Raises:
            DivergedError: A weight is not finite; nothing is added.
            InputError: The disk is full; nothing is added.
        """
        epochs = len(self.epochs) + bool(epoch)
        arrays = [ops.convert_to_numpy(variable) for variable in _variables(model)]
        # The loss of a step is that of the weights before the update, so it can't show this.
        if not all(np.isfinite(array).all() for array in arrays):
            raise DivergedError(
                f"the weights are no longer finite after step {step} of epoch "
                f"{epochs + (not epoch)}: {DIVERGED}"
            )
        if self.writes:
            path = self.directory / f"after_{epochs:05d}_{step:08d}.npz"
            with files.replacing(path) as beside, beside.open("wb") as file:
                np.savez(file, *arrays)
            entry = {"epochs": epochs, "step": step}
            self._files.append({"name": path.name, "sha256": files.sha256(path), **entry})
        if epoch:
            self.epochs.append(epoch)
        self.step = step
        if self.writes:
            self._write_state()

    def finish(self, mark: str) -> None:
        """Keeps the final checkpoints until DVC has recorded the outputs.

        Args:
            mark: A name for the outputs of this training.
        """
        self._mark = mark
        self._files = [file for file in self._files if not file["step"]]
        self._write_state()

    def load(self, model: keras.Model, epoch: int | None = None) -> None:
        """Restores the variables of the newest checkpoint, or of the end of an epoch.

        Raises:
            InputError: The checkpoint of that epoch is missing or was altered.
        """
        if not self.writes:
            self._files = _read(self.directory / STATE_FILE).get("files", [])
        if epoch is None:
            found = self._files[-1:]
        else:
            found = [f for f in self._files if (f["epochs"], f["step"]) == (epoch, 0)]
        if not found or not self._is_intact(found[0]):
            raise InputError(
                f"the checkpoint of epoch {epoch or len(self.epochs)} in {self.directory} is "
                "missing or was altered: remove the folder and train again"
            )
        with np.load(self.directory / found[0]["name"], allow_pickle=False) as arrays:
            for variable, name in zip(_variables(model), arrays.files, strict=True):
                variable.assign(arrays[name])

    def _restore(self, state: dict[str, Any]) -> None:
        self.train_id, self._files = state["train_id"], state["files"]
        while self._files and not self._is_intact(self._files[-1]):
            altered = self._files.pop()["name"]
            if self.writes:
                log.warning("%s is missing or was altered", self.directory / altered)
        if self._files:
            done, self.step = self._files[-1]["epochs"], self._files[-1]["step"]
            self.epochs = [Epoch(**epoch) for epoch in state["epochs"][:done]]
            logged = (LoggedStep(*row) for row in state["logged"])
            end = (done + 1, self.step)
            self.logged = [row for row in logged if (row.epoch, row.step) <= end]

    def _is_intact(self, entry: dict[str, Any]) -> bool:
        path = self.directory / entry["name"]
        return path.is_file() and files.sha256(path) == entry["sha256"]

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
            "logged": self.logged,
            "files": self._files,
        }
        files.write_text(self.directory / STATE_FILE, json.dumps(state))
        needed = {file["name"] for file in self._files}
        for path in self.directory.iterdir():
            if path.name not in needed and _OWN_FILE.fullmatch(path.name) and path.is_file():
                path.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(files.read_json(path))
    except (FileNotFoundError, ValueError):
        return {}


def _variables(model: keras.Model) -> list[keras.Variable]:
    """Weights, dropout's random state (which `save_weights` leaves out), optimizer and metrics."""
    return [*model.variables, *model.optimizer.variables, *model.metrics_variables]

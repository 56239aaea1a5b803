"""Training: the loss as Keras fits it, the optimizer, and epochs that can be resumed."""

import json
import math
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from minigpt import loss as cross_entropy
from minigpt.errors import InputError
from minigpt.model import MiniGPT
from minigpt.vocabulary import PADDING, UNKNOWN

STATE_FILE = "state.json"


class LossModel(keras.Model):
    """The network up to its hidden states, with the fused loss as `fit` and `evaluate` use it.

    Its metrics are sums over tokens divided once, never averages of averages: `loss` is nats per
    real token, `seed_loss` the published mean over all positions, padding included, and
    `unk_share` the share of [UNK] among the real targets.

    Args:
        network: the model to train.
        padded: whether the published loss is trained, instead of the mean over real tokens.
    """

    def __init__(self, network: MiniGPT, padded: bool) -> None:
        super().__init__()
        self.network = network
        self.padded = padded
        names = ("loss", "seed_loss", "unk_share")
        self.trackers = {name: keras.metrics.Mean(name=name) for name in names}

    def call(self, tokens: Any, training: bool | None = None) -> Any:
        """Hidden states (B, T, C) of token ids (B, T)."""
        return self.network.hidden(tokens, training=training)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """The trained mean of a batch; called by Keras's train and test steps on each backend."""
        real = ops.cast(ops.not_equal(y, PADDING), "float32")
        tokens, positions = ops.sum(real), ops.cast(ops.size(y), "float32")
        counted = ops.maximum(tokens, 1.0)
        trained, observed = real / counted, ops.ones_like(real) / positions
        if self.padded:
            trained, observed = observed, trained
        kernel, bias = self.network.head
        if training:
            sums = cross_entropy.weighted_losses(y_pred, kernel, bias, y, trained, observed)
        else:
            losses = cross_entropy.token_losses(y_pred, kernel, bias, y)
            sums = ops.stack([ops.sum(losses * trained), ops.sum(losses * observed)])
        loss, seed_loss = (sums[1], sums[0]) if self.padded else (sums[0], sums[1])
        unknown = ops.sum(ops.cast(ops.equal(y, UNKNOWN), "float32"))
        self.trackers["loss"].update_state(loss, sample_weight=tokens)
        self.trackers["seed_loss"].update_state(seed_loss, sample_weight=positions)
        self.trackers["unk_share"].update_state(unknown / counted, sample_weight=tokens)
        return sums[0]

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """What the steps report, in place of Keras's own mean over batches."""
        return list(self.trackers.values())


def make_optimizer(
    name: str,
    *,
    learning_rate: float,
    warmup_steps: int,
    decay: str,
    total_steps: int,
    weight_decay: float,
    clip_norm: float,
) -> keras.optimizers.Optimizer:
    """Adam or AdamW with a linear warm-up and, if asked for, a cosine decay to 0.

    Args:
        name: "adam" or "adamw".
        learning_rate: the peak.
        warmup_steps: steps of linear warm-up; 0: none.
        decay: "constant" or "cosine" (Loshchilov and Hutter, 2017).
        total_steps: steps of the whole training, the warm-up included.
        weight_decay: decoupled (Loshchilov and Hutter, 2019), of matrices only; 0: none.
        clip_norm: of all gradients together; 0: not clipped.

    Raises:
        InputError: the warm-up doesn't end before the training does.
    """
    if warmup_steps >= total_steps:
        raise InputError(
            f"train.warmup_steps is {warmup_steps}, but the whole training has {total_steps} "
            "steps: lower it, or raise train.epochs"
        )
    rate: Any = learning_rate
    if warmup_steps or decay == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup_steps else learning_rate,
            decay_steps=total_steps - warmup_steps,
            # Its decay ends at alpha x the peak: 1 keeps the rate where the warm-up left it.
            alpha=0.0 if decay == "cosine" else 1.0,
            warmup_target=learning_rate if warmup_steps else None,
            warmup_steps=warmup_steps,
        )
    clip = clip_norm or None
    if name == "adam":
        return keras.optimizers.Adam(rate, global_clipnorm=clip)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=weight_decay, global_clipnorm=clip)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


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


class Checkpoints:
    """The variables of the last and the best epoch, and what is known of all of them.

    Args:
        directory: made, and emptied of checkpoints that can't be used.
        identity: what a checkpoint must agree with to be used: configuration, data, versions.
        resume: whether to go on from a checkpoint at all.

    Attributes:
        train_id: names this training, also after it was resumed.
        epochs: those that are done.
    """

    def __init__(self, directory: Path, identity: str, resume: bool) -> None:
        self.directory, self.identity = directory, identity
        self.train_id, self.epochs = uuid.uuid4().hex, list[Epoch]()
        state_file = directory / STATE_FILE
        state = json.loads(state_file.read_text()) if resume and state_file.exists() else {}
        if state.get("identity") == identity:
            self.train_id = state["train_id"]
            self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        directory.mkdir(parents=True, exist_ok=True)
        self._write_state()

    def save(self, model: LossModel, epoch: Epoch) -> None:
        """Adds an epoch: its variables first, then the state that counts it in."""
        self.epochs.append(epoch)
        beside = self.directory / f"variables.{os.getpid()}.tmp"
        with beside.open("wb") as file:
            np.savez(file, *[ops.convert_to_numpy(variable) for variable in _variables(model)])
        beside.replace(self._file(len(self.epochs)))
        self._write_state()

    def load(self, model: LossModel, epoch: int) -> None:
        """Takes the variables back to the end of an epoch, the last one or the best."""
        with np.load(self._file(epoch), allow_pickle=False) as arrays:
            for variable, name in zip(_variables(model), arrays.files, strict=True):
                variable.assign(arrays[name])

    def _write_state(self) -> None:
        state = {"identity": self.identity, "train_id": self.train_id}
        beside = self.directory / f"{STATE_FILE}.{os.getpid()}.tmp"
        beside.write_text(json.dumps({**state, "epochs": [e._asdict() for e in self.epochs]}))
        beside.replace(self.directory / STATE_FILE)
        needed = {self.directory / STATE_FILE}
        if self.epochs:
            needed |= {self._file(len(self.epochs)), self._file(best_epoch(self.epochs))}
        for stale in set(self.directory.iterdir()) - needed:
            stale.unlink()

    def _file(self, epoch: int) -> Path:
        return self.directory / f"epoch_{epoch:05d}.npz"


def fit(
    model: LossModel,
    batches: Callable[[int], Any],
    validation: Any | None,
    checkpoints: Checkpoints,
    *,
    epochs: int,
    tokens: int,
    seed: int,
    early_stopping: int,
    keep_best: bool,
    write_texts: Callable[[], list[dict[str, Any]]],
    on_epoch: Callable[[Epoch], None],
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int = 0,
) -> list[Epoch]:
    """Trains epoch by epoch, with a checkpoint after each.

    Args:
        model: compiled; holds the kept weights afterwards.
        batches: the training data of an epoch, counted from 0.
        validation: held-out data; None: nothing is held out.
        checkpoints: where it goes on from, and what it adds to.
        epochs: at most.
        tokens: real targets in the training data, for the speed.
        seed: of what the backend draws outside Keras's own generators (PyTorch's dropout).
        early_stopping: epochs without a better val_loss before it stops; 0: never.
        keep_best: whether the weights of the best val_loss are kept, instead of the last.
        write_texts: called after each epoch.
        on_epoch: told each epoch as it ends.
        callbacks: for Keras's `fit`.
        verbose: likewise.

    Returns:
        All epochs, those of before an interruption included.

    Raises:
        InputError: the loss is no longer a number.
    """
    model.optimizer.build(model.trainable_variables)  # so that a checkpoint finds its variables
    done = checkpoints.epochs
    if done:
        checkpoints.load(model, len(done))
    while len(done) < epochs and not _stops(done, early_stopping):
        number = len(done) + 1
        keras.utils.set_random_seed(seed + number)  # the same whether resumed or not
        began = time.perf_counter()
        data = batches(number - 1)  # in an order of its own
        fitted = model.fit(data, verbose=verbose, shuffle=False, callbacks=list(callbacks))
        seconds = time.perf_counter() - began
        losses = {name: values[-1] for name, values in fitted.history.items()}
        if not math.isfinite(losses["loss"]):
            raise InputError(
                f"the loss of epoch {number} is {losses['loss']}: training has diverged; lower "
                "train.learning_rate, or set train.clip_norm"
            )
        row = {"epoch": number, "loss": losses["loss"], "seed_loss": losses["seed_loss"]}
        row["learning_rate"] = float(ops.convert_to_numpy(model.optimizer.learning_rate))
        if validation is not None:
            held_out = model.evaluate(validation, return_dict=True, verbose=0)
            row["val_loss"], row["val_seed_loss"] = held_out["loss"], held_out["seed_loss"]
            row["val_perplexity"] = math.exp(min(held_out["loss"], 700))  # beyond, not a float
            row["val_unk_share"] = held_out["unk_share"]
        timing = {
            "epoch": number,
            "finished_ms": time.time_ns() // 1_000_000,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1),
        }
        texts = [{"epoch": number, **text} for text in write_texts()]
        checkpoints.save(model, Epoch(row, timing, texts))
        on_epoch(done[-1])
    if keep_best and best_epoch(done) < len(done):
        checkpoints.load(model, best_epoch(done))
    return done


def best_epoch(done: Sequence[Epoch]) -> int:
    """The number, from 1, of the epoch with the lowest val_loss (the last without validation)."""
    if "val_loss" not in done[-1].row:
        return len(done)
    return 1 + min(range(len(done)), key=lambda epoch: done[epoch].row["val_loss"])


def _stops(done: Sequence[Epoch], early_stopping: int) -> bool:
    return bool(early_stopping and done) and len(done) - best_epoch(done) >= early_stopping


def _variables(model: LossModel) -> list[keras.Variable]:
    """Weights, dropout's random state (which `save_weights` leaves out), and the optimizer's."""
    return [*model.variables, *model.optimizer.variables]

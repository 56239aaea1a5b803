"""What a step trains and reports, and epochs that stop, resume and are kept."""

import contextlib
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from training_data import (
    BATCH,
    SEQUENCES,
    STEPS,
    TRAIN,
    WORDS,
    counting,
    dataset,
    restore,
    state,
)

from minigpt.common import progress
from minigpt.common.errors import InputError
from minigpt.training import fit, optimizers
from minigpt.training.checkpoints import Checkpoints, Epoch, best_epoch
from minigpt.training.fit import LossModel, Stop

TOKENS = int((counting(1)[1] != 0).sum())


def batches(epoch: int, skip: int) -> Any:
    x, y = counting(1)
    order = np.random.default_rng(epoch).permutation(SEQUENCES)[skip * BATCH :]
    return dataset(x[order], y[order])


def run(model: LossModel, checkpoints: Checkpoints, **changes: Any) -> list[Epoch]:
    options = {
        "steps": STEPS,
        "tokens": TOKENS,
        "bits_per_byte": lambda loss: 3 * loss,
        "checkpoint_steps": 4,
        "log_steps": 2,
        "stop": Stop(),
        "write_texts": lambda: [{"prompt": "où", "text": "où ?"}],
        "on_epoch": lambda: None,
    }
    validation = changes.pop("validation", dataset(*counting(1, seed=9)))
    data = changes.pop("batches", batches)
    settings = {name: changes.pop(name) for name in list(changes) if name in TRAIN.model_fields_set}
    config = TRAIN.model_copy(update=settings)
    fit.fit(model, data, validation, checkpoints, config, **{**options, **changes})
    return checkpoints.epochs


# A step.


def reference(call: Any, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    logits = ops.convert_to_numpy(call(x)).astype("float64")
    logits -= logits.max(-1, keepdims=True)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, y[..., None], -1)[..., 0]
    real = y != 0
    return {
        "loss": losses[real].mean(),
        "seed_loss": losses.mean(),
        "unk_share": (y == 1).sum() / real.sum(),
    }


def sequences(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ones, with unknown tokens and very different amounts of padding."""
    x, y = rng.integers(1, 8, (2, count, 8)).astype("int32")
    y[np.arange(8) >= rng.integers(1, 9, (count, 1))] = 0
    return x, y


@pytest.mark.backend
def test_metrics_are_sums_over_tokens(make_network: Any, compiled: Any) -> None:
    network = make_network(num_blocks=1, dropout=0.0)
    x, y = sequences(np.random.default_rng(0), 10)
    y[8:, 2:] = 0  # a mean over batches would give these few tokens the weight of many
    y[8:, :2] = 1
    expected = reference(compiled(network.call), x, y)
    model = LossModel(network, padded=False)
    optimizer = optimizers.make(TRAIN.model_copy(update={"learning_rate": 1e-12}), 100)
    model.compile(optimizer=optimizer, jit_compile=keras.backend.backend() == "jax")
    data = dataset(x, y, 4)
    assert model.evaluate(data, return_dict=True, verbose=0) == pytest.approx(expected, rel=1e-5)
    fitted = model.fit(data, shuffle=False, verbose=0).history
    assert {name: found[-1] for name, found in fitted.items()} == pytest.approx(expected, rel=1e-5)


def step(
    model: LossModel, x: np.ndarray, y: np.ndarray, training: bool
) -> tuple[float, dict[str, float]]:
    """The loss of a batch and the metrics after it, as Keras's own steps ask for them."""
    values = [(v, ops.convert_to_tensor(v.numpy())) for v in model.trainable_variables]
    with keras.StatelessScope(state_mapping=values):
        loss = model.compute_loss(y=y, y_pred=model(x), training=training)
        found = {metric.name: metric.result() for metric in model.metrics}
        return float(loss), {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("during_training", [True, False])
def test_the_loss_that_is_trained(make_network: Any, compiled: Any, during_training: bool) -> None:
    network = make_network(num_blocks=1)
    x, y = sequences(np.random.default_rng(1), 3)
    expected = reference(compiled(network.call), x, y)
    assert abs(expected["loss"] - expected["seed_loss"]) > 0.1
    for padded, name in ((False, "loss"), (True, "seed_loss")):
        model = LossModel(network, padded)
        found, reported = step(model, x, y, during_training)
        assert found == pytest.approx(expected[name], rel=1e-5)
        assert reported == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_text_leaves_out_its_separators(make_network: Any) -> None:
    network = make_network(num_blocks=1)
    x, y = sequences(np.random.default_rng(2), 3)
    y[:, 1] = 2
    _, all_of_it = step(LossModel(network, padded=False, separator=2), x, y, False)
    _, text = step(LossModel(network, padded=False), x, np.where(y == 2, 0, y), False)
    assert all_of_it["text_loss"] == pytest.approx(text["loss"], rel=1e-5)
    assert all_of_it["text_loss"] != pytest.approx(all_of_it["loss"], rel=1e-5)


def test_a_batch_of_padding_alone_is_no_loss(make_network: Any) -> None:
    x = y = np.zeros((3, 8), "int32")
    found, reported = step(LossModel(make_network(num_blocks=1), padded=False), x, y, True)
    assert (found, reported["loss"], reported["unk_share"]) == (0, 0, 0)
    assert reported["seed_loss"] > 0


# Epochs.


class Kill(keras.callbacks.Callback):
    """Ends after some steps, with what is on disk then."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps
        self.stop = Stop()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1


class Signal(Kill):
    """Asks it to stop in the midst of a step, as SIGTERM does."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if not self.left:
            self.stop(15, None)


class DroppedSignal(Signal):
    """Asks it to stop where Keras drops what is raised, as it does while it converts logs."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            super().on_train_batch_begin(batch, logs)


@pytest.mark.backend
def test_training_goes_on_as_if_nothing_had_happened(
    trainer: LossModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    initial = state(trainer)
    calm = Checkpoints(tmp_path / "undisturbed", "a", True)
    undisturbed = run(trainer, calm)
    expected = state(trainer)
    rows = [epoch.row for epoch in undisturbed]

    # It learns, and says so.
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["loss"] > 1.5 and rows[-1]["loss"] < 0.5 and rows[-1]["val_loss"] < 0.3
    assert rows[-1]["val_perplexity"] == pytest.approx(np.exp(rows[-1]["val_loss"]))
    assert rows[-1]["val_bits_per_byte"] == pytest.approx(3 * rows[-1]["val_loss"])
    assert 0 < rows[-1]["val_seed_loss"] != rows[-1]["val_loss"]
    assert rows[-1]["val_unk_share"] == 0
    assert rows[-1]["learning_rate"] == pytest.approx(0, abs=1e-8)
    assert undisturbed[-1].texts == [{"epoch": 4, "prompt": "où", "text": "où ?"}]
    timing = undisturbed[-1].timing
    assert timing["tokens_per_s"] == pytest.approx(TOKENS / timing["seconds"], rel=0.1)

    # The logged steps of an epoch are its loss in parts.
    assert [(row.epoch, row.step) for row in calm.logged[:4]] == [(1, 2), (1, 4), (1, 6), (2, 2)]
    assert calm.logged[2].total / calm.logged[2].tokens == pytest.approx(rows[0]["loss"], rel=1e-5)
    assert calm.logged[0].loss > calm.logged[-1].loss

    # There is nothing left to do.
    asked: list[tuple[int, int]] = []
    finished = Checkpoints(tmp_path / "undisturbed", "a", True)
    again = run(trainer, finished, batches=lambda *which: asked.append(which))
    assert again == undisturbed and asked == []

    # Killed in the second epoch, a step after a checkpoint, and in the third stopped by a signal,
    # which asks for a checkpoint. Each process begins with other weights, at another step.
    folder, signal = tmp_path / "stopped", Signal(STEPS - 4 + 3)
    train_ids = set()
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0)
    caplog.set_level("INFO")

    def data(epoch: int, skip: int) -> Any:
        asked.append((epoch, skip))
        return batches(epoch, skip)

    def another(**changes: Any) -> tuple[Checkpoints, list[Epoch]]:
        checkpoints = Checkpoints(folder, "a", True)
        train_ids.add(checkpoints.train_id)
        return checkpoints, run(trainer, checkpoints, batches=data, **changes)

    restore(trainer, initial)
    with pytest.raises(KeyboardInterrupt):
        another(callbacks=[Kill(STEPS + 5)])
    restore(trainer, [value + 1 for value in expected])
    with pytest.raises(KeyboardInterrupt):
        another(callbacks=[signal], stop=signal.stop)
    restore(trainer, [value + 2 for value in expected])
    going_on, done = another()
    assert asked == [(0, 0), (1, 0), (1, 4), (2, 0), (2, 3), (3, 0)]
    assert len(train_ids) == 1
    lines = [message for message in caplog.messages if message.startswith("epoch 2, step")]
    assert [line.split(":")[0] for line in lines] == [
        f"epoch 2, step {step} of {STEPS}" for step in (1, 2, 3, 4, 5, *range(5, STEPS + 1))
    ]
    assert [epoch.row for epoch in done] == rows
    assert going_on.logged == calm.logged
    for found, value in zip(state(trainer), expected, strict=True):
        np.testing.assert_array_equal(found, value)


@pytest.mark.backend
def test_an_epoch_whose_steps_are_all_done_is_only_validated(
    trainer: LossModel, tmp_path: Path
) -> None:
    initial = state(trainer)
    rows = [epoch.row for epoch in run(trainer, Checkpoints(tmp_path / "a", "a", True), epochs=1)]
    restore(trainer, initial)

    def die() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(trainer, Checkpoints(tmp_path / "b", "a", True), epochs=1, write_texts=die)
    going_on = Checkpoints(tmp_path / "b", "a", True)
    assert going_on.step == STEPS
    done = run(trainer, going_on, epochs=1, batches=None)
    assert [epoch.row for epoch in done] == rows


def test_a_signal_outside_of_the_steps_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        Stop()(15, None)


@pytest.mark.backend
def test_an_interrupt_that_keras_drops_stops_the_training(
    trainer: LossModel, tmp_path: Path
) -> None:
    dropped, in_a_step = DroppedSignal(1), Checkpoints(tmp_path / "a", "a", True)
    with pytest.raises(KeyboardInterrupt):
        run(trainer, in_a_step, callbacks=[dropped], stop=dropped.stop)
    assert in_a_step.step == 1

    stop, between = Stop(), Checkpoints(tmp_path / "b", "a", True)

    def write_texts() -> list[Any]:
        with contextlib.suppress(KeyboardInterrupt):
            stop(15, None)
        return []

    with pytest.raises(KeyboardInterrupt):
        run(trainer, between, epochs=1, write_texts=write_texts, stop=stop)
    assert len(between.epochs) == 1


@pytest.mark.backend
def test_the_best_or_the_last_weights_are_kept_and_training_stops(
    trainer: LossModel, tmp_path: Path
) -> None:
    contrary = dataset(*counting(3))  # the better it counts, the worse it is at this
    checkpoints = Checkpoints(tmp_path, "a", True)
    done = run(trainer, checkpoints, epochs=50, validation=contrary, early_stopping=2, keep="best")
    losses = [epoch.row["val_loss"] for epoch in done]
    best = int(np.argmin(losses))
    assert len(done) == best + 3 and best_epoch(done) == best + 1
    kept = trainer.evaluate(contrary, return_dict=True, verbose=0)
    assert kept["loss"] == pytest.approx(losses[best], rel=1e-6)
    # Nor does it go on when it is asked again, here to keep the last weights.
    again, settings = Checkpoints(tmp_path, "a", True), {"early_stopping": 2, "keep": "last"}
    assert run(trainer, again, epochs=50, validation=contrary, **settings) == done
    kept = trainer.evaluate(contrary, return_dict=True, verbose=0)
    assert kept["loss"] == pytest.approx(losses[-1], rel=1e-6) != losses[best]
    assert f"after_{best + 1:05d}_{0:08d}.npz" in {file.name for file in tmp_path.iterdir()}


@pytest.mark.backend
def test_nothing_held_out(trainer: LossModel, tmp_path: Path) -> None:
    done = run(trainer, Checkpoints(tmp_path, "a", True), epochs=2, validation=None, keep="best")
    assert set(done[-1].row) == {"epoch", "loss", "seed_loss", "learning_rate"}
    assert best_epoch(done) == 2 and trainer.optimizer.iterations == 2 * STEPS


@pytest.mark.backend
def test_a_loss_that_is_no_number(trainer: LossModel, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "a", True)

    def spoil() -> None:
        trainer.network.head_bias.assign(np.full(WORDS, np.nan))

    with pytest.raises(InputError) as raised:
        run(trainer, checkpoints, on_epoch=spoil)
    assert "the loss is nan at step 1 of epoch 2" in str(raised.value)
    assert "train.learning_rate" in str(raised.value) and "train.clip_norm" in str(raised.value)
    assert len(Checkpoints(tmp_path, "a", True).epochs) == 1


def test_a_loss_that_explodes(trainer: LossModel, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "a", True)

    def spoil() -> None:
        trainer.network.head_bias.assign(np.arange(WORDS) * 1e4)

    with pytest.raises(InputError, match=r"the loss is [0-9.e+]+ at step 1 of epoch 2: training"):
        run(trainer, checkpoints, on_epoch=spoil)
    assert len(Checkpoints(tmp_path, "a", True).epochs) == 1

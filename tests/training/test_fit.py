"""What a step trains and reports, the optimizer, and epochs that stop, go on and are kept."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from minigpt.common.errors import InputError
from minigpt.model.network import MiniGPT
from minigpt.training import fit
from minigpt.training.checkpoints import Checkpoints, Epoch, best_epoch
from minigpt.training.fit import LossModel, Stop

pytestmark = pytest.mark.backend

WORDS, LENGTH, SEQUENCES, BATCH, EPOCHS = 12, 6, 48, 8, 4
STEPS = SEQUENCES // BATCH
PLAIN = {
    "learning_rate": 0.03,
    "warmup_steps": 0,
    "decay": "constant",
    "total_steps": 100,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
}


def dataset(x: np.ndarray, y: np.ndarray, batch: int = BATCH) -> Any:
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)


def counting(step: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sequences in which each number is `step` more than the one before, some cut short."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, WORDS - 2, (SEQUENCES, 1))
    numbers = 2 + (start + step * np.arange(LENGTH + 1)) % (WORDS - 2)
    lengths = rng.integers(3, LENGTH + 2, (SEQUENCES, 1))
    numbers[np.arange(LENGTH + 1) >= lengths] = 0
    return numbers[:, :-1].astype("int32"), numbers[:, 1:].astype("int32")


TOKENS = int((counting(1)[1] != 0).sum())


def batches(epoch: int, skip: int) -> Any:
    x, y = counting(1)
    order = np.random.default_rng(epoch).permutation(SEQUENCES)[skip * BATCH :]
    return dataset(x[order], y[order])


def state(model: LossModel) -> list[np.ndarray]:
    return [ops.convert_to_numpy(v) for v in [*model.variables, *model.optimizer.variables]]


def restore(model: LossModel, values: list[np.ndarray]) -> None:
    for variable, value in zip([*model.variables, *model.optimizer.variables], values, strict=True):
        variable.assign(value)


@pytest.fixture(scope="module")
def compiled_once() -> tuple[LossModel, list[np.ndarray]]:
    keras.utils.set_random_seed(1)
    model = LossModel(MiniGPT(WORDS, LENGTH, 16, 1, 2, 8, 16, 0.1, False), padded=False)
    schedule = {"warmup_steps": 3, "decay": "cosine", "total_steps": EPOCHS * STEPS}
    optimizer = fit.make_optimizer("adam", **{**PLAIN, **schedule, "clip_norm": 1.0})
    model.compile(optimizer=optimizer, jit_compile=keras.backend.backend() == "jax")
    optimizer.build(model.trainable_variables)
    return model, state(model)


@pytest.fixture
def trainer(compiled_once: Any) -> LossModel:
    """As good as new for each test."""
    model, initial = compiled_once
    restore(model, initial)
    model.reset_metrics()  # what diverges leaves NaN in them, which no checkpoint takes
    return model


def run(model: LossModel, checkpoints: Checkpoints, **changes: Any) -> list[Epoch]:
    options = {
        "epochs": EPOCHS,
        "steps": STEPS,
        "tokens": TOKENS,
        "seed": 1,
        "checkpoint_steps": 4,
        "stop": Stop(),
        "early_stopping": 0,
        "keep_best": False,
        "write_texts": lambda: [{"prompt": "où", "text": "où ?"}],
        "on_epoch": lambda epoch: None,
    }
    validation = changes.pop("validation", dataset(*counting(1, seed=9)))
    data = changes.pop("batches", batches)
    return fit.fit(model, data, validation, checkpoints, **{**options, **changes})


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


def test_metrics_are_sums_over_tokens(make_network: Any, compiled: Any) -> None:
    network = make_network(num_blocks=1, dropout=0.0)
    x, y = sequences(np.random.default_rng(0), 10)
    y[8:, 2:] = 0  # a mean over batches would give these few tokens the weight of many
    y[8:, :2] = 1
    expected = reference(compiled(network.call), x, y)
    model = LossModel(network, padded=False)
    optimizer = fit.make_optimizer("adam", **{**PLAIN, "learning_rate": 1e-12})
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


def test_a_batch_of_padding_alone_is_no_loss(make_network: Any) -> None:
    x = y = np.zeros((3, 8), "int32")
    found, reported = step(LossModel(make_network(num_blocks=1), padded=False), x, y, True)
    assert (found, reported["loss"], reported["unk_share"]) == (0, 0, 0)
    assert reported["seed_loss"] > 0


# The optimizer.


def rates(at: list[int], **changes: Any) -> list[float]:
    optimizer = fit.make_optimizer("adam", **{**PLAIN, "learning_rate": 0.2, **changes})
    found = []
    for step in at:
        optimizer.iterations.assign(step)
        found.append(float(ops.convert_to_numpy(optimizer.learning_rate)))
    return found


@pytest.mark.parametrize(
    ("warmup", "decay", "expected"),
    [
        (20, "cosine", [0, 0.1, 0.2, 0.2 * (1 + 0.5**0.5) / 2, 0.1, 0, 0]),
        (20, "constant", [0, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2]),
        (0, "constant", [0.2] * 7),
    ],
)
def test_the_learning_rate(warmup: int, decay: str, expected: list[float]) -> None:
    at = [0, 10, 20, 40, 60, 100, 200]
    assert rates(at, warmup_steps=warmup, decay=decay) == pytest.approx(expected, abs=1e-7)


def test_the_learning_rate_without_warm_up() -> None:
    found = rates([0, 25, 50, 100], decay="cosine")
    assert found == pytest.approx([0.2, 0.2 * (1 + 0.5**0.5) / 2, 0.1, 0], abs=1e-7)


@pytest.mark.parametrize("steps", [100, 101])
def test_a_warm_up_longer_than_the_training(steps: int) -> None:
    with pytest.raises(InputError) as raised:
        fit.make_optimizer("adam", **{**PLAIN, "warmup_steps": steps})
    assert f"train.warmup_steps is {steps}, but the whole training has 100 steps" in str(
        raised.value
    )


def test_weight_decay_is_for_matrices(make_network: Any) -> None:
    weights = make_network(num_blocks=1).trainable_variables
    before = [ops.convert_to_numpy(weight) for weight in weights]
    optimizer = fit.make_optimizer("adamw", **{**PLAIN, "learning_rate": 0.1, "weight_decay": 0.5})
    optimizer.apply([ops.zeros(weight.shape) for weight in weights], weights)
    decayed = set()
    for weight, old in zip(weights, before, strict=True):
        new = ops.convert_to_numpy(weight)
        if weight.name in ("bias", "head_bias", "gamma", "beta"):
            np.testing.assert_array_equal(new, old)
        else:
            np.testing.assert_allclose(new, old * 0.95, rtol=1e-5)
            decayed.add(weight.name)
    assert decayed == {"embeddings", "kernel", "head_kernel"}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_gradients_are_clipped_together(name: str) -> None:
    large = [np.array([30.0, 0], "float32"), np.array([40.0], "float32")]
    small = [np.array([0.1, 0.2], "float32"), np.array([0.3], "float32")]

    def after(first: list[np.ndarray], clip_norm: float) -> np.ndarray:
        weights = [keras.Variable(np.ones(2, "float32")), keras.Variable(np.ones(1, "float32"))]
        optimizer = fit.make_optimizer(name, **{**PLAIN, "clip_norm": clip_norm})
        for step in (first, small):
            optimizer.apply([ops.convert_to_tensor(gradient) for gradient in step], weights)
        return np.concatenate([ops.convert_to_numpy(weight) for weight in weights])

    clipped = after(large, 1)
    np.testing.assert_allclose(clipped, after([g / 50 for g in large], 0), rtol=1e-6)
    assert np.abs(clipped - after(large, 0)).max() > 1e-3


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


def test_training_goes_on_as_if_nothing_had_happened(trainer: LossModel, tmp_path: Path) -> None:
    initial = state(trainer)
    undisturbed = run(trainer, Checkpoints(tmp_path / "undisturbed", "a", True))
    expected = state(trainer)
    rows = [epoch.row for epoch in undisturbed]

    # It learns, and says so.
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["loss"] > 1.5 and rows[-1]["loss"] < 0.5 and rows[-1]["val_loss"] < 0.3
    assert rows[-1]["val_perplexity"] == pytest.approx(np.exp(rows[-1]["val_loss"]))
    assert 0 < rows[-1]["val_seed_loss"] != rows[-1]["val_loss"]
    assert rows[-1]["val_unk_share"] == 0
    assert rows[-1]["learning_rate"] == pytest.approx(0, abs=1e-8)
    assert undisturbed[-1].texts == [{"epoch": 4, "prompt": "où", "text": "où ?"}]
    timing = undisturbed[-1].timing
    assert timing["tokens_per_s"] == pytest.approx(TOKENS / timing["seconds"], rel=0.1)

    # There is nothing left to do.
    asked: list[tuple[int, int]] = []
    finished = Checkpoints(tmp_path / "undisturbed", "a", True)
    again = run(trainer, finished, batches=lambda *which: asked.append(which))
    assert again == undisturbed and asked == []

    # Killed in the third epoch, two steps after a checkpoint, which the signal had asked for.
    for stopper, steps in ((Kill(2 * STEPS + 5), 4), (Signal(2 * STEPS + 3), 3)):
        told: list[Epoch] = []
        folder = tmp_path / f"stopped-{steps}"
        stopped, stop = Checkpoints(folder, "a", True), Stop()
        stopper.stop = stop
        restore(trainer, initial)
        with pytest.raises(KeyboardInterrupt):
            run(trainer, stopped, callbacks=[stopper], on_epoch=told.append, stop=stop)

        # Another process begins with other weights, at another step.
        restore(trainer, [value + 1 for value in expected])
        asked.clear()

        def data(epoch: int, skip: int) -> Any:
            asked.append((epoch, skip))
            return batches(epoch, skip)

        going_on = Checkpoints(folder, "a", True)
        assert (going_on.train_id, going_on.epochs) == (stopped.train_id, told)
        done = run(trainer, going_on, batches=data, on_epoch=told.append)
        assert asked == [(2, steps), (3, 0)] and done == told
        assert [epoch.row for epoch in done] == rows
        for found, value in zip(state(trainer), expected, strict=True):
            np.testing.assert_array_equal(found, value)


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


def test_the_best_weights_are_kept_and_training_stops(trainer: LossModel, tmp_path: Path) -> None:
    contrary = dataset(*counting(3))  # the better it counts, the worse it is at this
    checkpoints = Checkpoints(tmp_path, "a", True)
    done = run(
        trainer, checkpoints, epochs=50, validation=contrary, early_stopping=2, keep_best=True
    )
    losses = [epoch.row["val_loss"] for epoch in done]
    best = int(np.argmin(losses))
    assert len(done) == best + 3 and best_epoch(done) == best + 1
    kept = trainer.evaluate(contrary, return_dict=True, verbose=0)
    assert kept["loss"] == pytest.approx(losses[best], rel=1e-6)
    # Nor does it go on when it is asked again.
    again = Checkpoints(tmp_path, "a", True)
    assert run(trainer, again, epochs=50, validation=contrary, early_stopping=2) == done
    assert f"after_{best + 1:05d}_{0:08d}.npz" in {file.name for file in tmp_path.iterdir()}


def test_the_last_weights_are_kept(trainer: LossModel, tmp_path: Path) -> None:
    contrary = dataset(*counting(3))
    done = run(trainer, Checkpoints(tmp_path, "a", True), validation=contrary)
    losses = [epoch.row["val_loss"] for epoch in done]
    assert len(done) == EPOCHS and losses[-1] > min(losses)
    kept = trainer.evaluate(contrary, return_dict=True, verbose=0)
    assert kept["loss"] == pytest.approx(losses[-1], rel=1e-6)


def test_nothing_held_out(trainer: LossModel, tmp_path: Path) -> None:
    done = run(trainer, Checkpoints(tmp_path, "a", True), epochs=2, validation=None, keep_best=True)
    assert set(done[-1].row) == {"epoch", "loss", "seed_loss", "learning_rate"}
    assert best_epoch(done) == 2 and trainer.optimizer.iterations == 2 * STEPS


def test_a_loss_that_is_no_number(trainer: LossModel, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "a", True)

    def spoil(epoch: Epoch) -> None:
        trainer.network.head_bias.assign(np.full(WORDS, np.nan))

    with pytest.raises(InputError) as raised:
        run(trainer, checkpoints, on_epoch=spoil)
    assert "the loss is nan at step 1 of epoch 2" in str(raised.value)
    assert "train.learning_rate" in str(raised.value) and "train.clip_norm" in str(raised.value)
    assert len(Checkpoints(tmp_path, "a", True).epochs) == 1


def test_a_loss_that_explodes(trainer: LossModel, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "a", True)

    def spoil(epoch: Epoch) -> None:
        trainer.network.head_bias.assign(np.arange(WORDS) * 1e4)

    with pytest.raises(InputError, match=r"the loss is [0-9.e+]+ at step 1 of epoch 2: training"):
        run(trainer, checkpoints, on_epoch=spoil)
    assert len(Checkpoints(tmp_path, "a", True).epochs) == 1


# Checkpoints.


def test_weights_that_are_no_numbers_take_no_good_checkpoints_place(
    trainer: LossModel, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, "a", True)
    checkpoints.save(trainer, epoch=epoch(1))
    trainer.network.head_bias.assign(np.full(WORDS, np.nan))
    with pytest.raises(InputError, match="no longer finite after step 5 of epoch 2"):
        checkpoints.save(trainer, step=5)
    assert (checkpoints.step, len(checkpoints.epochs)) == (0, 1)
    assert names(tmp_path) == {"state.json", "after_00001_00000000.npz"}


def test_a_finished_training_is_kept_until_it_is_recorded(
    trainer: LossModel, tmp_path: Path
) -> None:
    before = Checkpoints(tmp_path, "a", True)
    before.save(trainer, step=STEPS)
    before.save(trainer, epoch=epoch(1))
    before.finish("the outcome")
    assert names(tmp_path) == {"state.json", "after_00001_00000000.npz"}
    # DVC was killed before it recorded the outputs: they are made again, of the same training.
    again = Checkpoints(tmp_path, "a", True, recorded="another")
    assert (again.train_id, again.epochs) == (before.train_id, [epoch(1)])
    again.finish("the outcome")
    assert Checkpoints(tmp_path, "a", True, recorded="the outcome").epochs == []


def epoch(number: int, val_loss: float | None = None) -> Epoch:
    row: dict[str, float] = {"epoch": number, "loss": 1 / 3}
    return Epoch(row if val_loss is None else {**row, "val_loss": val_loss}, {"epoch": number}, [])


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_checkpoint_brings_everything_back(trainer: LossModel, tmp_path: Path) -> None:
    before = state(trainer)
    Checkpoints(tmp_path, "a", True).save(trainer, epoch=epoch(1))
    loaded = Checkpoints(tmp_path, "a", True)
    restore(trainer, [value + 1 for value in before])
    loaded.load(trainer)
    for found, value in zip(state(trainer), before, strict=True):
        np.testing.assert_array_equal(found, value)
    assert loaded.epochs == [epoch(1)]


def test_the_last_two_and_the_best_epoch_stay(trainer: LossModel, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "a", True)
    checkpoints.save(trainer, epoch=epoch(1, 1))
    checkpoints.save(trainer, epoch=epoch(2, 2))
    for step in (10, 20):
        checkpoints.save(trainer, step=step)
    assert names(tmp_path) == {
        "state.json",
        "after_00001_00000000.npz",
        "after_00002_00000010.npz",
        "after_00002_00000020.npz",
    }


@pytest.mark.parametrize(("identity", "resume"), [("b", True), ("a", False)])
def test_another_training_starts_afresh(
    trainer: LossModel, tmp_path: Path, identity: str, resume: bool
) -> None:
    before = Checkpoints(tmp_path, "a", True)
    before.save(trainer, epoch=epoch(1))
    after = Checkpoints(tmp_path, identity, resume)
    assert after.epochs == [] and after.train_id != before.train_id
    assert names(tmp_path) == {"state.json"}
    assert Checkpoints(tmp_path, identity, True).train_id == after.train_id


def test_what_an_interrupted_write_left_is_cleared_away(trainer: LossModel, tmp_path: Path) -> None:
    before = Checkpoints(tmp_path, "a", True)
    before.save(trainer, epoch=epoch(1))
    (tmp_path / "variables.123.tmp").write_bytes(b"half")
    (tmp_path / "after_00002_00000000.npz").write_bytes(b"written, but not counted in")
    after = Checkpoints(tmp_path, "a", True)
    assert after.epochs == [epoch(1)]
    assert names(tmp_path) == {"state.json", "after_00001_00000000.npz"}


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_of_a_spoilt_checkpoint_the_one_before_is_used(trainer: LossModel, tmp_path: Path) -> None:
    before = Checkpoints(tmp_path, "a", True)
    before.save(trainer, epoch=epoch(1))
    before.save(trainer, step=5)
    before.save(trainer, epoch=epoch(2))
    spoil(tmp_path / "after_00002_00000000.npz")
    after = Checkpoints(tmp_path, "a", True)
    assert (after.epochs, after.step, after.train_id) == ([epoch(1)], 5, before.train_id)
    spoil(tmp_path / "after_00001_00000005.npz")
    (tmp_path / "state.json").write_text((tmp_path / "state.json").read_text()[:-9])
    assert Checkpoints(tmp_path, "a", True).epochs == []


def test_a_best_epoch_that_was_spoilt_is_an_error(trainer: LossModel, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "a", True)
    for number, val_loss in enumerate((1, 2, 3), start=1):
        checkpoints.save(trainer, epoch=epoch(number, val_loss))
    spoil(tmp_path / "after_00001_00000000.npz")
    with pytest.raises(InputError, match=r"epoch 1 .* altered"):
        checkpoints.load(trainer, 1)


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ("fpu avx512_bf16 sse", "mixed_bfloat16"),
        ("amx_bf16", "mixed_bfloat16"),
        ("avx2", "float32"),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_has_it(
    tmp_path: Path, flags: str, policy: str
) -> None:
    if keras.backend.backend() != "tensorflow":
        policy = "float32"
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    assert fit.choose_dtype_policy(tmp_path / "cpuinfo") == policy
    assert fit.choose_dtype_policy(tmp_path / "absent") == "float32"

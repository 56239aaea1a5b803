"""The training loop: the fused loss as Keras fits it, and epochs that can be resumed."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from minigpt.common import progress
from minigpt.config import TrainConfig
from minigpt.data.tokenizer import PADDING, UNKNOWN
from minigpt.model import head
from minigpt.model.loss import perplexity
from minigpt.model.network import MiniGPT
from minigpt.training import parallel
from minigpt.training.checkpoints import (
    DIVERGED,
    Checkpoints,
    DivergedError,
    Epoch,
    LoggedStep,
    best_epoch,
)

log = logging.getLogger(__name__)

EXPLODED = 100.0  # nats per token; a guess among ten million tokens costs 16


class LossModel(keras.Model):
    """Wraps the network with the fused loss, for Keras's `fit` and `evaluate`.

    Each metric is a sum over tokens divided once, never an average of averages: `loss` is nats per
    real token, `seed_loss` the published mean over all positions, padding included, and
    `unk_share` the share of [UNK] among the real targets.

    Args:
        network: The model to train.
        padded: Whether to train the published loss instead of the mean over real tokens.
        batch_size: Sequences in a step, on one device.
        padding: The id of targets that are not real; None: all are.
        unknown: The id of [UNK]; None: there is none.
        separator: The id of targets that end a review; None: there are none. If there are,
            `text_loss` is the `loss` of an evaluation without them.
    """

    def __init__(
        self,
        network: MiniGPT,
        padded: bool,
        batch_size: int = 128,
        padding: int | None = PADDING,
        unknown: int | None = UNKNOWN,
        separator: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, self.padding, self.unknown = batch_size, padding, unknown
        self.separator = separator
        self.network = network
        self.padded = padded
        names = ["loss", "seed_loss", "unk_share"]
        if separator is not None:
            names.append("text_loss")
        self.trackers = {name: keras.metrics.Mean(name=name) for name in names}

    def call(self, tokens: Any, training: bool | None = None) -> Any:
        """Returns the hidden states (B, T, C) of token ids (B, T)."""
        return self.network.hidden(tokens, training=training)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Returns the trained mean of a batch; Keras's train and test steps call it.

        A weight of 0 leaves out a row that fills up a batch, from every sum.
        """
        real = 1 - _are(y, self.padding)
        every, positions = ops.ones_like(real), ops.cast(ops.size(y), "float32")
        if sample_weight is not None:
            every = every * ops.expand_dims(sample_weight, 1)
            real, positions = real * every, ops.sum(every)
        tokens = ops.sum(real)
        counted = ops.maximum(tokens, 1.0)
        trained, observed = real / counted, every / positions
        if self.padded:
            trained, observed = observed, trained
        projection = self.network.head
        if training:
            weights = trained, observed
            sums = head.weighted_losses(y_pred, projection, y, *weights, self.batch_size)
        else:
            losses, _ = head.token_losses(y_pred, projection, y)
            sums = ops.stack([ops.sum(losses * trained), ops.sum(losses * observed)])
            if self.separator is not None:
                text = real * (1 - _are(y, self.separator))
                self.trackers["text_loss"].update_state(losses, sample_weight=text)
        loss, seed_loss = (sums[1], sums[0]) if self.padded else (sums[0], sums[1])
        unknown = ops.sum(_are(y, self.unknown) * every)
        self.trackers["loss"].update_state(loss, sample_weight=tokens)
        self.trackers["seed_loss"].update_state(seed_loss, sample_weight=positions)
        self.trackers["unk_share"].update_state(unknown / counted, sample_weight=tokens)
        return sums[0]

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The metrics of a step, in place of Keras's own mean over batches."""
        return list(self.trackers.values())


def _are(tokens: Any, which: int | None) -> Any:
    return ops.cast(ops.equal(tokens, -1 if which is None else which), "float32")


class Stop:
    """A signal handler that stops a training at its next step, with a checkpoint.

    Outside the steps, and the second time, it interrupts at once. Keras drops an interrupt that
    arrives while it converts logs; then the training stops after the step or the epoch.

    Attributes:
        asked: Whether a signal has arrived.
        stepping: Whether the training is within the steps of an epoch.
    """

    def __init__(self) -> None:
        self.asked = self.stepping = False

    def __call__(self, signum: int, frame: Any) -> None:
        """Handles the signal."""
        again, self.asked = self.asked, True
        if again or not self.stepping:
            raise KeyboardInterrupt


class _Steps(keras.callbacks.Callback):
    """Saves checkpoints and logs losses within an epoch, and stops a training that diverges.

    Without Keras's progress bar, it also writes a line now and then.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        epoch: int,
        steps: int,
        checkpoint_steps: int,
        log_steps: int,
        seed: int,
        stop: Stop,
        world: parallel.World,
        verbose: int,
    ) -> None:
        super().__init__()
        self.world = world
        self.lines = world.is_main and not verbose
        self.written = time.monotonic()
        self.checkpoints, self.epoch, self.steps = checkpoints, epoch, steps
        self.checkpoint_steps, self.log_steps = checkpoint_steps, log_steps
        self.seed, self.stop = seed, stop
        self.before = checkpoints.step

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.before:  # Keras has just reset the metrics
            self.checkpoints.load(self.model)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if keras.backend.backend() == "torch":  # dropout draws from PyTorch's own generator
            step = self.before + batch + self.epoch * self.steps
            keras.utils.set_random_seed((self.seed + step) % 2**32)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = self.before + batch + 1
        self.stop.stepping = True  # the first step, which compiles, can be interrupted at once
        loss = float((logs or {})["loss"])
        if not loss < EXPLODED:  # true for NaN as well
            raise DivergedError(
                f"the loss is {loss:g} at step {step} of epoch {self.epoch}: {DIVERGED}"
            )
        if self.lines and time.monotonic() - self.written >= progress.LOG_EVERY_S:
            self.written = time.monotonic()
            log.info("epoch %s, step %s of %s: loss %.4f", self.epoch, step, self.steps, loss)
        is_last, asked = step == self.steps, self.world.any(self.stop.asked)
        due = is_last or step % self.log_steps == 0
        save = is_last or step % self.checkpoint_steps == 0 or asked
        if (due or save) and keras.backend.backend() == "jax":
            self.model.jax_state_sync()  # the variables still have the values of the epoch's begin
        if due:
            self._log(step)
        if save:
            self.checkpoints.save(self.model, step=step)
        if asked:
            raise KeyboardInterrupt

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.stop.stepping = False

    def _log(self, step: int) -> None:
        mean = self.model.trackers["loss"]
        total, tokens = float(mean.total), float(mean.count)
        logged = self.checkpoints.logged
        before = logged[-1] if logged and logged[-1].epoch == self.epoch else None
        since = total - (before.total if before else 0.0)
        counted = tokens - (before.tokens if before else 0.0)
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        logged.append(LoggedStep(self.epoch, step, since / max(counted, 1), rate, total, tokens))


def fit(
    model: LossModel,
    batches: Callable[[int, int], Any],
    validation: Any | None,
    checkpoints: Checkpoints,
    config: TrainConfig,
    *,
    steps: int,
    tokens: int,
    bits_per_byte: Callable[[float], float | None],
    checkpoint_steps: int,
    log_steps: int,
    write_texts: Callable[[], list[dict[str, Any]]],
    on_epoch: Callable[[], None],
    stop: Stop,
    world: parallel.World = parallel.SINGLE,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int = 0,
) -> None:
    """Trains epoch by epoch; the results are in `checkpoints`.

    Args:
        model: The compiled model; it holds the kept weights afterwards.
        batches: Returns the training data of an epoch, counted from 0, from a step on.
        validation: Held-out data; None if nothing is held out.
        checkpoints: Where to resume from, and where epochs and logged steps are added.
        config: The section `train`.
        steps: Steps of each epoch.
        tokens: Real targets in the training data, for the speed.
        bits_per_byte: Returns the bits per byte of the held-out text for its loss, separators left
            out; None if the held-out data don't cover it.
        checkpoint_steps: Steps from one checkpoint to the next.
        log_steps: Steps from one logged loss to the next.
        write_texts: Called after each epoch; its texts are kept with the epoch.
        on_epoch: Called after each epoch.
        stop: Stops the training, in all processes.
        world: The processes that train together. Each calls this with its own rows of the same
            data, and reaches the same results.
        callbacks: For Keras's `fit`.
        verbose: For Keras's `fit`; 0 also logs a line now and then.

    Raises:
        DivergedError: The training has diverged.
        InputError: The disk is full.
        KeyboardInterrupt: The training was stopped.
    """
    model.optimizer.build(model.trainable_variables)  # so that a checkpoint finds its variables
    done = checkpoints.epochs
    if done or checkpoints.step:
        checkpoints.load(model)
    while len(done) < config.epochs and not _stops(done, config.early_stopping):
        number, left = len(done) + 1, steps - checkpoints.step
        keras.utils.set_random_seed(config.seed + number)  # the same whether resumed or not
        began = time.perf_counter()
        if left:
            within = _Steps(
                checkpoints,
                number,
                steps,
                checkpoint_steps,
                log_steps,
                config.seed,
                stop,
                world,
                verbose,
            )
            model.fit(
                batches(number - 1, checkpoints.step),  # already shuffled
                verbose=verbose,
                shuffle=False,
                callbacks=[within, *callbacks],
            )
        seconds = time.perf_counter() - began
        timing = {
            "epoch": number,
            "finished_ms": time.time_ns() // 1_000_000,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens * left / steps / seconds, 1),
        }
        row = _row(model, number, validation, bits_per_byte)
        texts = [{"epoch": number, **text} for text in write_texts()]
        checkpoints.save(model, epoch=Epoch(row, timing, texts))
        on_epoch()
        if world.any(stop.asked):
            raise KeyboardInterrupt
    if config.keep == "best" and best_epoch(done) < len(done):
        checkpoints.load(model, best_epoch(done))


def _row(
    model: LossModel,
    epoch: int,
    validation: Any | None,
    bits_per_byte: Callable[[float], float | None],
) -> dict[str, float]:
    """The losses of an epoch that has just ended."""
    losses = {metric.name: float(metric.result()) for metric in model.metrics}
    row = {"epoch": epoch, "loss": losses["loss"], "seed_loss": losses["seed_loss"]}
    row["learning_rate"] = float(ops.convert_to_numpy(model.optimizer.learning_rate))
    if validation is not None:
        results = model.evaluate(validation, return_dict=True, verbose=0)
        held_out = {name: float(result) for name, result in results.items()}
        row["val_loss"], row["val_seed_loss"] = held_out["loss"], held_out["seed_loss"]
        if (bits := bits_per_byte(held_out.get("text_loss", held_out["loss"]))) is not None:
            row["val_bits_per_byte"] = bits
        row["val_perplexity"] = perplexity(held_out["loss"])
        row["val_unk_share"] = held_out["unk_share"]
    return row


def _stops(done: Sequence[Epoch], early_stopping: int) -> bool:
    return bool(early_stopping and done) and len(done) - best_epoch(done) >= early_stopping

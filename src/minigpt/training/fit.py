"""Training: the loss as Keras fits it, the optimizer, and epochs that can be resumed."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
from keras import ops

from minigpt.common.errors import InputError
from minigpt.data.tokenizer import PADDING, UNKNOWN
from minigpt.model import loss as cross_entropy
from minigpt.model.network import MiniGPT
from minigpt.training.checkpoints import Checkpoints, Epoch, best_epoch

EXPLODED = 100.0  # nats per token; to guess among ten million words costs 16
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}  # of /proc/cpuinfo


def choose_dtype_policy(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The faster dtype policy for this machine, as far as it was measured (benchmarks/README.md).

    Args:
        cpuinfo: Linux's description of the processor; another system has none.

    Returns:
        "mixed_bfloat16" for the TensorFlow backend on a processor that multiplies in bfloat16,
        else "float32".
    """
    if keras.backend.backend() != "tensorflow" or not cpuinfo.exists():
        return "float32"
    flags = set(cpuinfo.read_text().split())
    return "mixed_bfloat16" if flags & BFLOAT16_FLAGS else "float32"


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
            losses, _ = cross_entropy.token_losses(y_pred, kernel, bias, y)
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


class Stop:
    """Asked for by a signal: a training stops at its next step, with a checkpoint.

    To be installed by `signal.signal`.  Outside of the steps, and the second time, it interrupts
    at once.
    """

    def __init__(self) -> None:
        self.asked = self.stepping = False

    def __call__(self, signum: int, frame: Any) -> None:
        """Handles the signal."""
        if self.asked or not self.stepping:
            raise KeyboardInterrupt
        self.asked = True


class _Steps(keras.callbacks.Callback):
    """Checkpoints within an epoch, and an end to what goes wrong."""

    def __init__(
        self, checkpoints: Checkpoints, epoch: int, steps: int, every: int, seed: int, stop: Stop
    ) -> None:
        super().__init__()
        self.checkpoints, self.epoch, self.steps = checkpoints, epoch, steps
        self.every, self.seed, self.stop = every, seed, stop
        self.before = checkpoints.step

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.before:  # Keras has just reset the sums
            self.checkpoints.load(self.model)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if keras.backend.backend() == "torch":  # its dropout draws from PyTorch's own generator
            step = self.before + batch + self.epoch * self.steps
            keras.utils.set_random_seed((self.seed + step) % 2**32)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = self.before + batch + 1
        self.stop.stepping = True  # the first, which compiles, can be interrupted at once
        loss = float((logs or {})["loss"])
        if not loss < EXPLODED:  # nor is it where it is NaN
            raise InputError(
                f"the loss is {loss:g} at step {step} of epoch {self.epoch}: training has "
                "diverged; lower train.learning_rate, or set train.clip_norm"
            )
        if step % self.every == 0 or step == self.steps or self.stop.asked:
            if keras.backend.backend() == "jax":
                self.model.jax_state_sync()  # else the variables are as at the epoch's begin
            self.checkpoints.save(self.model, step=step)
        if self.stop.asked:
            raise KeyboardInterrupt

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.stop.stepping = False


def fit(
    model: LossModel,
    batches: Callable[[int, int], Any],
    validation: Any | None,
    checkpoints: Checkpoints,
    *,
    epochs: int,
    steps: int,
    tokens: int,
    seed: int,
    checkpoint_steps: int,
    early_stopping: int,
    keep_best: bool,
    write_texts: Callable[[], list[dict[str, Any]]],
    on_epoch: Callable[[Epoch], None],
    stop: Stop,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int = 0,
) -> list[Epoch]:
    """Trains epoch by epoch, with checkpoints that it goes on from.

    Args:
        model: compiled; holds the kept weights afterwards.
        batches: the training data of an epoch, counted from 0, from a step on.
        validation: held-out data; None: nothing is held out.
        checkpoints: where it goes on from, and what it adds to.
        epochs: at most.
        steps: of each epoch.
        tokens: real targets in the training data, for the speed.
        seed: of what the backend draws outside Keras's own generators (PyTorch's dropout).
        checkpoint_steps: steps from one checkpoint to the next.
        early_stopping: epochs without a better val_loss before it stops; 0: never.
        keep_best: whether the weights of the best val_loss are kept, instead of the last.
        write_texts: called after each epoch.
        on_epoch: told each epoch as it ends.
        stop: asks it to stop.
        callbacks: for Keras's `fit`.
        verbose: likewise.

    Returns:
        All epochs, those of before an interruption included.

    Raises:
        InputError: the loss has exploded or is no longer a number, or the disk is full.
        KeyboardInterrupt: it was asked to stop.
    """
    model.optimizer.build(model.trainable_variables)  # so that a checkpoint finds its variables
    done = checkpoints.epochs
    if done or checkpoints.step:
        checkpoints.load(model)
    while len(done) < epochs and not _stops(done, early_stopping):
        number, left = len(done) + 1, steps - checkpoints.step
        keras.utils.set_random_seed(seed + number)  # the same whether resumed or not
        began = time.perf_counter()
        if left:
            checkpointing = _Steps(checkpoints, number, steps, checkpoint_steps, seed, stop)
            model.fit(
                batches(number - 1, checkpoints.step),  # in an order of its own
                verbose=verbose,
                shuffle=False,
                callbacks=[checkpointing, *callbacks],
            )
        seconds = time.perf_counter() - began
        losses = {metric.name: float(metric.result()) for metric in model.metrics}
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
            "tokens_per_s": round(tokens * left / steps / seconds, 1),
        }
        texts = [{"epoch": number, **text} for text in write_texts()]
        checkpoints.save(model, epoch=Epoch(row, timing, texts))
        on_epoch(done[-1])
    if keep_best and best_epoch(done) < len(done):
        checkpoints.load(model, best_epoch(done))
    return done


def _stops(done: Sequence[Epoch], early_stopping: int) -> bool:
    return bool(early_stopping and done) and len(done) - best_epoch(done) >= early_stopping

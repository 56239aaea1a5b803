"""data/sequences/ -> model/, and what happened on the way."""

import csv
import hashlib
import io
import json
import logging
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import tensorflow

from minigpt import config
from minigpt.common import backend, files, paths, progress
from minigpt.common.errors import InputError
from minigpt.data import sequences, tokenizer
from minigpt.generation.decoding import Generator, Sampling
from minigpt.model import directory, network
from minigpt.stages import guard
from minigpt.tracking.mirror import Tracker
from minigpt.training import fit
from minigpt.training.checkpoints import Checkpoints, Epoch, best_epoch

log = logging.getLogger(__name__)

# The part of the configuration that made the model; what comes after it may change without it.
MODEL_SECTIONS = ("vocabulary", "sequences", "model", "train")


def run() -> None:
    """Trains, or goes on from the last checkpoint, and writes the model directory."""
    everything = config.load(paths.RESOLVED)
    settings = everything.train
    words = tokenizer.load(paths.VOCABULARY)
    manifest = sequences.verify(paths.SEQUENCES, words.sha256)
    split = manifest["splits"]["train"]

    if not settings.jit_compile:  # which TensorFlow would silently switch off
        tensorflow.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(settings.seed)
    network = _network(everything.model, len(words))
    trainer = fit.LossModel(network, padded=settings.loss == "padded")
    steps = -(-split["sequences"] // settings.batch_size)
    trainer.compile(
        optimizer=fit.make_optimizer(
            settings.optimizer,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            decay=settings.decay,
            total_steps=settings.epochs * steps,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        ),
        jit_compile=settings.jit_compile,
    )
    validation = None
    if manifest["splits"]["validation"]["shards"]:
        validation = sequences.dataset(
            paths.SEQUENCES, "validation", settings.batch_size, seed=None
        )

    identity = _identity(everything, manifest, network.dtype_policy.name)
    _, recorded = guard.recorded().get(paths.RUN.as_posix(), ("", ""))
    checkpoints = Checkpoints(paths.CHECKPOINTS, identity, settings.resume, recorded)
    if checkpoints.epochs or checkpoints.step:
        log.info("going on after epoch %s, step %s", len(checkpoints.epochs), checkpoints.step)
    plain = config.as_dict(everything)
    tracker = Tracker(checkpoints.train_id, plain, Path.cwd())
    run_settings = _run_settings(network)
    tracker.settings(run_settings)
    for epoch in checkpoints.epochs:  # what the interrupted run may not have come to log
        tracker.epoch(*epoch)
    preview = asdict(settings.preview)
    prompts = preview.pop("prompts")
    write = Generator(network, words, everything.vocabulary.style)

    def write_texts() -> list[dict[str, Any]]:
        texts = write(prompts, Sampling(**preview))
        return [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]

    def report(epoch: Epoch) -> None:
        figures = {**epoch.row, "tokens_per_s": epoch.timing["tokens_per_s"]}
        told = ", ".join(f"{name} {figure:.5g}" for name, figure in figures.items())
        log.info("%s", told)  # "epoch 1, loss 5.2076, ..."
        for text in epoch.texts:
            log.info("  %s", text["text"])
        tracker.epoch(epoch.row, epoch.timing, epoch.texts)

    def data(epoch: int, skip: int) -> Any:
        order = {"seed": settings.seed, "epoch": epoch, "skip": skip}
        return sequences.dataset(paths.SEQUENCES, "train", settings.batch_size, **order)

    stop = fit.Stop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    try:
        done = fit.fit(
            trainer,
            data,
            validation,
            checkpoints,
            epochs=settings.epochs,
            steps=steps,
            tokens=split["targets"],
            seed=settings.seed,
            checkpoint_steps=settings.checkpoint_steps,
            early_stopping=settings.early_stopping,
            keep_best=settings.keep == "best",
            write_texts=write_texts,
            on_epoch=report,
            stop=stop,
            callbacks=[] if sys.stderr.isatty() else [_Lines(steps)],
            verbose=1 if sys.stderr.isatty() else 0,
        )
    except BaseException as error:
        at = f"after epoch {len(checkpoints.epochs)}, step {checkpoints.step}"
        log.info("stopped; the last checkpoint is %s, and `dvc repro` goes on from there", at)
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        if not isinstance(error, KeyboardInterrupt | InputError):
            sequences.verify(paths.SEQUENCES)  # a shard that was altered meanwhile explains it
        raise
    directory.save(paths.MODEL, network, words, {name: plain[name] for name in MODEL_SECTIONS})
    _write_reports(done, checkpoints.train_id, run_settings, settings.keep == "best")
    tracker.files(paths.REPORTS)
    tracker.finish()
    # Not removed: if DVC is killed before it has recorded the outputs, it runs this stage again.
    checkpoints.finish(hashlib.md5(paths.RUN.read_bytes()).hexdigest())


def _network(settings: config.ModelConfig, words: int) -> network.MiniGPT:
    policy = settings.dtype_policy
    if policy == "auto":
        policy = fit.choose_dtype_policy()
    return network.MiniGPT(
        settings.vocabulary_size or words,
        settings.context_length,
        settings.embed_dim,
        settings.num_blocks,
        settings.num_heads,
        settings.key_dim,
        settings.feed_forward_dim,
        settings.dropout,
        settings.tied_embeddings,
        dtype=policy,
        name="minigpt",
    )


def _identity(everything: config.Config, manifest: dict[str, Any], policy: str) -> str:
    """What a checkpoint depends on: another configuration, data or version starts afresh."""
    parts = [asdict(everything.model), asdict(everything.train), manifest, keras.__version__]
    parts += [keras.backend.backend(), policy]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _run_settings(network: network.MiniGPT) -> dict[str, Any]:
    """What was trained on what, for the run's parameters."""
    return {
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "onednn": os.environ.get(backend.ONEDNN, "as TensorFlow chooses"),
        "cpus": len(os.sched_getaffinity(0)),
        "dtype_policy": network.dtype_policy.name,
        "parameters": network.count_params(),
    }


def _write_reports(
    done: list[Epoch], train_id: str, settings: dict[str, Any], keep_best: bool
) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(done[0].row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(epoch.row for epoch in done)
    files.write_text(paths.LOSSES, table.getvalue())
    kept = done[best_epoch(done) - 1] if keep_best else done[-1]
    metrics = {**kept.row, "epochs": len(done)}
    files.write_json(paths.TRAIN_METRICS, metrics)
    files.write_json_lines(paths.EPOCH_TEXTS, (text for epoch in done for text in epoch.texts))
    timings = [epoch.timing for epoch in done]
    files.write_json(paths.RUN, {"train_id": train_id, "settings": settings, "epochs": timings})


class _Lines(keras.callbacks.Callback):
    """A line now and then, where no terminal shows Keras's progress bar."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.logged = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if time.monotonic() - self.logged >= progress.LOG_EVERY_S:
            self.logged = time.monotonic()
            log.info("step %s of %s: loss %.4f", batch + 1, self.steps, (logs or {})["loss"])

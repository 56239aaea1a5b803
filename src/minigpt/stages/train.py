"""Trains the model: data/sequences/ and data/tokenizer/ -> model/ and the reports of a training."""

import functools
import hashlib
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import keras
import tensorflow  # noqa: F401 - for tf.data; imported here, while the stage runner silences it
import yaml

from minigpt import config
from minigpt.common import paths, progress
from minigpt.common.errors import InputError
from minigpt.data import sequences
from minigpt.data import tokenizer as tokenizers
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine import cluster
from minigpt.generation import prompts
from minigpt.generation.decoding import Generator
from minigpt.model import directory
from minigpt.tracking import gate, origin
from minigpt.tracking.mirror import Mirror
from minigpt.training import fit, launch, parallel, record, setup
from minigpt.training.checkpoints import Checkpoints, DivergedError

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "minigpt.stages", "train")
LOGS = Path(".dvc/tmp")  # of the processes that engine.workers starts


def run() -> None:
    """Trains in this process, or in those that Ray, a launcher or `engine.workers` starts."""
    place, engine = parallel.named(), config.load(paths.RESOLVED).engine
    if engine.kind == "ray":
        with cluster.connected(engine):
            from minigpt.engine import train  # it imports Ray, which is an extra

            train.run(engine, work_for_ray, _checkpoints)
    elif place is None and engine.workers > 1:
        with launch.launched(engine.workers, COMMAND, LOGS) as world:
            work(world)
    else:
        with parallel.joined(place) as world:
            work(world)


def work_for_ray(place: parallel.Place | None, asked: threading.Event) -> None:
    """Trains as one of Ray's workers, which are no main thread and get no signals."""
    stop = fit.Stop()

    def listen() -> None:
        asked.wait()
        stop.asked = True

    threading.Thread(target=listen, daemon=True).start()
    world = parallel.join(place)
    try:
        work(world, stop)
    except (KeyboardInterrupt, DivergedError):
        # All workers raise these at the same step. Once one of them has failed, Ray kills the
        # others within seconds, and the first one is still ending its MLflow run.
        if world.is_main:
            raise


def work(world: parallel.World, stop: fit.Stop | None = None) -> None:
    """Trains, or resumes from the last checkpoint; the first process writes the model directory.

    Each process of a training calls this in the project's folder, after `parallel.join`.

    Args:
        world: The processes that train together.
        stop: Stops the training; None: SIGINT and SIGTERM do.
    """
    settings = config.load(paths.RESOLVED)
    tokenizer = tokenizers.load(paths.TOKENIZER)
    asked = {
        name: prompts.known(tokenizer, getattr(settings, name).prompts, f"{name}.prompts")
        for name in ("preview", "evaluate", "sample")
    }
    bar = functools.partial(progress.bar, "train: fetched", "shards")
    manifest = sequences.verify(paths.SEQUENCES, tokenizer, world.rank, world.processes, bar)
    made_with = _made_with(settings, tokenizer, manifest)
    if world.is_main:
        _warn_of_unknown_words(made_with, tokenizer, manifest["splits"]["validation"])
    split = manifest["splits"]["train"]
    steps = -(-split["sequences"] // settings.train.batch_size)

    network = setup.make_network(settings, len(tokenizer))
    writer = network
    if world.devices > 1:
        with parallel.alone():
            writer = setup.make_network(settings, len(tokenizer))
    generator = Generator(writer, tokenizer)
    for texts in asked.values():  # the later stages' prompts: better now than after hours
        generator.check(prompts.encode(tokenizer, texts))
    trainer = setup.make_trainer(network, tokenizer, settings.train, steps, world.devices)
    training = record.identity(network, settings.train, manifest, _code())
    checkpoints = world.main_first(
        lambda: Checkpoints(
            paths.CHECKPOINTS,
            training,
            settings.checkpointing.resume,
            _recorded_run(),
            writes=world.is_main,
        )
    )
    world.agree(f"{training} {len(checkpoints.epochs)} {checkpoints.step}")
    if checkpoints.epochs or checkpoints.step:
        log.info("resuming after epoch %s, step %s", len(checkpoints.epochs), checkpoints.step)
    facts = {
        "train_id": checkpoints.train_id,
        "training": training,
        "settings": record.facts(network, world),
    }
    mirror = Mirror(Path.cwd(), settings)

    def write_texts() -> list[dict[str, Any]]:
        if not world.is_main:
            return []
        if writer is not network:
            for copy, weight in zip(writer.weights, network.weights, strict=True):
                copy.assign(keras.ops.convert_to_numpy(weight))
        texts = generator.continued(asked["preview"], settings.preview)
        return [
            {"prompt": prompt, "text": text, "ended": ended}
            for prompt, (text, ended) in zip(asked["preview"], texts, strict=True)
        ]

    def report() -> None:
        if world.is_main:
            record.write(checkpoints, facts, steps)
            mirror.send()

    def on_epoch() -> None:
        epoch = checkpoints.epochs[-1]
        figures = {**epoch.row, "tokens_per_s": epoch.timing["tokens_per_s"]}
        log.info("%s", ", ".join(f"{name} {figure:.5g}" for name, figure in figures.items()))
        for text in epoch.texts:
            log.info("  %s", text["text"])
        report()

    def batches(epoch: int, skip: int) -> Any:
        order = {"seed": settings.train.seed, "epoch": epoch, "skip": skip}
        return sequences.dataset(
            paths.SEQUENCES, "train", settings.train.batch_size, **order, **world._asdict()
        )

    validation = None
    if manifest["splits"]["validation"]["shards"]:
        validation = sequences.dataset(
            paths.SEQUENCES,
            "validation",
            settings.train.batch_size,
            seed=None,
            **world._asdict(),
        )
    if stop is None:
        stop = fit.Stop()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
    try:
        report()
        fit.fit(
            trainer,
            batches,
            validation,
            checkpoints,
            settings.train,
            steps=steps,
            tokens=split["targets"],
            bits_per_byte=functools.partial(sequences.bits_per_byte, manifest),
            checkpoint_steps=settings.checkpointing.steps,
            log_steps=settings.logging.steps,
            write_texts=write_texts,
            on_epoch=on_epoch,
            stop=stop,
            world=world,
            verbose=1 if world.is_main and sys.stderr.isatty() else 0,
        )
        if world.is_main:
            plain = made_with.model_dump(mode="json")
            sections = {name: plain[name] for name in ("vocabulary", "sequences", "train")}
            directory.save(paths.MODEL, network, tokenizer, sections)
            record.write_metrics(checkpoints, training, settings.train.keep)
            facts["model"] = directory.digest(paths.MODEL)
            report()
            mirror.finish()
    except BaseException as error:
        has_checkpoint = checkpoints.epochs or checkpoints.step
        if has_checkpoint and not isinstance(error, DivergedError):  # it would diverge again
            at = f"after epoch {len(checkpoints.epochs)}, step {checkpoints.step}"
            log.info("stopped; the last checkpoint is %s, and %s", at, _way_on(Path.cwd()))
        # Of several processes that are interrupted, one may find that another has ended already.
        interrupted = stop.asked and parallel.is_lost(error)
        killed = interrupted or isinstance(error, KeyboardInterrupt)
        if world.is_main:
            mirror.finish("KILLED" if killed else "FAILED")
        if interrupted:
            raise KeyboardInterrupt from error
        if not isinstance(error, KeyboardInterrupt | InputError):
            sequences.verify(paths.SEQUENCES)  # a shard that was altered meanwhile explains it
        raise
    if world.is_main:
        # If DVC is killed before it has recorded the outputs, it runs this stage again.
        checkpoints.finish(_md5(paths.RUN))


def _checkpoints() -> list[str]:
    return sorted(path.name for path in paths.CHECKPOINTS.glob("*.npz"))


def _made_with(
    settings: config.Config, tokenizer: Tokenizer, manifest: dict[str, Any]
) -> config.Config:
    """The configuration with the sections that the tokenizer and the sequences were made with.

    They are older than resolved.yaml if `vocab` or `sequences` is frozen.
    """
    made_with = origin.find(Path.cwd(), settings, None).config
    try:  # do they still fit the network and the training?
        config.validate(config.Config, made_with.model_dump(mode="json"))
    except InputError as error:
        raise InputError(
            f"{error} (as {paths.TOKENIZER} and {paths.SEQUENCES} were made; a frozen stage does "
            "not follow resolved.yaml: `dvc unfreeze vocab sequences`, then `dvc repro`)"
        ) from None
    keys = set(config.VocabularyConfig.model_fields) & set(tokenizer.settings)
    found = {f"vocabulary.{key}": tokenizer.settings[key] for key in keys}
    found |= {f"sequences.{key}": manifest[key] for key in ("length", "policy")}
    found["sequences.validation_fraction"] = manifest["validation_fraction"]
    for key, value in found.items():
        section, _, name = key.partition(".")
        expected = getattr(getattr(made_with, section), name)
        if value != expected:
            folder = paths.TOKENIZER if section == "vocabulary" else paths.SEQUENCES
            raise InputError(
                f"{folder} was made with {key}={value}, but resolved.yaml says {expected}: run "
                "`dvc repro`"
            )
    return made_with


def _warn_of_unknown_words(
    made_with: config.Config, tokenizer: Tokenizer, split: dict[str, Any]
) -> None:
    """Says before the training what the gate would say after it."""
    share = split["unknown_targets"] / max(split["targets"], 1)
    if found := gate.broken({"unk_share": share}, made_with.gate.model_dump()):
        log.warning(
            "the gate will refuse this model for the unknown words of the held-out texts: %s; %s",
            gate.explain(found),
            gate.way_on(found, is_full=len(tokenizer) >= made_with.vocabulary.max_tokens),
        )


def _way_on(folder: Path) -> str:
    """What becomes of the checkpoints of a training that was stopped in a folder."""
    if paths.is_copy(folder):
        return "it goes with this copy of the project: another `dvc exp run` trains from the start"
    return "`dvc repro` resumes from it"


def _code() -> list[Path]:
    """The code that decides the weights: the stage's dependencies."""
    deps = _yaml(Path("dvc.yaml"))["stages"]["train"]["deps"]
    return [path for path in map(Path, deps) if path.parts[0] == "src"]


def _recorded_run() -> str:
    """The md5 of reports/run.json in dvc.lock: of the training that DVC recorded last."""
    outs = _yaml(Path("dvc.lock")).get("stages", {}).get("train", {}).get("outs", [])
    return next((out["md5"] for out in outs if out["path"] == paths.RUN.as_posix()), "")


def _yaml(path: Path) -> dict[str, Any]:
    return (yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None) or {}


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()

"""Registers the model: model/ and its evaluation -> a version in MLflow's registry and the gate."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt import config
from minigpt.common import files, paths, progress
from minigpt.common.errors import InputError
from minigpt.data import corpus, subsampling
from minigpt.evaluation import charges, held_out
from minigpt.model import directory
from minigpt.tracking import card, gate, registry
from minigpt.tracking.mirror import Mirror

log = logging.getLogger(__name__)


def run() -> None:
    """Registers the model unless it breaks a limit, and decides whether it is the champion."""
    settings = config.load(paths.RESOLVED)
    trained = directory.load(paths.MODEL)
    for path, stage in ((paths.EVALUATION, "evaluate"), (paths.RUN, "train")):
        if not path.exists() or files.read_json(path)["model"] != trained.sha256:
            raise InputError(
                f"{path} describes another model than {paths.MODEL}: run `dvc repro {stage}`"
            )
    evaluation = files.read_json(paths.EVALUATION)
    prompt = files.read_json_lines(paths.SAMPLES)[0]["prompt"]  # which the model knows
    if evaluation.get("measure") != held_out.MEASURE:
        raise InputError(
            f"{paths.EVALUATION} has figures under another measure than {held_out.MEASURE}: run "
            "`dvc repro evaluate`"
        )
    limits, figures = settings.gate.model_dump(mode="json"), gate.figures(evaluation)
    mirror = Mirror(Path.cwd(), settings, strict=True)
    mirror.send()

    registered: dict[str, Any]
    if found := gate.broken(figures, limits):
        registered = _unregistered(settings, mirror, trained.sha256)
        is_full = len(trained.tokenizer) >= trained.config["vocabulary"]["max_tokens"]
        outcome = _refused(found, figures, limits, gate.way_on(found, is_full=is_full))
    else:
        measured = {
            "measure": evaluation["measure"],
            "measured_on": gate.measured_on(evaluation, trained.tokenizer.sha256),
        }
        registered = registry.register(
            mirror,
            paths.MODEL,
            evaluated=evaluation["model"],
            name=settings.tracking.model_name,
            alias=settings.tracking.alias,
            prompts=[prompt],
            tags={**figures, **registry.measured_tags(measured)},
            description=lambda version: _card(mirror, version, evaluation, prompt),
        )
        log.info("registered %s as @%s", registered["uri"], registered["alias"])
        fraction = trained.config["sequences"]["validation_fraction"]
        outcome = registry.challenge(
            mirror.uri,
            registered["name"],
            {"version": registered["version"], **measured, **figures},
            limits,
            lambda model: _measure(
                model, fraction, settings.evaluate.sample_bytes, evaluation["held_out"]["digest"]
            ),
            promotes=gate.promotes(settings.gate.promote, Path.cwd()),
        )
    described = _card(mirror, registered["version"], evaluation, prompt)
    files.write_text(paths.MODEL_CARD, described)
    files.write_json(paths.REGISTERED, registered)
    files.write_json(paths.GATE, {**outcome, "model": trained.sha256})
    mirror.send()
    log.info("%s", gate.notice(outcome) or f"the gate: {outcome['verdict']}: {outcome['reason']}")


def _unregistered(settings: config.Config, mirror: Mirror, model: str) -> dict[str, Any]:
    name = settings.tracking.model_name
    return {"name": name, "version": None, "run_id": mirror.run_id, "model": model}


def _refused(
    broken: list[dict[str, Any]],
    figures: Mapping[str, float],
    limits: Mapping[str, float],
    way_on: str,
) -> dict[str, Any]:
    shown = {entry["figure"]: entry["value"] for entry in broken}  # NaN is not JSON
    return {
        "verdict": gate.REFUSED,
        "reason": gate.explain(broken),
        "way_on": way_on,
        "settings": limits,
        "challenger": {**figures, **shown},
        "champion": None,
        "broken": broken,
    }


def _card(mirror: Mirror, version: str | None, evaluation: Mapping[str, Any], prompt: str) -> str:
    return card.model_card(
        mirror.made_with(),
        version=version,
        run=files.read_json(paths.RUN),
        evaluation=evaluation,
        provenance=mirror.provenance(),
        prompt=prompt,
    )


def _measure(
    model: directory.ModelDirectory, validation_fraction: float, most_bytes: int, digest: str
) -> dict[str, float]:
    """The figures of another model on the reviews that were held out from this one."""
    corpus.fetch(paths.REVIEWS, progress.bar)
    drawn = subsampling.samples(paths.REVIEWS, validation_fraction, most_bytes)
    learned, held = (sample.reviews for sample in drawn)
    if held_out.digest(held) != digest:
        raise InputError(
            f"{paths.EVALUATION} was measured on other reviews than {paths.REVIEWS} holds: run "
            "`dvc repro evaluate`"
        )
    bar = progress.bar("what the champion's tokens leave out", "reviews")
    return held_out.measure(
        model.network,
        charges.learn([learned["text"]], model.tokenizer, bar),
        held["text"],
        progress=progress.bar("the champion on these reviews", "windows"),
    )

"""model/ and reports/evaluation.json -> a version in MLflow's registry, if it passes the gate."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minigpt import config
from minigpt.common import files, paths, progress
from minigpt.data import corpus, tokenizer
from minigpt.evaluation import baselines, held_out
from minigpt.model import directory
from minigpt.tracking import gate, mirror, registry

log = logging.getLogger(__name__)


def run() -> None:
    """Registers the model unless it breaks a limit, after whatever MLflow missed of its run."""
    everything = config.load(paths.RESOLVED)
    train_id = json.loads(paths.RUN.read_text())["train_id"]
    tracker = mirror.Tracker(train_id, config.as_dict(everything), Path.cwd(), strict=True)
    mirror.replay(tracker, paths.REPORTS)
    tracker.evaluation(paths.REPORTS)
    evaluated = json.loads(paths.EVALUATION.read_text())
    settings, measured = asdict(everything.gate), gate.figures(evaluated)
    name = everything.tracking.model_name
    registered: dict[str, Any] = {"name": name, "version": None, "run_id": tracker.run_id}
    if found := gate.broken(measured, settings):
        outcome = {
            "verdict": "refused",
            "reason": gate.explain(found),
            "settings": settings,
            "challenger": measured | {entry["figure"]: entry["value"] for entry in found},
            "champion": None,
            "broken": found,
        }
    else:
        words = tokenizer.load(paths.MODEL / directory.VOCABULARY_FILE)
        data = gate.measured_on(evaluated)
        registered |= registry.register(
            tracker,
            paths.MODEL,
            name=name,
            alias=everything.tracking.alias,
            prompts=everything.sample.prompts[:1],
            tags={key: str(value) for key, value in measured.items()}
            | {"minigpt.held_out": data["held_out"] or "none", "minigpt.vocabulary": words.sha256},
        )
        own = {"version": registered["version"], "vocabulary": words.sha256}
        challenger = {**own, **data, **measured}
        fraction = everything.sequences.validation_fraction

        def measure(path: Path) -> dict[str, float]:
            return _measure(path, fraction)

        outcome = registry.challenge(tracker.uri, name, challenger, settings, measure)
        log.info("registered %s as @%s", registered["uri"], registered["alias"])
    text = f"{outcome['verdict']}: {outcome['reason']}"
    tracker.attempt(lambda client: client.set_tag(tracker.run_id, "minigpt.gate", text))
    files.write_json(paths.REGISTERED, registered)
    files.write_json(paths.GATE, outcome)
    log.info("the gate: %s", text)


def _measure(path: Path, validation_fraction: float) -> dict[str, float]:
    """The figures of another model on the reviews that are held out here."""
    reviews = corpus.read_reviews(paths.REVIEWS, ["id", "text"])
    mask = corpus.is_validation(reviews["id"], validation_fraction)
    other = directory.load(path)
    return held_out.measure(
        other.network,
        other.vocabulary,
        other.config["vocabulary"]["style"],
        reviews["text"].filter(mask),
        baselines.byte_unigram(held_out.plain(reviews["text"].filter(~mask))),
        progress=progress.bar("the champion on these reviews", "windows"),
    )

"""What the files of a run say, in the form in which MLflow takes it.

Each report names what it describes by a digest: reports/train.json the training, and the reports of
later stages the model. So reports that another run left behind are told apart, and a run whose
model equals an earlier one has that model's evaluation.
"""

import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from mlflow.entities import Metric

from minigpt.common import files, paths
from minigpt.common.redaction import redact
from minigpt.config import Config
from minigpt.tracking import origin

DATASETS = {paths.REVIEWS.as_posix(): "reviews", paths.SEQUENCES.as_posix(): "sequences"}
# Sections that decide nothing in the reports: changing them doesn't make another run.
NEUTRAL = {"tracking", "preview", "checkpointing", "logging", "engine", "serving"}
PAGE_WIDTH = 100  # characters per line of an epoch's texts, since MLflow's UI doesn't wrap them
LONGEST_VALUE = 6000  # characters, MLflow's limit for a parameter


@dataclass(frozen=True)
class Epoch:
    """An epoch's metrics by step, and its texts as a page (empty if it has none)."""

    number: int
    points: list[Metric]
    steps: list[Metric]
    page: str


@dataclass(frozen=True)
class Contents:
    """Everything that MLflow holds of a run.

    Attributes:
        identity: The tags by which the run is found.
        origin: The configuration that the files were made with.
        finished: Whether the model is there.
        finished_ms: When the last epoch ended, in Unix milliseconds.
        parameters: By key.
        tags: By key: DVC's digest of each output, and the gate's verdict.
        datasets: DVC's digest of each, by path.
        epochs: The finished ones.
        summaries: The figures of whole stages, by metric.
        artifacts: Files, and the folder that each belongs to.
    """

    identity: dict[str, str]
    origin: origin.Origin
    finished: bool
    finished_ms: int
    parameters: dict[str, str]
    tags: dict[str, str]
    datasets: dict[str, str]
    epochs: list[Epoch]
    summaries: dict[str, float]
    artifacts: list[tuple[Path, str]]


def read(root: Path, config: Config) -> Contents | None:
    """Reads the files of the run that reports/run.json names.

    Args:
        root: The folder with reports/ and dvc.lock.
        config: The whole resolved configuration.

    Returns:
        None without a reports/run.json.
    """
    run = _json(root / paths.RUN)
    if not run:
        return None
    model, made_with = run["model"], origin.find(root, config, run["model"])
    plain = made_with.config.model_dump(mode="json")
    settings = {f"run.{key}": value for key, value in run["settings"].items()}
    outs = [out for stage in origin.locked_stages(root).values() for out in stage.get("outs", [])]
    digests = {out["path"]: out["md5"] for out in outs if "md5" in out}
    tags = {f"dvc.lock:{path}": digest for path, digest in digests.items()}
    gate = _json(root / paths.GATE)
    if model and gate.get("model") == model:
        tags["minigpt.gate"] = _text(f"{gate['verdict']}: {gate['reason']}")
    return Contents(
        identity={"minigpt.train_id": run["train_id"], "minigpt.config": _digest(plain)},
        origin=made_with,
        finished=model is not None,
        finished_ms=max((timing["finished_ms"] for timing in run["epochs"]), default=0),
        parameters={key: _text(value) for key, value in (flatten(plain) | settings).items()},
        tags=tags,
        datasets={path: digests[path] for path in DATASETS if path in digests},
        epochs=list(_epochs(root, run)),
        summaries=dict(_summaries(root, run)),
        artifacts=list(_artifacts(root, model)) if model else [],
    )


def _digest(plain: Mapping[str, Any]) -> str:
    """Returns the digest of a configuration, without what a finished model has in another form."""
    decisive = {section: plain[section] for section in plain if section not in NEUTRAL}
    decisive["model"] = {k: v for k, v in plain["model"].items() if k not in origin.OPEN}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _epochs(root: Path, run: Mapping[str, Any]) -> Iterator[Epoch]:
    timings = {timing["epoch"]: timing for timing in run["epochs"]}
    steps, texts = defaultdict(list), defaultdict(list)
    for row in _csv(root / paths.STEPS):
        steps[int(row["epoch"])].append(row)
    if (root / paths.EPOCH_TEXTS).exists():
        for text in files.read_json_lines(root / paths.EPOCH_TEXTS):
            texts[text["epoch"]].append(f"> {text['prompt']}\n{fill(text['text'], PAGE_WIDTH)}")
    for row in _csv(root / paths.LOSSES):
        number = int(row["epoch"])
        if number not in timings:
            continue
        at = timings[number]["finished_ms"]
        points = {
            key: value
            for key, value in {**row, **timings[number]}.items()
            if key not in ("epoch", "finished_ms") and value not in (None, "")
        }
        yield Epoch(
            number,
            [Metric(key, float(value), at, number) for key, value in points.items()],
            [
                Metric(f"train_{key}", float(row[key]), at, int(row["step"]))
                for row in steps[number]
                for key in ("loss", "learning_rate")
            ],
            "\n\n".join(texts[number]) + "\n" if texts[number] else "",
        )


def _summaries(root: Path, run: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if run["model"] is None:
        return
    trained, evaluated = _json(root / paths.TRAIN_METRICS), _json(root / paths.EVALUATION)
    summaries = {
        "vocabulary": _json(root / paths.VOCABULARY_METRICS),
        "train": trained if trained.get("training") == run["training"] else {},
        "evaluate": evaluated if evaluated.get("model") == run["model"] else {},
    }
    for key, value in flatten(summaries, separator="/").items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            # MLflow stores an infinity as the largest number.
            most = sys.float_info.max
            yield key, math.copysign(most, value) if math.isinf(value) else float(value)


def _artifacts(root: Path, model: str) -> Iterator[tuple[Path, str]]:
    wanted = []
    if origin.describes(root / paths.EVALUATION, model):
        wanted += [
            (paths.EVALUATION_TEXT, "evaluation"),
            (paths.EVALUATION_SAMPLES, "evaluation"),
            *((path, "figures") for path in sorted((root / paths.FIGURES).glob("*.png"))),
        ]
    if origin.describes(root / paths.SAMPLES, model):
        wanted += [(paths.SAMPLES_TEXT, "samples"), (paths.SAMPLES, "samples")]
    yield from ((root / path, folder) for path, folder in wanted if (root / path).exists())


def flatten(tree: Mapping[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Returns the leaves of nested mappings, by the keys that lead to them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        inner = isinstance(value, Mapping)
        flat |= flatten(value, f"{name}{separator}", separator) if inner else {name: value}
    return flat


def _text(value: Any) -> str:
    text = redact(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    if len(text) <= LONGEST_VALUE:
        return text
    # The digest distinguishes long values that differ only after the cut.
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text[: LONGEST_VALUE - 40]}... (sha256 {digest})"


def _json(path: Path) -> dict[str, Any]:
    return files.read_json(path) if path.exists() else {}


def _csv(path: Path) -> list[dict[str, str]]:
    return files.read_csv(path) if path.exists() else []

"""The configuration that the files of a run were made with.

DVC doesn't run a frozen stage, so its outputs may be older than resolved.yaml. A model directory
holds its own configuration, and dvc.lock the parameters of each stage.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from minigpt.common import files, paths
from minigpt.common.errors import InputError
from minigpt.common.validation import Section, validate
from minigpt.config import Config

OF_THE_MODEL = ("vocabulary", "sequences", "model", "train")
# Each other stage with a section of its own, and the report that names the model it describes.
OF_A_STAGE = {
    "download": ("corpus", None),
    "vocab": ("vocabulary", None),
    "sequences": ("sequences", None),
    "evaluate": ("evaluate", paths.EVALUATION),
    "sample": ("sample", paths.SAMPLES),
}
OPEN: dict[str, Any] = {"vocabulary_size": 0, "dtype_policy": "auto"}  # chosen as training begins

Found = tuple[str, str, Any, str]  # a stage, its section, the values, and the file that holds them


class Origin(NamedTuple):
    """What the files of a run were made with.

    Attributes:
        config: resolved.yaml with the sections that the files were made with.
        differing: What resolved.yaml has otherwise, for people.
        stages: The stages that would have to run again.
    """

    config: Config
    differing: list[str]
    stages: list[str]


def find(root: Path, config: Config, model: str | None) -> Origin:
    """Finds out what the files of a run were made with.

    Args:
        root: The folder with model/, reports/ and dvc.lock.
        config: The content of resolved.yaml.
        model: The digest of the finished model; None while it is trained.
    """
    sections: dict[str, Section] = {}
    differing: list[str] = []
    stages: list[str] = []
    for stage, name, values, file in (
        *_of_the_model(root, config, model),
        *_of_frozen_stages(root, model),
    ):
        now: Section = getattr(config, name)
        try:
            made = validate(type(now), values, name, file)
        except InputError as error:  # written by code with other keys
            other = str(error).splitlines()
        else:
            other = list(_differing(name, made, now))
            # What the model holds counts: `vocab` and `sequences` may have run since.
            sections.setdefault(name, made)
        differing += [line for line in other if line not in differing]
        if other and stage not in stages:
            stages.append(stage)
    return Origin(config.model_copy(update=sections), differing, stages)


def _of_the_model(root: Path, config: Config, model: str | None) -> Iterator[Found]:
    path = root / paths.MODEL / "config.json"
    if model is None or not path.is_file():
        return
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != model:
        return
    made = json.loads(content)["config"]
    for key, value in OPEN.items():
        if getattr(config.model, key) == value:
            made["model"][key] = value
    file = str(paths.MODEL / path.name)
    yield from (("train", name, made.get(name, {}), file) for name in OF_THE_MODEL)


def _of_frozen_stages(root: Path, model: str | None) -> Iterator[Found]:
    """Yields what dvc.lock says of frozen stages; any other stage runs if its parameters change."""
    described, lock = _stages(root / "dvc.yaml"), locked_stages(root)
    for stage, (name, report) in OF_A_STAGE.items():
        locked = lock.get(stage, {}).get("params", {}).get(paths.RESOLVED.as_posix(), {})
        frozen = described.get(stage, {}).get("frozen")
        if frozen and name in locked and (report is None or describes(root / report, model)):
            yield stage, name, locked[name], "dvc.lock"


def locked_stages(root: Path) -> dict[str, Any]:
    """Returns what dvc.lock says of each stage that has ended, by name.

    DVC writes a stage's entry when the stage has ended. The entries of the running stage and of
    those that follow it describe an earlier run, and are left out.
    """

    def named(stage: Mapping[str, Any], part: str) -> set[str]:
        return {entry["path"] for entry in stage.get(part, [])}

    stages = _stages(root / "dvc.lock")
    running = os.environ.get("DVC_STAGE", "").rpartition(":")[2]
    old = named(stages.pop(running, {}), "outs")
    while late := [name for name, stage in stages.items() if old & named(stage, "deps")]:
        old = old.union(*(named(stages.pop(name), "outs") for name in late))
    return stages


def _stages(path: Path) -> dict[str, Any]:
    read = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return dict((read or {}).get("stages", {}))


def describes(report: Path, model: str | None) -> bool:
    """Tells whether a report, JSON or JSON lines, is of a model."""
    if not report.exists():
        return False
    if report.suffix == ".jsonl":
        return all(row["model"] == model for row in files.read_json_lines(report))
    return bool(files.read_json(report).get("model") == model)


def _differing(name: str, made: Section, now: Section) -> Iterator[str]:
    theirs = now.model_dump(mode="json")
    for key, value in made.model_dump(mode="json").items():
        if value != theirs[key]:
            shown = [json.dumps(each, ensure_ascii=False) for each in (value, theirs[key])]
            yield f"{name}.{key} is {shown[0]} (resolved.yaml: {shown[1]})"

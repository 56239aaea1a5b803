"""dvc.yaml against the code, without running it."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml
from imports import MODULES, ROOT, SRC, with_everything_imported

from minigpt.common import paths
from minigpt.config import Config

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]

# Modules that decide no byte of an output: they report, log, lock, draw progress or word errors,
# hand over values that arrive through `params`, fetch files by their digests, or call the same
# functions elsewhere (tests/engine compares the bytes). Rewording an error must not retrain for an
# hour.
PLUMBING = {
    "minigpt",
    "minigpt.common",
    "minigpt.config",
    "minigpt.data.stored",
    "minigpt.engine",
    "minigpt.stages.__main__",
    "minigpt.tracking",
}
# The same for one stage alone: the texts after each epoch are a log, a checkpoint leads to the
# same weights, as does any number of processes, and a change of the tokenizer that matters changes
# data/tokenizer.
LOGS = {"train": {"minigpt.generation", "minigpt.training.checkpoints", "minigpt.training.launch"}}
LOGS["train"] |= {f"minigpt.data.{name}" for name in ("bpe", "interface", "text", "tokenizer")}
# For these stages, what is plumbing elsewhere is the work itself.
WORK = {"compose": {"minigpt.config"}, "register": {"minigpt.tracking"}}

# Sections of the configuration that decide no bytes of a model.
NOT_IN_PARAMS = {"preview", "checkpointing", "logging", "engine", "serving"}


def is_in(module: str, names: set[str]) -> bool:
    """Tells whether a module, or a package that it is in (minigpt itself aside), is named."""
    return module in names or any(module.startswith(f"{n}.") for n in names - {"minigpt"})


def needed(stage: str) -> set[str]:
    """Our own modules that are imported when a stage runs and that decide its outputs.

    The engine calls what the stage calls without it.
    """
    both = "minigpt.stages.__main__", f"minigpt.stages.{stage}"
    loaded = with_everything_imported(*both, but="minigpt.engine")
    plumbing = (PLUMBING | LOGS.get(stage, set())) - WORK.get(stage, set())
    return {
        name for name in loaded if not is_in(name, plumbing) and MODULES[name].name != "__init__.py"
    }


def listed(stage: str) -> set[str]:
    """The modules that dvc.yaml lists for a stage, in folders too."""
    files = {SRC.parent / dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")}
    found = {inner for file in files for inner in ([file] if file.is_file() else file.glob("*.py"))}
    return {name for name, file in MODULES.items() if file in found and file.stem != "__init__"}


def outs(stage: str) -> set[str]:
    entries = [out for part in ("outs", "metrics", "plots") for out in STAGES[stage].get(part, [])]
    return {path for out in entries for path in ([out] if isinstance(out, str) else out)}


def sections(stage: str) -> list[str]:
    named = STAGES[stage].get("params", [])
    return [key for entry in named for key in entry.get("resolved.yaml") or []]


def test_a_stage_is_a_file_of_the_same_name() -> None:
    files = {file.stem for file in (SRC / "minigpt/stages").glob("*.py")} - {"__init__", "__main__"}
    assert set(STAGES) == files
    for stage, settings in STAGES.items():
        assert settings["cmd"] == f"PYTHONPATH=src python -m minigpt.stages {stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_decides_its_outputs(stage: str) -> None:
    assert listed(stage) == needed(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reads_what_another_wrote_or_what_is_committed(stage: str) -> None:
    written = set().union(*map(outs, STAGES))
    for dep in STAGES[stage]["deps"]:
        assert dep in written or (ROOT / dep).exists(), dep
    # A random id and times, never the same twice: what depended on them would always run.
    assert paths.RUN.as_posix() not in STAGES[stage]["deps"]


def test_the_paths_of_the_stages_are_the_outs_of_the_pipeline() -> None:
    constants = {path.as_posix() for path in vars(paths).values() if isinstance(path, Path)}
    inside = {paths.DOWNLOADS, paths.CHECKPOINTS, paths.REPORTS}  # kept between runs; a folder
    assert set().union(*map(outs, STAGES)) == constants - {path.as_posix() for path in inside}


def test_stages_name_sections_of_the_configuration() -> None:
    for name in (name for stage in STAGES for name in sections(stage)):
        section: Any = Config
        for key in name.split("."):
            assert key in section.model_fields, name
            section = section.model_fields[key].annotation
    assert {name.partition(".")[0] for stage in STAGES for name in sections(stage)} == (
        set(Config.model_fields) - NOT_IN_PARAMS
    )


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "compose"])
def test_a_stage_names_the_keys_that_it_reads(stage: str) -> None:
    tree = ast.parse(MODULES[f"minigpt.stages.{stage}"].read_text(encoding="utf-8"))
    load = "config.load(paths.RESOLVED)"
    texts = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = {text.removeprefix("settings.") for text in texts if text.startswith("settings.")}
    read |= {text.removeprefix(f"{load}.") for text in texts if text.startswith(f"{load}.")}
    keys = {key for key in read if key.split(".")[0] in Config.model_fields}
    if f"settings = {load}." in ast.unparse(tree):  # a section alone
        keys = {key for key in read if f"{load}.{key}" in ast.unparse(tree)}
    deciding = {key for key in keys if key.split(".")[0] not in NOT_IN_PARAMS}
    assert deciding
    named = sections(stage)
    for key in deciding:
        is_named = any(f"{key}.".startswith(f"{name}.") for name in named)
        assert is_named or any(name.startswith(f"{key}.") for name in named), key


def test_no_value_of_the_configuration_is_part_of_a_command() -> None:
    assert "${" not in (ROOT / "dvc.yaml").read_text(encoding="utf-8")


def test_every_stage_is_tested() -> None:
    tests = (ROOT / "tests/pipeline").glob("test_*.py")
    named = "".join(path.read_text(encoding="utf-8") for path in tests)
    untested = [stage for stage in STAGES if f'"{stage}"' not in named]
    assert not untested, f"write a test in tests/pipeline/ that runs: {', '.join(untested)}"

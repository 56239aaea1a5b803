"""dvc.yaml against the code, without running it."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt import config
from minigpt.common import paths

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
MODULES = {
    ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): file
    for file in SRC.rglob("*.py")
}
NO_STAGES = {"__init__", "__main__", "guard", "output", "paths"}
# With other prompts the samples are others, on which `register` depends.
READ_ALL_THE_SAME = {"register": {"sample.prompts"}}

# A module may import those of its own line, of the lines below, and `errors`.
LAYERS = (
    {"registry", "champion"},
    {"training", "evaluation", "tracking", "serving"},
    {"model", "loss", "decoding", "sampling", "sequences", "download", "reading"},
    {"vocabulary", "text", "corpus", "baselines", "checkpoints", "copying", "gate", "pages"},
)
MAY_IMPORT = {  # beside those
    "files": {"errors"},
    "config": {"errors", "files"},
    "serving": {"backend", "config"},
    # What a person or CI calls, on top of all.
    "__main__": {"champion", "config", "errors", "search", "tracking"},
    "report": {"champion", "decoding", "errors", "model", "registry", "stages", "stages.paths"}
    | {"tracking"},
    "retrain": {"errors", "report", "stages", "stages.output"},
    "search": {"champion", "errors", "tracking"},
}


def imports(module: str) -> set[str]:
    """Our own modules that a module imports, in functions too, with the packages around them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{module} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in MODULES}


def needed(stage: str) -> set[str]:
    """Our own modules that are imported when a stage runs."""
    waiting, seen = ["minigpt.stages.__main__", f"minigpt.stages.{stage}"], set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        waiting += imports(module)
        if package := module.rpartition(".")[0]:
            waiting.append(package)
    return seen


def outs(stage: str) -> set[str]:
    listed = [out for part in ("outs", "metrics", "plots") for out in STAGES[stage].get(part, [])]
    return {path for out in listed for path in ([out] if isinstance(out, str) else out)}


def sections(stage: str) -> list[str]:
    named = STAGES[stage].get("params", [])
    return [key for entry in named for key in entry.get("resolved.yaml") or []]


def test_a_stage_is_a_file_of_the_same_name() -> None:
    files = {file.stem for file in (SRC / "minigpt/stages").glob("*.py")} - NO_STAGES
    assert set(STAGES) == files
    for stage, settings in STAGES.items():
        assert settings["cmd"] == f"PYTHONPATH=src python -m minigpt.stages {stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_modules_that_it_imports(stage: str) -> None:
    listed = {dep for dep in STAGES[stage]["deps"] if dep.startswith("src")}
    assert listed == {MODULES[module].relative_to(ROOT).as_posix() for module in needed(stage)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reads_what_another_wrote_or_what_is_committed(stage: str) -> None:
    written = set().union(*map(outs, STAGES))
    for dep in STAGES[stage]["deps"]:
        assert dep in written or dep == "conf" or (ROOT / dep).is_file(), dep


def test_the_paths_of_the_stages_are_the_outs_of_the_pipeline() -> None:
    constants = {path.as_posix() for path in vars(paths).values() if isinstance(path, Path)}
    inside = {paths.DOWNLOADS, paths.CHECKPOINTS, paths.REPORTS}  # kept between runs; a folder
    assert set().union(*map(outs, STAGES)) == constants - {path.as_posix() for path in inside}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "compose"])
def test_a_stage_names_sections_of_the_configuration(stage: str) -> None:
    assert sections(stage)
    for name in sections(stage):
        section: Any = config.Config()
        for key in name.split("."):
            assert key in vars(section), name
            section = getattr(section, key)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "compose"])
def test_a_stage_names_what_it_reads_of_the_configuration(stage: str) -> None:
    tree = ast.parse(MODULES[f"minigpt.stages.{stage}"].read_text())
    load = "config.load(paths.RESOLVED)"
    loaded = {load} | {
        ast.unparse(node.targets[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == load
    }
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    inner = [node.value for node in attributes]  # `a.b` in `a.b.c`
    chains = [ast.unparse(node) for node in attributes if node not in inner]
    read = {
        chain.removeprefix(f"{name}.")
        for chain in chains
        for name in loaded
        if chain.startswith(f"{name}.")
    }
    assert read
    assert {key for key in read if not named(key, stage)} == READ_ALL_THE_SAME.get(stage, set())


def named(key: str, stage: str) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in sections(stage))


def test_every_section_is_read_by_a_stage() -> None:
    read = {name.partition(".")[0] for stage in STAGES for name in sections(stage)}
    assert read == set(vars(config.Config()))


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_given_to_a_shell_or_unpickled(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    assert not called & {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
    loaders = {name for name in called if re.search("pickle|joblib|marshal|load_model$", name)}
    assert loaders <= {"mlflow.pyfunc.load_model"}  # of the version made a moment before
    given = {(k.arg, ast.unparse(k.value)) for call in calls for k in call.keywords}
    assert not given & {("shell", "True"), ("allow_pickle", "True"), ("safe_mode", "False")}


def test_no_value_of_the_configuration_is_part_of_a_command() -> None:
    assert "${" not in (ROOT / "dvc.yaml").read_text()


@pytest.mark.parametrize("module", [name for name in MODULES if ".stages" not in name])
def test_imports_point_one_way(module: str) -> None:
    name = module.removeprefix("minigpt").removeprefix(".")
    allowed = MAY_IMPORT.get(name, set())
    for level, names in enumerate(LAYERS):
        if name in names:
            allowed = allowed.union({"errors", "files"}, *LAYERS[level:])
    found = {found.removeprefix("minigpt.") for found in imports(module) - {"minigpt"}}
    assert found <= allowed


def test_no_two_modules_import_each_other() -> None:
    both = {(module, other) for module in MODULES for other in imports(module)}
    assert not {(other, module) for module, other in both} & both


@pytest.mark.parametrize(
    "module",
    [
        *("config", "corpus", "download", "reading", "text", "vocabulary", "sequences"),
        "stages.__main__",
    ],
)
def test_a_module_that_computes_nothing_loads_no_framework(module: str) -> None:
    heavy = "{'tensorflow', 'keras', 'jax', 'torch', 'mlflow', 'hydra', 'dvc'}"
    code = f"import sys, minigpt.{module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_no_stage_uses_is_left_out_only_while_one_is_loaded() -> None:
    code = """
import os
os.environ["KERAS_BACKEND"] = "tensorflow"
from minigpt.common.backend import without_the_unused
with without_the_unused():
    try:
        import sklearn
    except ImportError:
        print("left out")
import sklearn
print("found")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["left out", "found"]

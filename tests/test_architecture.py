"""The plan of the house: which room may know of which, and what no module does."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from imports import MODULES, imports

from minigpt.common.validation import Section, is_section
from minigpt.config import Config

TESTS = Path(__file__).parent
# Imports point rightwards only; rooms of one place import nothing of each other.
ORDER = (
    {"cli", "stages"},
    {"retraining", "engine"},
    {"serving"},
    {"tracking"},
    {"evaluation", "training"},
    {"generation"},
    {"model"},
    {"data"},
    {"composition"},
    {"config"},
    {"common"},
)
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms}
LIGHT = ("common", "config", "data", "cli", "stages.__main__")


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "minigpt"])
def test_imports_point_one_way(module: str) -> None:
    for other in imports(module) - {"minigpt"}:
        assert room(other) == room(module) or PLACE[room(other)] > PLACE[room(module)], other


def test_no_two_modules_import_each_other() -> None:
    pairs = {(module, other) for module in MODULES for other in imports(module)}
    assert not {(other, module) for module, other in pairs} & pairs


def test_a_package_says_in_one_sentence_what_it_is_for() -> None:
    for name, file in MODULES.items():
        if file.name == "__init__.py":
            sentence = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            assert re.fullmatch(r"[A-Z][^\n]*\.", sentence or ""), name


def test_a_module_that_computes_nothing_loads_no_framework() -> None:
    light = [name for name in MODULES if name.removeprefix("minigpt.").startswith(LIGHT)]
    heavy = "{'tensorflow', 'keras', 'jax', 'torch', 'mlflow', 'hydra', 'dvc'}"
    code = f"import sys, {', '.join(light)}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_given_to_a_shell_or_unpickled(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    assert not called & {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
    loaders = {name for name in called if re.search("pickle|joblib|marshal|load_model$", name)}
    assert loaders <= {"mlflow.pyfunc.load_model"}  # of the version registered a moment before
    given = {(k.arg, ast.unparse(k.value)) for call in calls for k in call.keywords}
    assert not given & {("shell", "True"), ("allow_pickle", "True"), ("safe_mode", "False")}


def test_only_the_engine_knows_ray() -> None:
    for module, file in MODULES.items():
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        named = [
            ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        knows = any(re.match(r"(import|from) ray\b", text) for text in named)
        assert not knows or room(module) == "engine", module


def fields(section: type[Section]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield from fields(field.annotation) if is_section(field.annotation) else [name]


def test_every_field_of_the_configuration_is_read() -> None:
    """A field that no module names is one that somebody forgot to use, or to remove."""
    named = set[str]()
    for module, file in MODULES.items():
        if module != "minigpt.config":
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                named |= {node.attr} if isinstance(node, ast.Attribute) else set()
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    named.add(node.value)
    assert set(fields(Config)) - named == set()


def test_make_test_finds_the_tests_of_numerical_code() -> None:
    """It looks for them on a second backend in these rooms only, which load less."""
    makefile = (TESTS.parent / "Makefile").read_text(encoding="utf-8")
    rooms = re.findall(r"^NUMERICAL := \$\(addprefix tests/,(.*)\)$", makefile, re.MULTILINE)
    tests = TESTS.glob("*/test_*.py")
    marked = [path for path in tests if "mark.backend" in path.read_text(encoding="utf-8")]
    assert sorted({path.parent.name for path in marked}) == rooms[0].split()

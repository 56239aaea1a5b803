"""A model directory becomes a version of the registered model, in real sqlite stores."""

import ast
import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from tracked import CONFIG, REQUEST, SAMPLING, Echo, changed, client, runs, write_fake, write_run

from minigpt.common import backend
from minigpt.common.errors import InputError
from minigpt.tracking import registry, store, version
from minigpt.tracking.mirror import Mirror

pytestmark = pytest.mark.usefixtures("clean_environment")

EVALUATED = hashlib.sha256(b"a model").hexdigest()
WANTED: dict[str, Any] = {
    "evaluated": EVALUATED,
    "name": "mini",
    "alias": "newest",
    "prompts": ["this movie"],
    "tags": {},
    "description": "# version {}".format,
}


@pytest.fixture
def mirror(project: Path) -> Mirror:
    write_run(project)
    mirror = Mirror(project, CONFIG, strict=True)
    mirror.send()
    return mirror


def test_registering_twice_gives_one_version(
    project: Path, mirror: Mirror, model_dir: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # anywhere but the project
    first = registry.register(mirror, model_dir, **WANTED)
    assert first == {
        "name": "mini",
        "version": "1",
        "uri": "models:/mini/1",
        "alias": "newest",
        "run_id": mirror.run_id,
        "model": EVALUATED,
    }
    again = Mirror(project, CONFIG, strict=True)
    best = {**WANTED, "alias": "best"}
    assert registry.register(again, model_dir, **best) == {**first, "alias": "best"}
    another = write_fake(model_dir, "another model")
    other = registry.register(again, model_dir, **{**WANTED, "evaluated": another})
    assert (other["version"], other["model"]) == ("2", another)
    versions = [
        client(project).get_model_version_by_alias("mini", alias) for alias in ("best", "newest")
    ]
    assert [str(found.version) for found in versions] == ["1", "2"]
    assert [found.description for found in versions] == ["# version 1", "# version 2"]
    assert versions[0].run_id == mirror.run_id

    prompts = pd.DataFrame({"prompt": ["a", "b"]})
    loaded = mlflow.pyfunc.load_model("models:/mini@best")
    assert loaded.predict(prompts, params={"top_k": 3}) == ["a", "b"]
    assert {**SAMPLING, "top_k": 3}.items() <= Echo.sampling.model_dump().items()
    for asked, message in (
        ({"max_tokens": 51}, "max_tokens is 51: allowed is 1 to 50"),
        ({"temperature": float("nan")}, "temperature is nan: allowed"),
        ({"top_p": float("inf")}, "top_p is inf: allowed"),
        ({"seed": "seven"}, "seed"),
    ):
        with pytest.raises(MlflowException, match=message):
            loaded.predict(prompts, params=asked)
    loaded.predict(prompts, params={"top_q": 10**9})  # MLflow itself drops it, with a warning
    assert Echo.sampling.top_k == 0

    local = Path(mlflow.artifacts.download_artifacts("models:/mini@best"))
    files = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    model = "artifacts/model/config.json"
    assert {"pyfunc.py", "code/minigpt/tracking/pyfunc.py", model} <= files
    pickled = (".pkl", ".pickle", ".joblib", ".pt", ".npy", ".pyc")
    assert not [name for name in files if Path(name).suffix in pickled]
    assert not [name for name in files if (local / name).read_bytes()[:1] == b"\x80"]
    requirements = (local / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in requirements} == set(version.REQUIREMENTS)
    recorded = yaml.safe_load((local / "MLmodel").read_text())
    flavor = recorded["flavors"]["python_function"]
    assert flavor["model_code_path"].endswith("pyfunc.py") and "python_model" not in flavor
    assert flavor["config"] == REQUEST
    parameters = {p["name"]: p["default"] for p in json.loads(recorded["signature"]["params"])}
    assert SAMPLING.items() <= parameters.items() and "prompts" not in parameters

    fetched = registry.fetch(mirror.uri, "mini", "1", tmp_path / "fetched")
    assert fetched and (fetched / "config.json").read_text() == "a model"


def test_a_version_has_a_few_short_tags(project: Path, mirror: Mirror, model_dir: Path) -> None:
    tags = {"bits_per_byte": 1.5, registry.MEASURED["measured_on"]: "ab12", "accuracy": None}
    model = registry.register(mirror, model_dir, **{**WANTED, "tags": tags})["model"]
    assert client(project).get_model_version("mini", "1").tags == {
        "bits_per_byte": "1.5",
        "minigpt.measured_on": "ab12",
        "minigpt.model": model[:12],
        "minigpt.request": "2 prompts, 100 prompt_bytes, 50 tokens, 100 total_tokens",
    }
    # Other limits of a request are another version.
    other = Mirror(project, changed(tracking={"request": {**REQUEST, "max_tokens": 60}}))
    assert registry.register(other, model_dir, **WANTED)["version"] == "2"
    tags["bits_per_byte"] = 1.4  # measured again since
    assert registry.register(mirror, model_dir, **{**WANTED, "tags": tags})["version"] == "1"
    assert client(project).get_model_version("mini", "1").tags["bits_per_byte"] == "1.4"


def test_registering_needs_a_model_that_works_and_the_store(
    project: Path, mirror: Mirror, model_dir: Path, monkeypatch: Any
) -> None:
    def broken(path: Path) -> None:
        raise InputError("a weight is missing")

    with pytest.raises(InputError, match="is missing; run `dvc repro train`"):
        registry.register(mirror, project / "nowhere", **WANTED)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="a weight is missing"):
        patch.setattr(sys.modules["minigpt.model.directory"], "load", broken)
        registry.register(mirror, model_dir, **WANTED)
    assert not client(project).search_registered_models()
    with pytest.raises(InputError, match="can't be used"):
        registry.register(mirror, model_dir, **{**WANTED, "name": "a/b:c"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(InputError, match=r"MLflow at http://127.0.0.1:9 can't be used"):
        registry.register(Mirror(project, CONFIG, strict=True), model_dir, **WANTED)
    with pytest.raises(InputError, match="mini is not registered"):
        registry.register(Mirror(project, CONFIG), model_dir, **WANTED)


def test_nothing_but_what_was_evaluated_is_registered(
    project: Path, mirror: Mirror, model_dir: Path, monkeypatch: Any
) -> None:
    """The model directory is replaced before, while and after it is copied."""
    save, load = mlflow.pyfunc.save_model, mlflow.pyfunc.load_model
    other = write_fake(model_dir, "another model")
    replaced = "model was replaced since it was evaluated: run `dvc repro evaluate`"
    with pytest.raises(InputError, match=replaced):
        registry.register(mirror, model_dir, **WANTED)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=replaced):

        def saves(**settings: Any) -> None:
            write_fake(model_dir, "a model")
            save(**settings)

        patch.setattr(mlflow.pyfunc, "save_model", saves)
        registry.register(mirror, model_dir, **{**WANTED, "evaluated": other})
    assert client(project).search_registered_models() == []
    assert logged_models(project) == []

    def loads(path: str) -> Any:
        write_fake(model_dir, "another model")
        return load(path)

    monkeypatch.setattr(mlflow.pyfunc, "load_model", loads)
    registry.register(mirror, model_dir, **WANTED)
    held = registry.fetch(mirror.uri, "mini", "1", project / "fetched")
    assert held and (held / "config.json").read_text(encoding="utf-8") == "a model"


def logged_models(project: Path) -> list[Any]:
    experiment = client(project).get_experiment_by_name("minigpt")
    assert experiment
    return list(client(project).search_logged_models([experiment.experiment_id]))


def test_a_version_belongs_to_its_run(project: Path, mirror: Mirror, model_dir: Path) -> None:
    registry.register(mirror, model_dir, **WANTED)
    (logged,) = logged_models(project)
    assert (logged.source_run_id, str(logged.status)) == (mirror.run_id, "READY")
    assert logged.params["train.epochs"] == "3"
    found = client(project).get_model_version("mini", "1")
    assert (found.run_id, found.source) == (mirror.run_id, f"models:/{logged.model_id}")
    run = client(project).get_run(mirror.run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    assert run.info.status == "FINISHED"
    described = Model.load("models:/mini/1")
    assert (described.run_id, described.model_id) == (mirror.run_id, logged.model_id)


def test_a_library_says_nothing_while_it_registers(
    mirror: Mirror, model_dir: Path, capfd: Any, caplog: Any
) -> None:
    backend.quiet()
    registry.register(mirror, model_dir, **WANTED)
    assert tuple(capfd.readouterr()) == ("", "")
    assert caplog.messages == []


AT_ONCE = """
import sys
from multiprocessing import get_context
from pathlib import Path
import pytest
from tracked import CONFIG, fake_model, write_lock, write_run
from minigpt.tracking import registry
from minigpt.tracking.mirror import Mirror

def act(barrier, root, wanted):
    model = fake_model(root, pytest.MonkeyPatch())
    write_lock(root)
    write_run(root)
    mirror = Mirror(root, CONFIG, strict=True)
    barrier.wait()
    mirror.send()
    registry.register(mirror, model, **wanted, description="# version {}".format)

context = get_context("fork")
wanted = eval(sys.argv[1])
barrier = context.Barrier(len(sys.argv) - 2)
running = [
    context.Process(target=act, args=(barrier, Path(root), wanted)) for root in sys.argv[2:]
]
[process.start() for process in running]
[process.join() for process in running]
sys.exit(any(process.exitcode for process in running))
"""


@pytest.mark.slow
def test_copies_of_the_project_that_register_at_once_make_one_version(
    project: Path, monkeypatch: Any
) -> None:
    uri = store.tracking_uri(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    copies = [project / str(number) for number in range(3)]
    for copy in copies:
        copy.mkdir()
    wanted = {key: value for key, value in WANTED.items() if key != "description"}
    command = [sys.executable, "-c", AT_ONCE, repr(wanted), *map(str, copies)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (made,) = client(project).search_model_versions("name = 'mini'")
    assert (str(made.version), made.description) == ("1", "# version 1")
    assert [f"models:/{model.model_id}" for model in logged_models(project)] == [made.source]
    assert len(runs(project)) == 1


def test_on_a_server_the_lowest_version_wins(
    project: Path, mirror: Mirror, model_dir: Path, monkeypatch: Any
) -> None:
    """A server has no lock: another process is faster after we have looked."""
    real = MlflowClient.create_model_version

    def overtaken(self: MlflowClient, *args: Any, **settings: Any) -> Any:
        real(self, *args, **settings)
        return real(self, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", overtaken)
        assert registry.register(mirror, model_dir, **WANTED)["version"] == "1"
    assert len(client(project).search_model_versions("name = 'mini'")) == 1
    assert registry.register(mirror, model_dir, **WANTED)["version"] == "1"


class Opens:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return exec, (self.code,)


def test_no_code_of_a_version_from_elsewhere_is_run(store: str, name: str, tmp_path: Path) -> None:
    client, mark = MlflowClient(store), f"open({str(tmp_path / 'ran')!r}, 'w')"
    paths: list[Any] = ["artifacts/model", "../elsewhere", "/etc", None, 5, {"a": "b"}, "\0"]
    for number, path in enumerate(paths, 1):
        foreign = tmp_path / f"foreign{number}"
        (foreign / "artifacts/model").mkdir(parents=True)
        (foreign / "artifacts/model/vocabulary.txt").write_text("theirs")
        for file in ("serving.py", "code/minigpt/__init__.py", "code/mlflow.py"):
            (foreign / file).parent.mkdir(parents=True, exist_ok=True)
            (foreign / file).write_text(mark)
        flavor = {
            "loader_module": "serving",
            "model_code_path": "serving.py",
            "code": "code",
            "python_model": "python_model.pkl",
            "artifacts": {"model": {"path": path, "uri": "file:///etc"}},
        }
        (foreign / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": flavor}}))
        (foreign / "python_model.pkl").write_bytes(pickle.dumps(Opens(mark)))
        client.create_model_version(name, foreign.as_uri())
        held = registry.fetch(store, name, str(number), tmp_path / f"fetched{number}")
        if path == "artifacts/model":
            assert held and (held / "vocabulary.txt").read_text() == "theirs"
            assert held.is_relative_to(tmp_path / "fetched1")
        else:
            assert held is None, path
    assert not (tmp_path / "ran").exists()


def test_a_version_without_a_description_holds_no_model(
    store: str, name: str, tmp_path: Path
) -> None:
    texts = ["", "[", "flavors: [1]", "- " * 5000, "flavors:\x00", None]
    for number, text in enumerate(texts, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        if text is not None:
            (folder / "MLmodel").write_text(text)
        (folder / "other").touch()
        MlflowClient(store).create_model_version(name, folder.as_uri())
        assert registry.fetch(store, name, str(number), tmp_path / f"fetched{number}") is None


def test_the_requirements_of_a_version_are_what_serving_imports() -> None:
    """The packages that our modules import which pyfunc.py imports, by the name pip gives them."""
    names = {"yaml": "pyyaml"}
    source, waiting, found = Path(version.__file__).parents[2], ["minigpt.tracking.pyfunc"], set()
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        path = source / (module.replace(".", "/") + ".py")
        if module in seen or not path.exists():
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                imported = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            waiting += [name for name in imported if name.startswith("minigpt")]
            found |= {name.partition(".")[0] for name in imported}
    found -= {*sys.stdlib_module_names, "minigpt"}
    # Parts that are used only with another backend, or to compose the configuration.
    found -= {"jax", "torch", "hydra", "pydantic_core"}
    assert {names.get(name, name) for name in found} == set(version.REQUIREMENTS)

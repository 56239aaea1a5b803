"""A version that was registered before the model directory had its present format."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from mlflow import MlflowClient

from minigpt.tracking import champion, registry

pytestmark = pytest.mark.usefixtures("clean_environment")

ARCHIVE = Path(__file__).parents[1] / "fixtures/version_of_format_1.tar.gz"

PREDICT = """
import json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
import minigpt
prompts = pandas.DataFrame({"prompt": ["this movie is"]})
print(json.dumps([minigpt.__file__, model.predict(prompts, params={"temperature": 0.0})]))
"""


@pytest.fixture
def version(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "version"


@pytest.mark.slow
def test_its_own_code_still_serves_it(version: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PREDICT, str(version)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    code, texts = json.loads(ran.stdout.splitlines()[-1])
    assert Path(code).is_relative_to(version)
    assert texts == ["This movie is looks looks looks looks I I I I I loved I film"]


def test_the_gate_does_not_compare_with_it(version: Path, store: str, name: str) -> None:
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("minigpt")
    assert experiment
    run = client.create_run(experiment.experiment_id).info.run_id
    client.create_model_version(name, version.as_uri())
    champion.promote(store, name, "1", reason="the first")
    client.create_model_version(name, "file:///nowhere", run)
    challenger = {"version": "2", "measure": 2, "measured_on": "reviews", "bits_per_byte": 1.5}

    def measure(model: object) -> dict[str, float]:
        raise AssertionError("it can't be loaded")

    outcome = registry.challenge(store, name, challenger, {"min_improvement": 0.0}, measure)
    assert outcome["verdict"] == "not compared"
    assert outcome["reason"].startswith("version 1 has an older format; `minigpt promote 2 ")
    tags = client.get_model_version(name, "2").tags
    assert tags["minigpt.gate"] == f"not compared: {outcome['reason']}"
    assert champion.state(store, name).version == "1"
    # As the message says.
    assert champion.promote(store, name, "2", reason="the format is new") == "1"

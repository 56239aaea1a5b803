"""The MLflow registry: a model directory becomes a version of the registered model."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from minigpt import serving
from minigpt.errors import InputError
from minigpt.tracking import Tracker, redact

REQUIREMENTS = ("keras", "mlflow", "numpy", "omegaconf", "pandas", "pyarrow", "tensorflow")


def register(
    tracker: Tracker, model_dir: Path, *, name: str, alias: str, prompts: Sequence[str]
) -> dict[str, str]:
    """Registers a model directory as a pyfunc written as code; nothing is pickled.

    Args:
        tracker: a strict one, of the run that the model belongs to.
        model_dir: the model directory; the same one of the same run is registered once.
        name: the registered model's.
        alias: set to the version.
        prompts: the input example.

    Returns:
        name, version, uri (models:/name/version), alias, run_id and model_sha256.

    Raises:
        InputError: the model directory is missing, or MLflow can't be used or refuses.
    """
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}, the model directory, is missing; run `dvc repro train`")
    digest = _directory_sha256(model_dir)

    def find_or_create(client: MlflowClient) -> str:
        tag = "minigpt.model_sha256"
        for found in client.search_model_versions(f"run_id = '{tracker.run_id}'"):
            if found.name == name and found.tags.get(tag) == digest:
                return str(found.version)
        uri = _log_model(tracker, model_dir.resolve(), prompts)
        return str(mlflow.register_model(uri, name, tags={tag: digest}).version)

    number = tracker.attempt(find_or_create)
    tracker.attempt(lambda client: client.set_registered_model_alias(name, alias, str(number)))
    if tracker.offline:
        raise InputError(f"{name} is not registered: MLflow at {redact(tracker.uri)} is offline")
    return {
        "name": name,
        "version": str(number),
        "uri": f"models:/{name}/{number}",
        "alias": alias,
        "run_id": tracker.run_id,
        "model_sha256": digest,
    }


def _log_model(tracker: Tracker, model_dir: Path, prompts: Sequence[str]) -> str:
    example = serving.example(prompts)
    mlflow.set_tracking_uri(tracker.uri)  # log_model knows no other way
    with mlflow.start_run(run_id=tracker.run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(serving.__file__).resolve()),
            artifacts={"model": str(model_dir)},
            code_paths=[str(Path(__file__).resolve().parent)],
            pip_requirements=[f"{package}=={version(package)}" for package in REQUIREMENTS],
            signature=serving.signature(tracker.config),
            input_example=example,
        )
        # MLflow only warns of a model that doesn't work; one that fails here isn't registered.
        mlflow.pyfunc.load_model(logged.model_uri).predict(*example)
    return str(logged.model_uri)


def _directory_sha256(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name, content = path.relative_to(directory).as_posix(), hashlib.sha256(path.read_bytes())
        digest.update(f"{name}\0{content.hexdigest()}\n".encode())
    return digest.hexdigest()

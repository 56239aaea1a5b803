"""What a version of the registered model consists of: files that need nothing of this project."""

import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from minigpt.common.errors import InputError
from minigpt.config import Config
from minigpt.tracking import pyfunc
from minigpt.tracking.mirror import Mirror
from minigpt.tracking.store import lock

# What the modules import that a version needs to be served.
REQUIREMENTS = (
    "keras",
    "mlflow",
    "numpy",
    "omegaconf",
    "pandas",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "tensorflow",
    "tokenizers",
)


def build(
    folder: Path, model_dir: Path, evaluated: str, prompts: Sequence[str], config: Config
) -> None:
    """Writes a pyfunc as code around a copy of a model directory, and tries it out.

    Args:
        folder: Where to write it; nothing is there yet.
        model_dir: The model directory.
        evaluated: The digest of the model directory whose figures the version gets.
        prompts: The input example.
        config: The sampler's defaults, and the limits of a request.

    Raises:
        InputError: The model directory is not the one that was evaluated, or it is not complete.
    """
    from minigpt.model import directory  # loads Keras

    example = pyfunc.example(prompts)
    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(Path(pyfunc.__file__).resolve()),
        artifacts={"model": model_dir.resolve().as_uri()},
        code_paths=[str(Path(__file__).resolve().parents[1])],
        pip_requirements=[f"{package}=={version(package)}" for package in REQUIREMENTS],
        signature=pyfunc.signature(config),
        model_config=config.tracking.request.model_dump(mode="json"),
        input_example=example,
    )
    held = model_of(folder)
    if held is None or directory.digest(held) != evaluated:
        raise InputError(
            f"{model_dir} was replaced since it was evaluated: run `dvc repro evaluate`"
        )
    mlflow.pyfunc.load_model(str(folder)).predict(*example)
    for compiled in [*folder.rglob("__pycache__")]:
        shutil.rmtree(compiled)


def publish(
    client: MlflowClient,
    mirror: Mirror,
    folder: Path,
    name: str,
    same: Mapping[str, str],
    tags: Mapping[str, str],
) -> ModelVersion:
    """Makes what `build` wrote a version, unless another process does so at the same time.

    Args:
        client: Of the mirror's store.
        mirror: Of the run that the version belongs to.
        folder: What `build` wrote.
        name: Of the registered model.
        same: The tags by which a version of the same model is known.
        tags: All tags of the version.

    Returns:
        The version with the lowest number.
    """
    model_id = _upload(client, mirror.run_id, folder)
    mlflow.set_tracking_uri(mirror.uri)  # where a database looks for `models:/`
    made: ModelVersion | None = None
    with lock(mirror.uri):
        found = alike(client, mirror, name, same)
        if not found:
            _create_registered_model(client, name)
            made = client.create_model_version(
                name, f"models:/{model_id}", mirror.run_id, dict(tags), model_id=model_id
            )
            # On a server, which has no lock, another process may have been faster.
            found = alike(client, mirror, name, same) or [made]
    first = found[0]
    if made and made.version != first.version:
        client.delete_model_version(name, str(made.version))
    if not made or made.version != first.version:
        client.delete_logged_model(model_id)
    return first


def alike(
    client: MlflowClient, mirror: Mirror, name: str, tags: Mapping[str, str]
) -> list[ModelVersion]:
    """Returns the versions with these tags that are of the mirror's run, the first one first."""
    found = [
        each
        for each in client.search_model_versions(f"name = '{name}'")
        if tags.items() <= each.tags.items() and mirror.is_run(client, str(each.run_id))
    ]
    return sorted(found, key=lambda each: int(each.version))


def model_of(folder: Path) -> Path | None:
    """Returns the model directory among the files of a version, or None if it holds none."""
    root = folder.resolve()
    try:
        described = yaml.safe_load((root / "MLmodel").read_text(encoding="utf-8"))
        held = described["flavors"]["python_function"]["artifacts"]["model"]["path"]
        directory = (root / held).resolve()
    except (FileNotFoundError, LookupError, RecursionError, TypeError, ValueError, yaml.YAMLError):
        return None
    return directory if directory.is_relative_to(root) and directory.is_dir() else None


def _upload(client: MlflowClient, run_id: str, folder: Path) -> str:
    """Uploads the files as a logged model of a run, and returns its id."""
    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, "model", run_id, params=run.data.params
    )
    described = Model.load(str(folder))
    described.run_id, described.model_id = run_id, logged.model_id
    described.save(str(folder / "MLmodel"))
    client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return str(logged.model_id)


def _create_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise

"""The MLflow registry: a model directory becomes a version of the registered model."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.models import Model

from minigpt.common.errors import InputError
from minigpt.tracking import champion, gate, pyfunc
from minigpt.tracking.mirror import Tracker, redact

REQUIREMENTS = ("keras", "mlflow", "numpy", "omegaconf", "pandas", "pyarrow", "tensorflow")
OUTCOME = "minigpt.outcome"


def register(
    tracker: Tracker,
    model_dir: Path,
    *,
    name: str,
    alias: str,
    prompts: Sequence[str],
    tags: Mapping[str, str],
) -> dict[str, str]:
    """Registers a model directory as a pyfunc written as code; nothing is pickled.

    Args:
        tracker: a strict one, of the run that the model belongs to.
        model_dir: the model directory; the same one of the same run is registered once, unless the
            limits of a request (`tracking.request` of the configuration) are others.
        name: the registered model's.
        alias: set to the version.
        prompts: the input example.
        tags: the version's, beside the run, the commit and DVC's digests of the data.

    Returns:
        name, version, uri (models:/name/version), alias, run_id and model_sha256.

    Raises:
        InputError: the model directory is missing, or MLflow can't be used or refuses.
    """
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}, the model directory, is missing; run `dvc repro train`")
    digest = _directory_sha256(model_dir)

    def find_or_create(client: MlflowClient) -> str:
        request = json.dumps(tracker.config["tracking"]["request"], sort_keys=True)
        same = {"minigpt.model_sha256": digest, "minigpt.request": request}
        wanted = {**tags, **_lineage(client.get_run(tracker.run_id)), **same}
        for found in client.search_model_versions(f"run_id = '{tracker.run_id}'"):
            if found.name == name and same.items() <= found.tags.items():
                for key, value in wanted.items() - found.tags.items():  # measured again since
                    client.set_model_version_tag(name, found.version, key, value)
                return str(found.version)
        uri = _log_model(tracker, model_dir.resolve(), prompts)
        return str(mlflow.register_model(uri, name, tags=wanted).version)

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


def challenge(
    uri: str,
    name: str,
    challenger: Mapping[str, Any],
    settings: Mapping[str, float],
    measure: Callable[[Path], Mapping[str, float]],
) -> dict[str, Any]:
    """Decides whether a registered version becomes the champion, does it and records the outcome.

    The champion's own figures count where it was measured on the same reviews, with the same byte
    unigram and the same vocabulary; else it is measured again.  What was decided for a version
    stays decided: with the same figures and settings, the recorded outcome is returned and no alias
    is touched.

    Args:
        uri: of the store.
        name: the registered model's.
        challenger: version, held_out and byte_unigram (as `gate.measured_on` has them), vocabulary
            (its digest) and the figures.
        settings: the section `gate` of the configuration.
        measure: gives the figures of a model directory on the challenger's reviews.

    Returns:
        verdict, reason, settings, challenger and champion: the one before, in the same form and
        with `measured` (recorded or again), None where there was none.

    Raises:
        InputError: MLflow can't be used.
    """
    number = challenger["version"]
    with champion.store(uri) as client:
        recorded = json.loads(client.get_model_version(name, number).tags.get(OUTCOME, "{}"))
    if (recorded.get("challenger"), recorded.get("settings")) == (challenger, settings):
        return dict(recorded)
    while True:
        now = champion.state(uri, name)
        # Without a record, an interrupted registration made it the champion: decided as before.
        before, theirs = now.version if recorded else now.before_the_gate(number), None
        if before == number:  # by hand, or with other settings
            verdict, reason = "promoted", "it is the champion already"
        else:
            if before and challenger["held_out"]:
                theirs = _champion(uri, name, before, challenger, measure)
            mine, bits = challenger.get("bits_per_byte"), (theirs or {}).get("bits_per_byte")
            verdict, reason = gate.decide(mine, before, bits, settings["min_improvement"])
        if verdict != "promoted" or champion.move(
            uri, name, number, how="gate", reason=reason, expected=now.version
        ):
            break
    outcome = {
        "verdict": verdict,
        "reason": reason + (f": {theirs['problem']}" if theirs and "problem" in theirs else ""),
        "settings": dict(settings),
        "challenger": dict(challenger),
        "champion": theirs or (before and {"version": before}),
    }
    with champion.store(uri) as client:
        text = f"{verdict}: {outcome['reason']}"
        client.set_model_version_tag(name, number, "minigpt.gate", text)
        client.set_model_version_tag(name, number, OUTCOME, json.dumps(outcome))
    return outcome


def fetch(uri: str, name: str, number: str, folder: Path) -> Path | None:
    """Downloads a version's model directory; no code that came with it is run.

    Args:
        uri: of the store.
        name: the registered model's.
        number: of the version.
        folder: where to.

    Returns:
        The model directory; None where the version, made elsewhere, holds none.

    Raises:
        InputError: MLflow can't be used.
    """
    with champion.store(uri):
        mlflow.set_tracking_uri(uri)  # download_artifacts knows no other way
        local = mlflow.artifacts.download_artifacts(
            f"models:/{name}/{number}", dst_path=str(folder)
        )
    try:
        held = Model.load(local).flavors["python_function"]["artifacts"]["model"]["path"]
        directory = Path(local, held).resolve()
    except Exception:  # MLflow raises many kinds for a description that it did not write
        return None
    return directory if directory.is_relative_to(Path(local).resolve()) else None


def _champion(
    uri: str,
    name: str,
    number: str,
    challenger: Mapping[str, Any],
    measure: Callable[[Path], Mapping[str, float]],
) -> dict[str, Any]:
    """The champion's figures on the challenger's reviews."""
    data = {key: challenger[key] for key in ("held_out", "byte_unigram")}
    same = {**data, "vocabulary": challenger["vocabulary"]}
    with champion.store(uri) as client:
        tags = client.get_model_version(name, number).tags
    recorded = json.loads(tags.get(OUTCOME, "{}")).get("challenger", {})
    if same.items() <= recorded.items():
        return {**recorded, "measured": "recorded"}
    with tempfile.TemporaryDirectory() as folder:
        directory = fetch(uri, name, number, Path(folder))
        try:
            if directory is None:
                raise InputError("it holds no model directory")
            measured = measure(directory)
        except InputError as error:
            return {"version": number, "measured": "not", "problem": str(error)}
    return {"version": number, **measured, **data, "measured": "again"}


def _lineage(run: Run) -> dict[str, str]:
    tags = {"minigpt.run_id": run.info.run_id}
    if commit := run.data.tags.get("mlflow.source.git.commit"):
        tags["git.commit"] = commit
    wanted = ("dvc.lock:data/reviews.parquet", "dvc.lock:data/sequences")
    return tags | {key: run.data.tags[key] for key in wanted if key in run.data.tags}


def _log_model(tracker: Tracker, model_dir: Path, prompts: Sequence[str]) -> str:
    example = pyfunc.example(prompts)
    mlflow.set_tracking_uri(tracker.uri)  # log_model knows no other way
    with mlflow.start_run(run_id=tracker.run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(pyfunc.__file__).resolve()),
            artifacts={"model": str(model_dir)},
            code_paths=[str(Path(__file__).resolve().parents[1])],
            pip_requirements=[f"{package}=={version(package)}" for package in REQUIREMENTS],
            signature=pyfunc.signature(tracker.config),
            model_config=dict(tracker.config["tracking"]["request"]),
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

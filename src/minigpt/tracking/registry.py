"""The MLflow registry: a model directory becomes a version of the registered model."""

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.models_artifact_repo import REGISTERED_MODEL_META_FILE_NAME

from minigpt import config
from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.common.redaction import redact
from minigpt.tracking import champion, deadline, gate, store, version
from minigpt.tracking.mirror import Mirror
from minigpt.tracking.store import open_store

if TYPE_CHECKING:
    from minigpt.model.directory import ModelDirectory

# Tags of a version, beside its figures.
MODEL = "minigpt.model"
REQUEST = "minigpt.request"
MEASURED = {"measure": "minigpt.measure", "measured_on": "minigpt.measured_on"}
VERDICT = "minigpt.gate"
LONGEST_DESCRIPTION = 5000  # characters, MLflow's limit

Measure = Callable[["ModelDirectory"], Mapping[str, float]]


def register(
    mirror: Mirror,
    model_dir: Path,
    *,
    evaluated: str,
    name: str,
    alias: str,
    prompts: Sequence[str],
    tags: Mapping[str, Any],
    description: Callable[[str], str],
) -> dict[str, str]:
    """Registers a model directory as a pyfunc written as code; nothing is pickled.

    The same model of the same run is registered once, unless the limits of a request
    (`tracking.request` of the configuration) differ. Of two processes that register it at the same
    time, the one with the higher number takes its version back.

    Args:
        mirror: A strict one, of the run that the model belongs to.
        model_dir: The model directory.
        evaluated: The digest of the model directory that the figures are of.
        name: Of the registered model.
        alias: Set to the version.
        prompts: The input example.
        tags: Of the version: the figures, and `measured_tags`; None leaves one out.
        description: Returns the version's description, in Markdown, for the version's number.

    Returns:
        name, version, uri (models:/name/version), alias, run_id and model, the directory's digest.

    Raises:
        InputError: The model directory is missing or is not the one that was evaluated, or MLflow
            can't be used or refuses.
    """
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}, the model directory, is missing; run `dvc repro train`")
    same = {MODEL: evaluated[:12], REQUEST: _request(mirror.config.tracking.request)}
    wanted = same | {key: str(value) for key, value in tags.items() if value is not None}

    def alike(client: MlflowClient) -> list[ModelVersion]:
        return version.alike(client, mirror, name, same)

    def find_or_create(client: MlflowClient) -> ModelVersion:
        found = alike(client)
        made = found[0] if found else version.publish(client, mirror, folder, name, same, wanted)
        number = str(made.version)
        for key, value in wanted.items() - made.tags.items():  # measured again since
            client.set_model_version_tag(name, number, key, value)
        client.update_model_version(name, number, description(number)[:LONGEST_DESCRIPTION])
        client.set_registered_model_alias(name, alias, number)
        return made

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "version")
        if mirror.attempt(alike) == []:
            version.build(folder, model_dir, evaluated, prompts, mirror.made_with())
        made = mirror.attempt(find_or_create)
    if made is None:
        raise InputError(f"{name} is not registered: MLflow at {redact(mirror.uri)} failed before")
    return {
        "name": name,
        "version": str(made.version),
        "uri": f"models:/{name}/{made.version}",
        "alias": alias,
        "run_id": str(made.run_id),
        "model": evaluated,
    }


def challenge(
    uri: str,
    name: str,
    challenger: Mapping[str, Any],
    settings: Mapping[str, Any],
    measure: Measure,
    *,
    promotes: bool = True,
) -> dict[str, Any]:
    """Decides whether a registered version becomes the champion, does it and records the outcome.

    The champion's own figures count if they were measured under the same measure, on the same
    reviews with the same vocabulary; otherwise it is measured again. A decision stands: with the
    same figures and settings, the recorded outcome is returned and no alias is touched. Only one
    that had to be left to a person is made again where the gate may promote.

    Args:
        uri: The address of the store.
        name: Of the registered model.
        challenger: version, measure and measured_on (see `gate`), and the figures.
        settings: The section `gate` of the configuration.
        measure: Returns the figures of a loaded model on the challenger's reviews.
        promotes: Whether a better version becomes the champion; if not, its verdict is
            "not promoted", and a person decides.

    Returns:
        verdict, reason, settings, challenger, and champion: the one before, in the same form and
        with `measured` (recorded, again or not), or None if there was none.

    Raises:
        InputError: MLflow can't be used.
    """
    number = challenger["version"]
    recorded = _recorded(uri, name, number)
    if (recorded.get("challenger"), recorded.get("settings")) == (challenger, settings) and not (
        promotes and recorded["verdict"] == gate.BY_HAND
    ):
        return recorded
    while True:
        now = champion.state(uri, name)
        # Without a record, an interrupted registration may have made it the champion; that
        # decision is made again.
        before, theirs = now.version if recorded else now.before_the_gate(number), None
        if before == number:  # by hand, or with other settings
            verdict, reason = "promoted", "it is the champion already"
        else:
            if before and challenger["measured_on"]:
                theirs = _champion(uri, name, before, challenger, measure)
            mine, bits = challenger.get("bits_per_byte"), (theirs or {}).get("bits_per_byte")
            verdict, reason = gate.decide(mine, before, bits, settings["min_improvement"])
            if verdict == "promoted" and not promotes:
                verdict = gate.BY_HAND
        if verdict != "promoted" or champion.move(
            uri, name, number, how="gate", reason=reason, expected=now.version
        ):
            break
    if verdict == "not compared" and theirs:
        command = f"`minigpt promote {number} --reason ...`"
        reason = f"{theirs.get('problem', reason)}; {command} makes this version the champion"
    if verdict == gate.BY_HAND:
        reason += (
            "; an experiment in a copy of the project is promoted by hand: "
            f"`minigpt promote {number} --reason ...`"
        )
    outcome = {
        "verdict": verdict,
        "reason": reason,
        "settings": dict(settings),
        "challenger": dict(challenger),
        "champion": theirs or (before and {"version": before}),
    }
    with open_store(uri) as client:
        client.set_model_version_tag(name, number, VERDICT, f"{verdict}: {reason}")
        client.log_dict(_run_of(client, name, number), outcome, f"gate/{_record(name, number)}")
    return outcome


class Version(NamedTuple):
    """A version of a registered model.

    Attributes:
        number: In the registry.
        figures: The figures it was registered with.
        created_s: When it was made, in Unix seconds.
    """

    number: str
    figures: dict[str, float]
    created_s: int


def find(uri: str, name: str, wanted: str) -> Version:
    """Finds a version by its number, or by an alias such as @champion.

    Args:
        uri: The address of the store.
        name: Of the registered model.
        wanted: A number, or an alias after an @.

    Raises:
        InputError: There is no such version, or MLflow can't be used.
    """
    with open_store(uri) as client:
        try:
            if wanted.startswith("@"):
                found = client.get_model_version_by_alias(name, wanted[1:])
            else:
                found = client.get_model_version(name, wanted)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            every = client.search_model_versions(f"name = '{name}'")
            there = ", ".join(map(str, sorted(int(each.version) for each in every))) or "none"
            raise InputError(
                f"MLflow at {redact(uri)} has no {name} {wanted}; its versions: {there}; "
                "`minigpt history` lists the champions, and `minigpt promote` makes one"
            ) from None
    figures = {key: float(found.tags[key]) for key in gate.FIGURES if key in found.tags}
    return Version(str(found.version), figures, int(found.creation_timestamp) // 1000)


def measured_tags(measured: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tags of a version that say how its figures were measured.

    Args:
        measured: measure, the number, and measured_on (see `gate`), which may be None.
    """
    return {tag: str(measured[key]) for key, tag in MEASURED.items() if measured[key] is not None}


def fetch(uri: str, name: str, number: str, folder: Path) -> Path | None:
    """Downloads the model directory of a version; no code that came with it is run.

    Args:
        uri: The address of the store.
        name: Of the registered model.
        number: Of the version.
        folder: Where to put it.

    Returns:
        The model directory; None if the version, made elsewhere, holds none.

    Raises:
        InputError: MLflow can't be used, or has no file of the version.
    """
    mlflow.set_tracking_uri(uri)  # download_artifacts ignores its own argument for models
    with open_store(uri):
        local = deadline.within(
            store.OPERATION_S,
            lambda: mlflow.artifacts.download_artifacts(
                f"models:/{name}/{number}", dst_path=str(folder)
            ),
            received=lambda: deadline.size(folder),
        )
    # Of a place that is not there, such as a disk that is not mounted, MLflow downloads nothing.
    if not any(
        path.is_file() and path.name != REGISTERED_MODEL_META_FILE_NAME
        for path in Path(local).rglob("*")
    ):
        raise InputError(
            f"MLflow at {redact(uri)} has no file of version {number} of {name}: bring its "
            "artifacts back, then run this again; or decide by hand: `minigpt promote VERSION "
            f"--model {shlex.quote(name)} --reason ...`"
        )
    return version.model_of(Path(local))


def _champion(
    uri: str, name: str, number: str, challenger: Mapping[str, Any], measure: Measure
) -> dict[str, Any]:
    """Returns the champion's figures on the challenger's reviews.

    Only what the version itself holds can be the reason why it was not measured. A full disk, a
    lost connection or artifacts that are out of reach are errors, since the comparison may succeed
    when it is repeated.
    """
    with open_store(uri) as client:
        tags = client.get_model_version(name, number).tags
    if measured_tags(challenger).items() <= tags.items():
        figures = {key: float(tags[key]) for key in gate.FIGURES if key in tags}
        return {"version": number, **figures, "measured": "recorded"}
    from minigpt.model import directory  # loads Keras

    with tempfile.TemporaryDirectory() as folder:
        path = fetch(uri, name, number, Path(folder))
        try:
            if path is None:
                raise InputError("it holds no model directory")
            loaded = directory.load(path)
        except directory.OlderFormat:
            problem = f"version {number} has an older format"
        except InputError as error:
            problem = f"version {number} can't be loaded: {error}"
        else:
            return {"version": number, **measure(loaded), "measured": "again"}
    return {"version": number, "measured": "not", "problem": problem}


def _recorded(uri: str, name: str, number: str) -> dict[str, Any]:
    """Returns the outcome of the version's challenge, if it was decided before."""
    with open_store(uri) as client, tempfile.TemporaryDirectory() as folder:
        run_id = _run_of(client, name, number)
        path = f"gate/{_record(name, number)}"
        if path not in {file.path for file in client.list_artifacts(run_id, "gate")}:
            return {}
        local = Path(client.download_artifacts(run_id, path, folder))
        return dict(files.read_json(local))


def _run_of(client: MlflowClient, name: str, number: str) -> str:
    return str(client.get_model_version(name, number).run_id)


def _record(name: str, number: str) -> str:
    return f"{name}_{number}.json"


def _request(limits: config.RequestConfig) -> str:
    return ", ".join(f"{value} {key.removeprefix('max_')}" for key, value in limits)

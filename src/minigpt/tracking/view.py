"""The experiment in MLflow, and its page in the UI: links to the runs, and a view with losses.

By itself the UI opens an experiment on pages for agents, and its table of runs has no metric. A
view can be saved (MLflow 3.15 and later, under Views). It is a tag of the experiment, in a form
that only the UI's code shows: a version that keeps views elsewhere ignores ours, and the links
still lead to the runs.
"""

import json
import os
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from minigpt.common.errors import InputError
from minigpt.tracking import store

NAME = "losses"
_BY_EPOCH = ("loss", "val_loss", "val_bits_per_byte")
_BY_STEP = ("train_loss",)
_METRICS = (*_BY_EPOCH, "evaluate/bits_per_byte")
_PARAMETERS = ("train.epochs", "train.learning_rate", "train.batch_size", "model.dropout")
_COLUMNS = [
    *(f"metrics.`{name}`" for name in _METRICS),
    *(f"params.`{name}`" for name in _PARAMETERS),
    "tags.`minigpt.gate`",
]
_LINE = {"type": "LINE", "xAxisKey": "step", "lineSmoothness": 0}
_TABLE = {"type": "DIFFERENCE", "metricSectionId": "table", "compareGroups": ["Parameters"]}
_STATE: dict[str, Any] = {
    "selectedColumns": _COLUMNS,
    "columnOrder": _COLUMNS,
    "columnWidths": dict.fromkeys(_COLUMNS, 150),
    "orderByKey": "metrics.`val_bits_per_byte`",
    "orderByAsc": True,
    "isAccordionReordered": True,
    "compareRunSections": [
        {"uuid": "epochs", "name": "Losses by epoch", "columns": 2, "display": True},
        {"uuid": "steps", "name": "Training loss by step", "columns": 2, "display": True},
        {"uuid": "table", "name": "Parameters that differ", "columns": 1, "display": True},
    ],
    "compareRunCharts": [
        *(
            {**_LINE, "metricSectionId": section, "uuid": name, "metricKey": name}
            for section, names in (("epochs", _BY_EPOCH), ("steps", _BY_STEP))
            for name in names
        ),
        {**_TABLE, "uuid": "table", "showDifferencesOnly": True},
    ],
}

_TAG = f"mlflow.sharedViewState.{NAME}"
_VIEW = json.dumps({"name": "Losses", "createdAt": 0, "updatedAt": 0, "state": json.dumps(_STATE)})


def experiment(client: MlflowClient, uri: str) -> str:
    """Returns the id of the experiment, which is made if there is none and has the view.

    Args:
        client: Of the store.
        uri: The store's address. The artifacts of a sqlite file lie beside it.

    Raises:
        InputError: The experiment was deleted.
    """
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "minigpt"
    found = client.get_experiment_by_name(name)
    if found is None:
        path = store.sqlite_path(uri)
        location = (path.parent / "mlartifacts").as_uri() if path else None
        try:
            made = client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # made a moment ago, on a server
                raise
            return experiment(client, uri)
        furnish(client, made)
        return made
    if found.lifecycle_stage != "deleted" and found.tags.get(_TAG) != _VIEW:
        client.set_experiment_tag(found.experiment_id, _TAG, _VIEW)
    if found.lifecycle_stage == "deleted":
        restore = store.command(uri, "experiments", "restore", "-x", found.experiment_id)
        raise InputError(
            f"the experiment {name!r} was deleted: restore it (`{restore}`), or choose another "
            "name (MLFLOW_EXPERIMENT_NAME)"
        )
    return found.experiment_id


def furnish(client: MlflowClient, experiment_id: str) -> None:
    """Saves the view, and writes the links into the experiment's description."""
    client.set_experiment_tag(experiment_id, _TAG, _VIEW)
    page = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    page += f"&viewStateShareKey={NAME}&compareRunsMode="
    links = f"[Table of the runs]({page}TABLE), [curves and differing parameters]({page}CHART)"
    client.set_experiment_tag(experiment_id, "mlflow.note.content", links)

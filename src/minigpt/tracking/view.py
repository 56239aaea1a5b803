"""The page of the experiment in MLflow's UI: links to its runs, and a view of them with losses.

By itself the UI opens an experiment on pages for agents, and its table of runs has no metric. A
view can be saved (MLflow 3.15 and later, under Views). It is a tag of the experiment, in a form
that only the UI's code shows: a version that keeps views elsewhere ignores ours, and the links
still lead to the runs.
"""

import json
from typing import Any

from mlflow import MlflowClient

NAME = "losses"
_CURVES = ("loss", "val_loss")
_METRICS = (*_CURVES, "val_perplexity", "evaluate/bits_per_byte")
_PARAMETERS = ("train.epochs", "train.learning_rate", "train.batch_size", "model.dropout")
_COLUMNS = [
    *(f"metrics.`{name}`" for name in _METRICS),
    *(f"params.`{name}`" for name in _PARAMETERS),
    "tags.`minigpt.gate`",
]
_LINE = {"type": "LINE", "metricSectionId": "curves", "xAxisKey": "step", "lineSmoothness": 0}
_TABLE = {"type": "DIFFERENCE", "metricSectionId": "table", "compareGroups": ["Parameters"]}
_STATE: dict[str, Any] = {
    "selectedColumns": _COLUMNS,
    "columnOrder": _COLUMNS,
    "columnWidths": dict.fromkeys(_COLUMNS, 150),
    "orderByKey": "metrics.`val_loss`",
    "orderByAsc": True,
    "isAccordionReordered": True,
    "compareRunSections": [
        {"uuid": "curves", "name": "Losses by epoch", "columns": 2, "display": True},
        {"uuid": "table", "name": "Parameters that differ", "columns": 1, "display": True},
    ],
    "compareRunCharts": [
        *({**_LINE, "uuid": name, "metricKey": name} for name in _CURVES),
        {**_TABLE, "uuid": "table", "showDifferencesOnly": True},
    ],
}


def furnish(client: MlflowClient, experiment_id: str) -> None:
    """Saves the view, and writes the links into the experiment's description."""
    view = {"name": "Losses", "createdAt": 0, "updatedAt": 0, "state": json.dumps(_STATE)}
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{NAME}", json.dumps(view))
    page = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    page += f"&viewStateShareKey={NAME}&compareRunsMode="
    links = f"[Table of the runs]({page}TABLE), [curves and differing parameters]({page}CHART)"
    client.set_experiment_tag(experiment_id, "mlflow.note.content", links)

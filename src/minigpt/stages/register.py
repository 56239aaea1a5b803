"""model/ -> a version of the registered model in MLflow."""

import json
import logging
from pathlib import Path

import tensorflow  # noqa: F401 - here, while what it prints as it loads is kept from the log

from minigpt import config, registry, tracking
from minigpt.stages import output, paths

log = logging.getLogger(__name__)


def run() -> None:
    """Registers the model directory, after whatever MLflow missed of its run."""
    everything = config.load(paths.RESOLVED)
    train_id = json.loads(paths.RUN.read_text())["train_id"]
    tracker = tracking.Tracker(train_id, config.as_dict(everything), Path.cwd(), strict=True)
    tracking.replay(tracker, paths.REPORTS)
    registered = registry.register(
        tracker,
        paths.MODEL,
        name=everything.tracking.model_name,
        alias=everything.tracking.alias,
        prompts=everything.sample.prompts[:1],
    )
    output.write_json(paths.REGISTERED, registered)
    log.info("registered %s as @%s", registered["uri"], registered["alias"])

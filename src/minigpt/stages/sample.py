"""model/ and the prompts -> reports/samples.txt and samples.jsonl."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from minigpt import config
from minigpt.common import files, paths
from minigpt.generation.decoding import Generator, Sampling
from minigpt.model import directory
from minigpt.tracking.mirror import Tracker, replay

log = logging.getLogger(__name__)


def run() -> None:
    """Writes reviews with the trained model."""
    everything = config.load(paths.RESOLVED)
    sampling = asdict(everything.sample)
    each = sampling.pop("reviews_per_prompt")
    prompts = [prompt for prompt in sampling.pop("prompts") for _ in range(each)]
    trained = directory.load(paths.MODEL)
    write = Generator(trained.network, trained.vocabulary, trained.config["vocabulary"]["style"])
    texts = write(prompts, Sampling(**sampling))
    rows = [{"prompt": p, "text": t, **sampling} for p, t in zip(prompts, texts, strict=True)]
    files.write_json_lines(paths.SAMPLES, rows)
    files.write_text(paths.SAMPLES_TEXT, "\n\n".join(texts) + "\n")
    log.info("%s reviews in %s", len(texts), paths.SAMPLES_TEXT)
    train_id = json.loads(paths.RUN.read_text())["train_id"]
    replay(Tracker(train_id, config.as_dict(everything), Path.cwd()), paths.REPORTS)

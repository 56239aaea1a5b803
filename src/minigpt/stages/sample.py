"""Writes reviews with the trained model: model/ and prompts -> reports/samples.*."""

import logging
from pathlib import Path

from minigpt import config
from minigpt.common import files, paths
from minigpt.config import SamplingConfig
from minigpt.generation.decoding import Generator
from minigpt.generation.prompts import known
from minigpt.model import directory
from minigpt.tracking.mirror import Mirror

log = logging.getLogger(__name__)


def run() -> None:
    """Writes the reviews that the section `sample` asks for."""
    settings = config.load(paths.RESOLVED)
    sampling = settings.sample
    trained = directory.load(paths.MODEL)
    prompts = [
        prompt
        for prompt in known(trained.tokenizer, sampling.prompts, "sample.prompts")
        for _ in range(sampling.reviews_per_prompt)
    ]
    texts = Generator(trained.network, trained.tokenizer).continued(prompts, sampling)

    chosen = sampling.model_dump(mode="json", include=set(SamplingConfig.model_fields))
    rows = [
        {"prompt": prompt, "text": text, "ended": ended, **chosen, "model": trained.sha256}
        for prompt, (text, ended) in zip(prompts, texts, strict=True)
    ]
    files.write_json_lines(paths.SAMPLES, rows)
    unfinished = " [...]" if trained.tokenizer.separator is not None else ""
    shown = [text if ended else text + unfinished for text, ended in texts]
    files.write_text(paths.SAMPLES_TEXT, "\n\n".join(shown) + "\n")
    log.info("%s reviews in %s", len(texts), paths.SAMPLES_TEXT)
    Mirror(Path.cwd(), settings).send()

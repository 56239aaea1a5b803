"""Fetches the corpus: corpus.url -> data/reviews.parquet."""

import logging
from pathlib import Path

from minigpt import config
from minigpt.common import paths, progress
from minigpt.data import archive, corpus, download, own_files

log = logging.getLogger(__name__)


def run() -> None:
    """Downloads the archive, or reads files of the user's own, into one table of reviews."""
    settings = config.load(paths.RESOLVED).corpus
    if settings.format == "archive":
        bar = progress.bar(f"download {settings.url}", "B", scale=True)
        path = download.fetch(settings.url, settings.sha256, paths.DOWNLOADS, bar)
        log.info("reading %s", path)
        reviews = archive.read(path, settings, paths.REVIEWS.parent)
    else:
        reviews = own_files.read(Path(settings.url), settings)
    count = corpus.write_reviews(reviews, paths.REVIEWS)
    log.info("%s reviews in %s", f"{count:,}", paths.REVIEWS)

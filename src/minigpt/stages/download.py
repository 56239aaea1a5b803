"""corpus.url -> data/reviews.parquet."""

import logging
from pathlib import Path

from minigpt import config
from minigpt.common import paths, progress
from minigpt.data import archive, corpus, download

log = logging.getLogger(__name__)


def run() -> None:
    """Fetches the archive, or takes files of your own, and keeps the reviews as one table."""
    settings = config.load(paths.RESOLVED).corpus
    limits = archive.Limits(settings.max_bytes, settings.max_members, settings.max_ratio)
    if settings.format == "archive":
        bar = progress.bar(f"download {settings.url}", "B", scale=True)
        path = download.fetch(settings.url, settings.sha256, paths.DOWNLOADS, bar)
        log.info("reading %s", path)
        reviews = archive.read_archive(
            path, settings.folders, settings.undecodable, limits, paths.REVIEWS.parent
        )
    else:
        path, column = Path(settings.url), settings.text_column
        reviews = archive.read_files(path, column, settings.undecodable, limits)
    count = corpus.write_reviews(reviews, paths.REVIEWS)
    log.info("%s reviews in %s", f"{count:,}", paths.REVIEWS)

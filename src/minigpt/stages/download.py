"""corpus.url -> data/reviews.parquet."""

import logging
from pathlib import Path

from minigpt import config, corpus
from minigpt.stages import output, paths

log = logging.getLogger(__name__)


def run() -> None:
    """Fetches the archive, or takes files of your own, and keeps the reviews as one table."""
    settings = config.load(paths.RESOLVED).corpus
    limits = corpus.Limits(settings.max_bytes, settings.max_members, settings.max_ratio)
    if settings.format == "archive":
        bar = output.progress(f"download {settings.url}", "B", scale=True)
        archive = corpus.fetch(settings.url, settings.sha256, paths.DOWNLOADS, bar)
        log.info("reading %s", archive)
        reviews = corpus.read_archive(
            archive, settings.folders, settings.undecodable, limits, paths.REVIEWS.parent
        )
    else:
        path, column = Path(settings.url), settings.text_column
        reviews = corpus.read_files(path, column, settings.undecodable, limits)
    count = corpus.write_reviews(reviews, paths.REVIEWS)
    log.info("%s reviews in %s", f"{count:,}", paths.REVIEWS)

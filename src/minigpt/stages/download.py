"""corpus.url -> data/reviews.parquet."""

import logging
from pathlib import Path

from minigpt import config, corpus, download, reading
from minigpt.stages import output, paths

log = logging.getLogger(__name__)


def run() -> None:
    """Fetches the archive, or takes files of your own, and keeps the reviews as one table."""
    settings = config.load(paths.RESOLVED).corpus
    limits = reading.Limits(settings.max_bytes, settings.max_members, settings.max_ratio)
    if settings.format == "archive":
        bar = output.progress(f"download {settings.url}", "B", scale=True)
        archive = download.fetch(settings.url, settings.sha256, paths.DOWNLOADS, bar)
        log.info("reading %s", archive)
        reviews = reading.read_archive(
            archive, settings.folders, settings.undecodable, limits, paths.REVIEWS.parent
        )
    else:
        path, column = Path(settings.url), settings.text_column
        reviews = reading.read_files(path, column, settings.undecodable, limits)
    count = corpus.write_reviews(reviews, paths.REVIEWS)
    log.info("%s reviews in %s", f"{count:,}", paths.REVIEWS)

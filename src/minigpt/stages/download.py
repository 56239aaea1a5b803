"""Fetches the corpus: corpus.url -> data/reviews.parquet, or a table of shards at an address."""

import logging
import os

from minigpt import config
from minigpt.common import paths, progress
from minigpt.data import archive, corpus, download, own_files, stored

log = logging.getLogger(__name__)


def run() -> None:
    """Downloads the archive, or reads files of the user's own, into one table of reviews."""
    settings = config.load(paths.RESOLVED)
    chosen, storage = settings.corpus, settings.engine.storage
    if storage:
        stored.check(storage)
    if chosen.format == "archive":
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings show whole addresses
        signed = os.environ.get(download.SIGNED_URL, "").strip()
        url, key = (signed, download.SIGNED_URL) if signed else (chosen.url, "corpus.url")
        bar = progress.bar(f"download {download.shown(url)}", "B", scale=True)
        path = download.fetch(url, chosen.sha256, paths.DOWNLOADS, bar, key=key)
        log.info("reading %s", path)
        reviews = archive.read(path, chosen, paths.REVIEWS.parent)
    else:
        reviews = own_files.read(chosen.url, chosen)
    bar = progress.bar("reviews", "reviews")
    if storage:
        count = corpus.write_shards(reviews, paths.REVIEWS, storage, bar)
    else:
        count = corpus.write_reviews(reviews, paths.REVIEWS, bar)
    log.info("%s reviews in %s", f"{count:,}", paths.REVIEWS)

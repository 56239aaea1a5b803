"""Fetches the corpus: corpus.url -> data/reviews.parquet."""

import logging
import os

from minigpt import config
from minigpt.common import paths, progress
from minigpt.data import archive, corpus, download, own_files

log = logging.getLogger(__name__)


def run() -> None:
    """Downloads the archive, or reads files of the user's own, into one table of reviews."""
    settings = config.load(paths.RESOLVED).corpus
    if settings.format == "archive":
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings show whole addresses
        signed = os.environ.get(download.SIGNED_URL, "").strip()
        url, key = (signed, download.SIGNED_URL) if signed else (settings.url, "corpus.url")
        bar = progress.bar(f"download {download.shown(url)}", "B", scale=True)
        path = download.fetch(url, settings.sha256, paths.DOWNLOADS, bar, key=key)
        log.info("reading %s", path)
        reviews = archive.read(path, settings, paths.REVIEWS.parent)
    else:
        reviews = own_files.read(settings.url, settings)
    count = corpus.write_reviews(reviews, paths.REVIEWS, progress.bar("reviews", "reviews"))
    log.info("%s reviews in %s", f"{count:,}", paths.REVIEWS)

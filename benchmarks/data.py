"""Rows about what precedes training: the vocabulary, the sequences, DVC, and a large corpus."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from benchmarks import script
from benchmarks.measure import (
    PROJECT,
    SAMPLE,
    NotMeasuredError,
    Options,
    Result,
    compare,
    run,
    timed,
)
from minigpt.config import CorpusConfig, SequencesConfig
from minigpt.data import archive, bpe, corpus, cutting, sequences, shards, tokenizer
from minigpt.data.interface import Tokenizer

FOLDERS = [f"aclImdb/{split}/{label}" for split in ("train", "test") for label in ("pos", "neg")]
BATCH = 128
LEARNED = 7_600  # reviews that bpe learns from: 10 MB, the default of vocabulary.sample_bytes


def existing(path: Path) -> Path:
    """Returns the archive, or in a tiny run the embedded sample."""
    path = SAMPLE if script.TINY else path
    if not path.exists():
        raise NotMeasuredError(f"{path} is missing: give aclImdb_v1.tar.gz with --archive")
    return path


@functools.cache
def texts(path: Path) -> pa.Array:
    """Returns the reviews of an archive, or in a tiny run a few of the sample."""
    path = existing(path)
    config = CorpusConfig(format="archive", url=str(path), sha256="0" * 64, folders=FOLDERS)
    found = pa.Table.from_batches(archive.read(path, config))["text"].combine_chunks()
    return found.slice(0, 600) if script.TINY else found


def vocabularies(options: Options) -> Result:
    """Seconds to build the vocabulary of all reviews in memory, and whether both are identical."""
    import tensorflow as tf

    reviews = texts(options.archive)
    data = tf.data.Dataset.from_tensor_slices(reviews.to_pylist()).batch(BATCH)
    layers: list[Any] = []
    words: list[tokenizer.WordTokenizer] = []

    def there() -> None:
        layers[:] = [script.vectorizer()]
        layers[0].adapt(data)

    def here() -> None:
        words[:] = [build(reviews)]

    seconds = compare(here, there, options.rounds)
    facts = {"reviews": len(reviews), "entries": len(words[0])}
    same = list(words[0].tokens) == layers[0].get_vocabulary()
    return Result(*seconds, {**facts, "identical": same})


def preparation(options: Options) -> Result:
    """Seconds to write vocabulary and sequences, against adapt and one pass of tokenising."""
    import tensorflow as tf

    reviews = texts(options.archive)
    data = tf.data.Dataset.from_tensor_slices(reviews.to_pylist()).batch(BATCH)

    def there() -> None:
        layer = script.vectorizer()
        layer.adapt(data)
        for _ in data.map(layer):  # the script pays this pass again in every epoch
            pass

    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "sequences")
        seconds = compare(lambda: prepare(reviews, where), there, min(options.rounds, 3))
        facts = {
            "every_token_of_every_review_s": timed(
                lambda: prepare(reviews, where, "words", "packed")
            ),
            "the_same_with_bpe_s": timed(lambda: prepare(reviews, where, "bpe", "packed")),
        }
    return Result(*seconds, facts)


def build(reviews: pa.Array, style: str = "published") -> tokenizer.WordTokenizer:
    """Returns the tokenizer of reviews, with a vocabulary of the published size."""
    counts = tokenizer.count(reviews, style)
    return tokenizer.build(counts, script.VOCABULARY_SIZE - 1, style, style == "words")


def prepare(
    reviews: pa.Array, directory: Path, style: str = "published", policy: str = "head"
) -> None:
    """Builds vocabulary and sequences as the stages `vocab` and `sequences` do."""
    config = SequencesConfig.model_validate(
        {"length": script.LENGTH, "policy": policy, "validation_fraction": 0.0, "shards": 8}
    )
    words: Tokenizer = (
        bpe.train(reviews[:LEARNED].to_pylist(), script.VOCABULARY_SIZE)
        if style == "bpe"
        else build(reviews, style)
    )
    every = range(0, len(reviews), corpus.REVIEWS_AT_ONCE)
    batches = (reviews.slice(start, corpus.REVIEWS_AT_ONCE) for start in every)
    encoded = (
        cutting.Encoded(
            pa.array(range(len(batch))).cast(pa.string()),
            *sequences.documents(*words.encode(batch), words.separator),
            np.zeros(len(batch), bool),
        )
        for batch in batches
    )
    shards.write(directory, encoded, config=config, tokenizer=words)


def nothing(options: Options) -> Result:
    """Seconds of a `dvc repro` with nothing to do, in a clone with outputs of a few bytes."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "project")
        run("git", "clone", "--quiet", PROJECT, clone)
        pipeline = yaml.safe_load((clone / "dvc.yaml").read_text(encoding="utf-8"))
        for stage in pipeline["stages"].values():
            for kind in ("outs", "metrics", "plots"):
                for entry in stage.get(kind, []):
                    path = clone / (entry if isinstance(entry, str) else next(iter(entry)))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if not path.exists():
                        path.write_text("{}\n", encoding="utf-8")
        run("dvc", "commit", "--force", "--quiet", cwd=clone)
        said, *_ = run("dvc", "repro", cwd=clone)
        if "up to date" not in said:
            raise NotMeasuredError(f"dvc repro had something to do: {said[-300:]}")
        return Result([run("dvc", "repro", cwd=clone)[1] for _ in range(options.rounds)])

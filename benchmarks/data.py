"""Rows about what precedes training: the vocabulary, the sequences, DVC, and a large corpus."""

import functools
import importlib.util
import io
import os
import sys
import tarfile
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
from minigpt.common import files
from minigpt.config import CorpusConfig, SequencesConfig
from minigpt.data import archive, bpe, corpus, cutting, sequences, shards, tokenizer
from minigpt.data.interface import Tokenizer

FOLDERS = [f"aclImdb/{split}/{label}" for split in ("train", "test") for label in ("pos", "neg")]
FACTORS = (1, 4, 16)
STAGES = ("download", "vocab", "sequences")
# Prints the peak memory of the stage's own process, in KiB on Linux: Ray's have their own.
STAGE = """
import resource, sys
from minigpt.stages.__main__ import main
code = main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""
BATCH = 128
LEARNED = 7_600  # reviews that bpe learns from: 10 MB, the default of vocabulary.sample_bytes


def existing(path: Path) -> Path:
    """The archive, or in a tiny run the embedded sample."""
    path = SAMPLE if script.TINY else path
    if not path.exists():
        raise NotMeasuredError(f"{path} is missing: give aclImdb_v1.tar.gz with --archive")
    return path


@functools.cache
def texts(path: Path) -> pa.Array:
    """The reviews of an archive, or in a tiny run a few of the sample."""
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
    """The tokenizer of reviews, with a vocabulary of the published size."""
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
        for stage in yaml.safe_load((clone / "dvc.yaml").read_text(encoding="utf-8"))[
            "stages"
        ].values():
            for kind in ("outs", "metrics", "plots"):
                for entry in stage.get(kind, []):
                    path = clone / (entry if isinstance(entry, str) else next(iter(entry)))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if not path.exists():
                        path.write_text("{}\n")
        run("dvc", "commit", "--force", "--quiet", cwd=clone)
        said, *_ = run("dvc", "repro", cwd=clone)
        if "up to date" not in said:
            raise NotMeasuredError(f"dvc repro had something to do: {said[-300:]}")
        return Result([run("dvc", "repro", cwd=clone)[1] for _ in range(options.rounds)])


def scale(options: Options) -> Result:
    """Seconds of download, vocab and sequences at 1x, 4x and 16x the corpus, and peak memory in MB.

    Where Ray is installed, two of its workers do vocab and sequences too, and must leave the same
    bytes. The result is the time per review at 16x without Ray, as a multiple of the time at 1x.
    """
    engines = ["local", "ray"] if importlib.util.find_spec("ray") else ["local"]
    found: dict[str, dict[str, list[float]]] = {}
    for factor in FACTORS:
        with tempfile.TemporaryDirectory() as folder:
            project = Path(folder)
            path = project / "reviews.tar.gz"
            _repeat(existing(options.archive), path, factor, options.every)
            settings = yaml.safe_load((PROJECT / "resolved.yaml").read_text(encoding="utf-8"))
            settings["corpus"] |= {"format": "archive", "url": str(path), "folders": FOLDERS}
            settings["corpus"]["sha256"] = files.sha256(path)
            for name in ("data", "reports"):
                (project / name).mkdir()
            digests = []
            for engine in engines:
                settings["engine"] = {"kind": engine, "workers": 2 if engine == "ray" else 1}
                settings["train"]["backend"] = "jax" if engine == "ray" else "tensorflow"
                files.write_text(project / "resolved.yaml", yaml.safe_dump(settings))
                for stage in STAGES if engine == "local" else STAGES[1:]:
                    env = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
                    command = (sys.executable, "-c", STAGE, stage)
                    said, seconds, _ = run(*command, cwd=project, env=env)
                    name = stage if engine == "local" else f"{stage} by Ray"
                    rows = found.setdefault(name, {"seconds": [], "peak_MB": []})
                    rows["seconds"].append(round(seconds, 2))
                    rows["peak_MB"].append(round(int(said.splitlines()[-1]) * 1024 / 1e6, 1))
                made = sorted(path for path in (project / "data").glob("*/*") if path.is_file())
                digests.append([(path.name, files.sha256(path)) for path in made])
            if digests[0] != digests[-1]:
                raise NotMeasuredError("Ray's workers left other bytes than the local stages")
    whole = np.sum([found[stage]["seconds"] for stage in STAGES], axis=0)
    return Result([float(whole[-1] / whole[0] / FACTORS[-1])], facts={"factors": FACTORS, **found})


def _repeat(source: Path, target: Path, times: int, every: int) -> None:
    """Writes an archive of every n-th review of another, so many times, under new numbers."""
    seen = 0
    with tarfile.open(source) as old, tarfile.open(target, "w:gz", compresslevel=1) as new:
        for member in old:
            folder, _, name = member.name.rpartition("/")
            if not member.isreg() or folder not in FOLDERS:
                continue
            seen += 1
            if seen % every:
                continue
            file = old.extractfile(member)
            assert file is not None  # a regular member has one
            text = file.read()
            number, _, rest = name.partition("_")
            for copy in range(times):
                info = tarfile.TarInfo(f"{folder}/{int(number) + copy * 10**6}_{rest}")
                info.size = len(text)
                new.addfile(info, io.BytesIO(text))

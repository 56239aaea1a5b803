"""Vocabulary and sequences by Ray are those of the local stages, byte for byte."""

import importlib.util
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from minigpt import config
from minigpt.common import files, paths
from minigpt.common.errors import InputError
from minigpt.config import Config, EngineConfig
from minigpt.data import corpus, stored, subsampling, tokenizer
from minigpt.data.sequences import verify, without_addresses
from minigpt.engine import cluster, data

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is absent: make ray"),
]
TEXTS = ["A  Film,", "of the 7th\tart; THE best", "naïve?<br />It isn't", "zyx", "the the\n\nfilm"]


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with cluster.connected(EngineConfig(kind="ray", workers=2)):
        yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": f"{n}", "split": "", "label": "", "rating": 0, "text": " ".join(TEXTS[n % 5 :] * n)}
        for n in range(1, 41)
    ]
    batch = pa.RecordBatch.from_pylist(rows, corpus.SCHEMA)
    cuts = [0, 3, 4, 19, 30, 40]  # five row groups
    batches = [batch[a:b] for a, b in itertools.pairwise(cuts)]
    corpus.write_reviews(batches, paths.REVIEWS)
    return tmp_path


def settings(style: str, policy: str) -> Config:
    chosen = yaml.safe_load((ROOT / "resolved.yaml").read_text(encoding="utf-8"))
    chosen["vocabulary"] = {"style": style, "max_tokens": 270 if style == "bpe" else 12}
    chosen["vocabulary"]["sample_bytes"] = 2000
    chosen["sequences"] |= {"policy": policy, "length": 8, "shards": 4, "validation_fraction": 0.2}
    chosen["model"]["context_length"] = 8
    for section in ("preview", "evaluate", "sample"):
        chosen[section]["top_k"] = 0
    return config.validate(Config, chosen)


def made() -> dict[str, bytes]:
    folders = (paths.TOKENIZER, paths.SEQUENCES)
    found = [paths.VOCABULARY_METRICS, *(path for folder in folders for path in folder.iterdir())]
    return {path.as_posix(): path.read_bytes() for path in found}


def by_ray(chosen: Config, workers: int, blocks: int) -> dict[str, bytes]:
    from minigpt.stages import vocab

    engine, fraction = EngineConfig(kind="ray", workers=workers), 0.2
    reviews = data.Reviews(paths.REVIEWS, fraction, engine, blocks)
    vocab.learn(chosen, reviews)
    words = tokenizer.load(paths.TOKENIZER)
    manifest = reviews.write_sequences(paths.SEQUENCES, chosen.sequences, words)
    assert manifest == files.read_json(paths.SEQUENCES / "manifest.json")
    return made()


@pytest.mark.parametrize(
    ("style", "policy"),
    [("words", "packed"), ("words", "windows"), ("bpe", "packed"), ("published", "head")],
)
def test_the_bytes_are_the_local_ones(project: Path, ray: None, style: str, policy: str) -> None:
    from minigpt.stages import sequences, vocab

    chosen = settings(style, policy)
    config.save(chosen)
    vocab.run()
    sequences.run()
    local = made()
    assert len(local) == 1 + 2 + 4 + 1 + 1
    for workers, blocks in ((1, 1), (2, 2), (3, 3)):
        if workers == 3:  # the table at an address, of which tasks keep nothing
            rows = corpus.read_batches(paths.REVIEWS, corpus.SCHEMA.names)
            corpus.write_shards(rows, paths.REVIEWS, f"file://{project}/shared")
        assert by_ray(chosen, workers, blocks) == local, (workers, blocks)
    assert not stored.cache().exists()


def test_shards_at_an_address_are_the_local_ones(project: Path, ray: None) -> None:
    from minigpt.stages import sequences, vocab

    chosen = settings("words", "packed")
    config.save(chosen)
    vocab.run()
    sequences.run()
    local = files.read_json(paths.SEQUENCES / "manifest.json")
    local_bytes = {s["sha256"]: (paths.SEQUENCES / s["file"]).read_bytes() for s in entries(local)}

    engine = EngineConfig(kind="ray", workers=2, storage=f"file://{project}/shared")
    reviews = data.Reviews(paths.REVIEWS, 0.2, engine, 2)
    words = tokenizer.load(paths.TOKENIZER)
    manifest = reviews.write_sequences(paths.SEQUENCES, chosen.sequences, words)
    assert [path.name for path in paths.SEQUENCES.iterdir()] == ["manifest.json"]
    assert manifest == files.read_json(paths.SEQUENCES / "manifest.json")
    assert without_addresses(manifest) == local
    assert {path.name: path.read_bytes() for path in (project / "shared").iterdir()} == local_bytes
    assert [s["address"] for s in entries(manifest)] == [
        f"file://{project}/shared/{name}" for name in local_bytes
    ]

    engine = EngineConfig(kind="ray", workers=2, storage=f"file://{paths.REVIEWS.resolve()}/in")
    reviews = data.Reviews(paths.REVIEWS, 0.2, engine, 2)
    with pytest.raises(InputError, match=r"reviews.parquet/in can't be reached \(.*Error: "):
        reviews.write_sequences(paths.SEQUENCES, chosen.sequences, words)
    assert verify(paths.SEQUENCES, words) == manifest


def entries(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in manifest["splits"].values() for shard in split["shards"]]


def test_a_task_whose_worker_is_killed_runs_again(
    project: Path, ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, once = data._draw, project / "killed"

    def killed_once(*arguments: Any) -> Any:
        if not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(*arguments)

    monkeypatch.setattr(data, "_draw", killed_once)
    reviews = data.Reviews(paths.REVIEWS, 0.2, EngineConfig(kind="ray"), 2)
    local = subsampling.sample(paths.REVIEWS, 0.2, 500)
    assert reviews.sample(500) == subsampling.cut(local.reviews, 500)
    assert once.exists()


def test_errors_are_those_of_the_local_stage(project: Path, ray: None) -> None:
    reviews = data.Reviews(paths.REVIEWS, 1.0, EngineConfig(kind="ray"), 2)
    with pytest.raises(InputError, match="no token to count in 0 texts: the corpus is empty"):
        reviews.count("words", 10)
    stored = bytearray(paths.REVIEWS.read_bytes())
    texts = pq.read_metadata(paths.REVIEWS).row_group(2).column(4)
    begin = texts.dictionary_page_offset or texts.data_page_offset
    stored[begin + texts.total_compressed_size - 1] ^= 1
    paths.REVIEWS.write_bytes(stored)
    with pytest.raises(InputError, match=r"reviews.parquet is missing or damaged: `dvc repro down"):
        reviews.count("words", 10)

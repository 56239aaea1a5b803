"""`experiment=seed`: the bytes of its vocabulary and shards.

The published script's `TextVectorization` gives the same vocabulary (the row `vocabulary` of
`make bench`).
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from minigpt.config import CorpusConfig, SequencesConfig, read
from minigpt.data import archive, corpus, cutting, sequences, shards, tokenizer

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data/sample/reviews.tar.gz"
REAL = Path(os.environ.get("MINIGPT_IMDB_ARCHIVE", ROOT.parent / "shared/data/aclImdb_v1.tar.gz"))

SAMPLE_VOCABULARY = "f80876e562d8b30eb50a178e041a0f78690c64b00b08261d6ed7464d74fa53c6"
SAMPLE_SHARDS = [
    "08e6b31d8ac1f1a116e65049b65b11a8e49cbbffa9140983d3c90f48b65285eb",
    "dee6242c4d75466a2643cd95ae17ec13dab03d01c61294268e24be2ae90e9a04",
    "479ed4e1b361f32ebe3ca9439f2f807ffc3844574f0a50053f672798ebaa1752",
    "d4a8b87f370b968aa2040c870e954d29c6d77a50bf085d7c9e84beaa842aa007",
    "5a4ee3f547d794ffa914a9fd9454edce7f7c6129ed5e7cadce2958ec7213af11",
    "86d6a73ec7a767156813db4de863120faf5b70649c41d292dbd05efa2a8d3c19",
    "ec1a778ce94dc991afa8558bac41f8cb84b727cf18e102682b2ca5e0d44fbe6a",
    "c41063fe85d5659d0cd7a8ccfd7e54dbc67bf87695f0407ad709e245d14b767f",
]
REAL_VOCABULARY = "f5f6da976c70a45245458a83354b900fe47d507fe0470e46dd8165d5f12f4ba0"
REAL_SHARDS = [
    "e4fdab44a071d312bfa96f2e3167577669bac632921375f25ed1665986c5c3ae",
    "1b4b2ed10f4ad14746ebec7f660f1119b9144b68689df6754a41ffbf3dbc4451",
    "be3db3139d23f7a532d9813bb7050b42ae9664b51cd122dcd59f0b306f8c9ec1",
    "4cfb3c89fe7ee8d580786e57a40ec4fc961c3cceac1b6c1893a8c4c7c30ddbac",
    "e643ad9945b9a9b86f20a88563a85f1a17fbba677f18ab9a767c5c59dfece8f4",
    "2f8596ca54e31c61e5c14af15c43d0661e3a4dae9b8578a6c712d2f1d6ef5766",
    "4b18ac1b0727a2dcb06805c17a3257a6ade9e4439ae38ae416b93cbe46126257",
    "bb6c0db1c115b6ef419664c2869e583a4c7c86fdef6270efd22a547935ea88ad",
]


def stored(path: Path, folder: Path) -> Path:
    config = CorpusConfig(**read(ROOT / "conf/corpus/imdb.yaml"))
    corpus.write_reviews(archive.read(path, config), folder / "reviews.parquet")
    return folder / "reviews.parquet"


def assert_bytes(stored: Path, folder: Path, vocabulary: str, digests: list[str]) -> None:
    config = SequencesConfig(policy="head", length=80, validation_fraction=0.0, shards=8)
    texts = (batch["text"] for batch in corpus.read_batches(stored, ["text"]))
    words = tokenizer.build(tokenizer.count(texts, "published"), 19_999, "published")
    words.save(folder / "tokenizer")
    data = (folder / "tokenizer/vocabulary.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == vocabulary
    encoded = (
        cutting.Encoded(batch["id"], *words.encode(batch["text"]), np.zeros(len(batch), np.bool_))
        for batch in corpus.read_batches(stored, ["id", "text"])
    )
    manifest = shards.write(folder / "sequences", encoded, config=config, tokenizer=words)
    assert [shard["sha256"] for shard in manifest["splits"]["train"]["shards"]] == digests
    sequences.verify(folder / "sequences", words)


def test_the_embedded_sample(tmp_path: Path) -> None:
    assert_bytes(stored(SAMPLE, tmp_path), tmp_path, SAMPLE_VOCABULARY, SAMPLE_SHARDS)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="the real archive is absent")
def test_the_real_reviews(tmp_path: Path) -> None:
    reviews = stored(REAL, tmp_path)
    table = corpus.read_reviews(reviews, ["id", "rating", "text"])
    assert table.num_rows == 50_000
    assert pc.sum(pc.binary_length(table["text"])).as_py() == 64_359_438
    numbers = [int(name.split("/")[2].split("_")[0]) for name in table["id"].to_pylist()]
    assert numbers == [*range(12_500)] * 4
    assert set(table["rating"].to_pylist()) == {1, 2, 3, 4, 7, 8, 9, 10}
    assert_bytes(reviews, tmp_path, REAL_VOCABULARY, REAL_SHARDS)

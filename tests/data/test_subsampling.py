"""Samples of the reviews."""

from pathlib import Path

import pyarrow as pa
import pytest

from minigpt.common.errors import InputError
from minigpt.data import corpus, subsampling


def test_a_sample_is_bounded_and_hardly_changes_with_the_corpus(tmp_path: Path) -> None:
    path = tmp_path / "reviews.parquet"

    def write(reviews: int) -> None:
        rows = [
            {"id": f"{n}", "split": "", "label": "", "rating": 0, "text": f"é{n:05}" * 4}
            for n in range(reviews)
        ]
        batch = pa.RecordBatch.from_pylist(rows, corpus.SCHEMA)
        corpus.write_reviews([batch[:70], batch[70:]], path)

    write(520)
    more = subsampling.sample(path, 0.3, 1000).reviews["id"].to_pylist()
    write(500)
    held_out = {str(n) for n in range(500) if corpus.is_validation([str(n)], 0.3)[0]}
    sample = subsampling.sample(path, 0.3, 1000)
    numbers = sample.reviews["id"].to_pylist()
    assert sample.counts() == {
        "reviews": 36,  # of 28 bytes, the last of which reaches beyond
        "bytes": 1008,
        "all_reviews": 500 - len(held_out),
        "all_bytes": 28 * (500 - len(held_out)),
    }
    assert numbers == sorted(numbers, key=int) and not held_out & set(numbers)
    assert len(set(numbers) & set(more)) > 30
    everything = subsampling.sample(path, 0.3, 10**6).reviews
    assert everything["id"].to_pylist() == [str(n) for n in range(500) if str(n) not in held_out]
    others = subsampling.sample(path, 0.3, 10**6, held_out=True)
    assert set(others.reviews["id"].to_pylist()) == held_out
    texts = subsampling.cut(sample.reviews, 1000)
    assert 997 <= sum(len(text.encode()) for text in texts) <= 1000
    assert texts[:35] == subsampling.cut(everything, 10**6)[:35]
    parts = [subsampling.sample(path, 0.3, 1000, groups=[group]).reviews for group in (0, 1)]
    together = subsampling.draw((batch for part in parts for batch in part.to_batches()), 1000)
    assert together.reviews.equals(sample.reviews)
    assert subsampling.sample(path, 1.0, 1000).counts()["reviews"] == 0
    with pytest.raises(InputError, match="all reviews are held out"):
        subsampling.cut(subsampling.sample(path, 1.0, 1000).reviews, 1000)

"""The table of reviews and its split."""

import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.common.errors import InputError
from minigpt.data import corpus

TABLE = pa.Table.from_pylist(
    [
        {"id": "a/1_8", "split": "a", "label": "pos", "rating": 8, "text": "Très bien"},
        {"id": "a/2_1", "split": "a", "label": "neg", "rating": 1, "text": "Dull."},
        {"id": "mine", "split": "", "label": None, "rating": None, "text": "Fine.\n"},
    ],
    corpus.SCHEMA,
)


def test_same_reviews_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("new/a", "b"):
        written = corpus.write_reviews(TABLE.to_batches(), tmp_path / f"{name}.parquet")
        assert written == len(TABLE)
    assert (tmp_path / "new/a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert corpus.read_reviews(tmp_path / "b.parquet", corpus.SCHEMA.names).equals(TABLE)
    assert corpus.read_reviews(tmp_path / "b.parquet", ["text", "id"]).equals(
        TABLE.select(["text", "id"])
    )


def test_reviews_are_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.write_reviews(TABLE.to_batches(), tmp_path / "a.parquet")
    monkeypatch.setattr(corpus, "REVIEWS_AT_ONCE", 2)
    batches = list(corpus.read_batches(tmp_path / "a.parquet", ["text", "id"]))
    assert [len(batch) for batch in batches] == [2, 1]
    assert pa.Table.from_batches(batches).equals(TABLE.select(["text", "id"]))


def test_damaged_reviews_name_the_stage_that_makes_them(tmp_path: Path) -> None:
    path = tmp_path / "reviews.parquet"
    message = rf"{path} is missing or damaged: `dvc repro download`"
    with pytest.raises(InputError, match=message):
        corpus.read_reviews(path, ["id"])
    corpus.write_reviews(TABLE.to_batches(), path)
    whole = path.read_bytes()
    flipped = whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]
    for data in (b"", b"not Parquet", whole[:-1], whole[: len(whole) // 2], flipped):
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            corpus.read_reviews(path, ["id", "text"])
        with pytest.raises(InputError, match=message):
            list(corpus.read_batches(path, ["id", "text"]))
    pq.write_table(TABLE.drop_columns("text"), path)
    with pytest.raises(InputError, match=message):
        corpus.read_reviews(path, ["text"])
    with pytest.raises(InputError, match=message):
        list(corpus.read_batches(path, ["text"]))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        pa.ArrowMemoryError("malloc of size 9"),
        pa.ArrowCancelled("interrupted"),
    ],
)
def test_the_content_is_not_blamed_for_a_failing_disk_or_memory(error: Exception) -> None:
    with pytest.raises(type(error)), corpus.as_input_error("damaged", OSError, pa.ArrowException):
        raise error


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_held_out_reviews_depend_on_their_own_id_only(
    ids: list[str], more: list[str], fraction: float, other: float
) -> None:
    held_out = corpus.is_validation(ids, fraction)
    assert held_out.dtype == bool and held_out.shape == (len(ids),)
    assert (corpus.is_validation(more + ids, fraction)[len(more) :] == held_out).all()
    assert (corpus.is_validation(ids[::-1], fraction)[::-1] == held_out).all()
    array = pa.array(ids, pa.string())
    assert (corpus.is_validation(array, fraction) == held_out).all()
    assert (corpus.is_validation(pa.chunked_array([array]), fraction) == held_out).all()
    # A larger share holds out the same reviews, and more of them.
    low, high = sorted([fraction, other])
    assert (corpus.is_validation(ids, low) <= corpus.is_validation(ids, high)).all()


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_held_out_share_is_near_the_fraction(fraction: float) -> None:
    ids = [f"{split}/{n}_7" for split in ("train/pos", "test/neg") for n in range(10_000)]
    share = corpus.is_validation(ids, fraction).mean()
    assert share == pytest.approx(fraction, abs=4 * (fraction * (1 - fraction) / 20_000) ** 0.5)


def test_a_batch_is_a_row_group_since_long_reviews_have_small_ones(tmp_path: Path) -> None:
    rows = [{"id": f"{n}", "split": "", "label": "", "rating": 0, "text": "a"} for n in range(9)]
    batch = pa.RecordBatch.from_pylist(rows, corpus.SCHEMA)
    path = tmp_path / "reviews.parquet"
    corpus.write_reviews([batch[:2], batch[2:8], batch[8:]], path)
    assert corpus.row_groups(path) == 3
    assert [len(batch) for batch in corpus.read_batches(path, ["id"])] == [2, 6, 1]
    assert [b["id"].to_pylist() for b in corpus.read_batches(path, ["id"], range(2, 3))] == [["8"]]


def test_held_out_reviews_stay_the_same_between_versions() -> None:
    ids = [f"train/pos/{n}_9" for n in range(40)]
    assert np.flatnonzero(corpus.is_validation(ids, 0.1)).tolist() == [0, 3, 5, 22, 39]

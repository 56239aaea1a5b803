"""The table of reviews and its split."""

import contextlib
import errno
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.common import progress
from minigpt.common.errors import InputError
from minigpt.data import corpus, stored

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


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3),
        max_size=4,
    )
)
def test_shards_at_an_address_are_read_as_a_file_is(groups: list[list[str]]) -> None:
    batches = [
        pa.RecordBatch.from_pylist(
            [{"id": f"{n}/{i}", "split": "", "text": text} for i, text in enumerate(texts)],
            corpus.SCHEMA,
        )
        for n, texts in enumerate(groups)
    ]
    whole, table = Path("whole.parquet"), Path("table.parquet")

    def assert_equal() -> None:
        assert corpus.row_groups(table) == corpus.row_groups(whole) == len(batches)
        for some in (None, range(len(batches) // 2), range(len(batches))[::-2]):
            both = [
                list(corpus.read_batches(path, ["text", "id"], some)) for path in (table, whole)
            ]
            assert both[0] == both[1]

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        written = corpus.write_reviews(batches, whole)
        assert corpus.write_shards(batches, table, "shared/a b") == written
        before = table.read_bytes()
        corpus.write_shards(batches, table, "shared/a b")
        assert table.read_bytes() == before
        assert_equal()
        assert not stored.cache().exists()  # nothing is kept unless it is fetched
        corpus.fetch(table, progress.bar)
        shutil.rmtree("shared", ignore_errors=True)
        assert_equal()
        corpus.fetch(whole, progress.bar)  # which does nothing


def test_a_wrong_shard_is_named_with_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, batch = Path("reviews.parquet"), TABLE.to_batches()[0]
    corpus.write_shards([batch[:1], batch[1:]], path, f"file://{tmp_path}/shared")
    before = path.read_bytes()
    second = pq.read_table(path)["sha256"][1].as_py()

    def complaint(call: Any) -> str:
        with pytest.raises(InputError) as caught:
            call()
        return str(caught.value)

    def read() -> None:
        list(corpus.read_batches(path, ["text"], [1]))

    shard = tmp_path / "shared" / second
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + b"x")
    expected = f"shard file://{shard} was altered (its sha256 differs); make the shards again: "
    for call in (read, lambda: corpus.fetch(path, progress.bar)):
        assert complaint(call) == expected + "dvc repro -sf download"
    list(corpus.read_batches(path, ["text"], [0]))
    shard.write_bytes(data)
    corpus.fetch(path, progress.bar)
    (stored.cache() / second).write_bytes(data[:-1])
    assert complaint(read).endswith("; delete it, and run this again to fetch it")
    (stored.cache() / second).unlink()
    read()

    # What can't be stored leaves the table as it was.
    def write() -> None:
        corpus.write_shards([batch], path, f"{path.resolve()}/in")

    assert "reviews.parquet/in can't be reached (" in complaint(write)
    assert path.read_bytes() == before


def test_held_out_reviews_stay_the_same_between_versions() -> None:
    ids = [f"train/pos/{n}_9" for n in range(40)]
    assert np.flatnonzero(corpus.is_validation(ids, 0.1)).tolist() == [0, 3, 5, 22, 39]

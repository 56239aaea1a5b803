"""The user's own files: a folder of .txt files, a .jsonl and a .parquet, and their limits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minigpt.common.errors import InputError
from minigpt.config import CorpusConfig
from minigpt.data import corpus, own_files, reviews


def read(path: Path, **changes: Any) -> pa.Table:
    config = CorpusConfig(format="files", url=str(path), **changes)
    return pa.Table.from_batches(own_files.read(path, config))


def test_folder_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("Inner")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfWith a mark")
    (tmp_path / "notes.md").write_text("Not a review")
    table = read(tmp_path)
    assert table.schema == corpus.SCHEMA
    assert table.to_pylist() == [
        {"id": "b", "split": "", "label": None, "rating": None, "text": "With a mark"},
        {"id": "sub/a", "split": "", "label": None, "rating": None, "text": "Inner"},
    ]


def test_json_lines_with_and_without_the_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [
        {"id": "x", "body": "One", "split": "test", "label": "pos", "rating": 9, "more": [1]},
        {"id": 7, "body": "Two", "label": 0},
        {"body": "Three é"},
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert [tuple(row.values()) for row in read(path, text_column="body").to_pylist()] == [
        ("x", "test", "pos", 9, "One"),
        ("7", "", "0", None, "Two"),
        ("5", "", None, None, "Three é"),
    ]


@pytest.mark.parametrize(
    "text_type",
    [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
)
def test_parquet(tmp_path: Path, text_type: pa.DataType) -> None:
    path = tmp_path / "mine.parquet"
    texts = pa.array(["Un", "Deux é"]).cast(text_type)
    pq.write_table(pa.table({"text": texts, "label": [1, 0], "other": [[], []]}), path)
    assert [tuple(row.values()) for row in read(path).to_pylist()] == [
        ("1", "", "1", None, "Un"),
        ("2", "", "0", None, "Deux é"),
    ]
    pq.write_table(pa.table({"text": texts, "id": [5, 4], "rating": [1.0, None]}), path)
    assert [tuple(row.values()) for row in read(path).to_pylist()] == [
        ("5", "", None, 1, "Un"),
        ("4", "", None, None, "Deux é"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no reviews"),
        (b"\n\n", "holds no reviews"),
        (b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        (b'["text"]', "line 1 is not a JSON object"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"txt": "a"}', r"review '1' has no text in 'text' \(corpus.text_column\)"),
        (b'{"text": null}', "has no text"),
        (b'{"text": 3}', "has no text"),
        (b'{"id": "me", "text": "  "}', "review 'me' is empty"),
        (b'{"text": "a\xff"}', "line 1: byte 11 is not UTF-8"),
        (b'{"text": "a\\ud800"}', "review '1': byte 1 is not UTF-8"),
        (b'{"id": "\\ud800", "text": "a"}', "cannot be stored"),
        (b'{"id": 2, "text": "a"}\n{"text": "b"}', "the id '2' occurs more than once"),
        (b'{"text": "a", "rating": "good"}', "cannot be stored"),
        (b'{"text": "a", "rating": 7.5}', "cannot be stored"),
        (b'{"text": "a", "rating": 1000}', "cannot be stored"),
        (b'{"text": "a", "rating": 99999999999999999999}', "cannot be stored"),
    ],
)
def test_unusable_json_lines(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_json_lines_with_undecodable_bytes_replaced(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"text": "a\xff"}\n{"text": "b\\ud800"}')
    texts = read(path, undecodable="replace")["text"].to_pylist()
    assert texts[0] == "a\ufffd" and set(texts[1]) == {"b", "\ufffd"}


def test_unusable_parquet(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"review": ["a"]}), path)
    with pytest.raises(InputError, match="no text in 'text'"):
        read(path)
    pq.write_table(pa.table({"text": [[1]]}), path)
    with pytest.raises(InputError, match="cannot be read"):
        read(path)
    data = pa.py_buffer(b"ab\xe9c")  # a string array that lies about being UTF-8
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 4], np.int32)), data)
    pq.write_table(pa.table({"text": bad}), path)
    with pytest.raises(InputError, match="review '1': byte 2 is not UTF-8"):
        read(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read(path)


def test_unusable_folders_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="holds no reviews"):
        read(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"ab\xe9c")
    with pytest.raises(InputError, match="review 'a': byte 2 is not UTF-8"):
        read(tmp_path)
    assert read(tmp_path, undecodable="replace")["text"][0].as_py() == "ab\ufffdc"
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(InputError, match="review 'a' is empty"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"not a folder of \.txt, a \.jsonl or a"):
        read(tmp_path / "a.txt")
    monkeypatch.setenv("DVC_EXP_NAME", "tall-tale")
    with pytest.raises(InputError, match=r"no such file or folder: gone.*`dvc add`"):
        read(Path("gone"))


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_files_are_held_to_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    texts = ["a" * 40, "b" * 40]
    if kind == "folder":
        path = tmp_path
        for number, text in enumerate(texts):
            (path / f"{number}.txt").write_text(text)
    elif kind == "jsonl":
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path = tmp_path / "mine.parquet"
        pq.write_table(pa.table({"text": texts}), path)
    assert read(path, max_bytes=80, max_members=2).num_rows == 2
    with pytest.raises(InputError, match=r"holds over 79 bytes: .*raise corpus\.max_bytes"):
        read(path, max_bytes=79, max_members=2)
    with pytest.raises(InputError, match=r"holds over 1 members or reviews.*corpus\.max_members"):
        read(path, max_bytes=80, max_members=1)
    monkeypatch.setattr(reviews, "MAX_REVIEW_BYTES", 39)
    with pytest.raises(InputError, match="has over 39 bytes, too many for one review"):
        read(path)

"""The user's own files: a folder, a .jsonl, a .csv and a .parquet, and their limits."""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minigpt.common.errors import InputError
from minigpt.config import CorpusConfig
from minigpt.data import corpus, own_files, reviews


def read(path: Path | str, **changes: Any) -> pa.Table:
    config = CorpusConfig(format="files", url=str(path), **changes)
    return pa.Table.from_batches(own_files.read(config.url, config))


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


def in_memory(folder: Path) -> str:
    """Copies a folder to an address of fsspec's."""
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder.parent).as_posix()
            system.pipe_file(f"/{name}", path.read_bytes())
    return f"memory://{folder.name}"


def test_a_folder_of_many_files_of_any_kind_here_and_at_an_address(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write_jsonl(folder / "1.jsonl", [{"text": "One", "id": "given"}, {"text": "Two"}])
    (folder / "sub/2.csv.gz").write_bytes(gzip.compress(b"text,id\nThree,\n"))
    write_parquet(folder / "sub/3.parquet", [{"text": "Four"}, {"text": "Five é"}])
    write_parquet(folder / ".hidden/4.parquet", [{"text": "Six"}])
    (folder / "notes.md").write_text("Not a review")
    table = read(folder)
    assert list(zip(*table.select(["id", "text"]).to_pydict().values(), strict=True)) == [
        ("given", "One"),
        ("#1.jsonl:2", "Two"),
        ("#sub/2.csv.gz:1", "Three"),
        ("#sub/3.parquet:1", "Four"),
        ("#sub/3.parquet:2", "Five é"),
    ]
    address = in_memory(folder)
    assert read(address) == read(folder.as_uri()) == table
    assert read(f"{address}/sub/3.parquet") == read(folder / "sub/3.parquet")
    write_jsonl(folder / "5.jsonl", [{"text": "Seven", "id": "given"}])
    with pytest.raises(InputError, match=r"the id 'given' occurs more than once"):
        read(in_memory(folder))
    (folder / "0.csv").write_text("body\nEight\n")
    with pytest.raises(InputError, match=r"memory:///parts/0.csv has no text in 'text'.*'body'"):
        read(in_memory(folder))
    (folder / "a.txt").write_text("Nine")  # now the others are not the reviews
    assert read(in_memory(folder)).to_pydict() == read(folder).to_pydict()
    assert ids(folder) == ["a"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://gone", r"corpus.url: there is no such file or folder: memory://gone"),
        ("nosuch://host/a", r"corpus.url=nosuch://host/a cannot be read: .*s3://bucket/folder"),
        ("gdrive://a", r"corpus.url=gdrive://a cannot be read: .*[Ii]nstall gdrive"),
    ],
)
def test_addresses_that_can_not_be_read(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(url)


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
        ("#5", "", None, None, "Three é"),
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
        ("#1", "", "1", None, "Un"),
        ("#2", "", "0", None, "Deux é"),
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
        (b'{"txt": "a"}', r"review '#1' has no text in 'text' \(corpus.text_column\)"),
        (b'{"text": null}', "has no text"),
        (b'{"text": 3}', "has no text"),
        (b'{"id": "me", "text": "  "}', "review 'me' is empty"),
        (b'{"text": "a\xff"}', "line 1: byte 11 is not UTF-8"),
        (b'{"text": "a\\ud800"}', "review '#1': byte 1 is not UTF-8"),
        (b'{"id": "\\ud800", "text": "a"}', "cannot be stored"),
        (b'{"id": 2, "text": "a"}\n{"id": "2", "text": "b"}', "the id '2' occurs more than once"),
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
    for cells, kind in (([["a"]], "list<"), ([5], "int64"), ([{"a": "b"}], "struct<")):
        pq.write_table(pa.table({"text": cells}), path)
        with pytest.raises(InputError, match=rf"column 'text' \(.*\) holds {kind}.*, not text"):
            read(path)
    data = pa.py_buffer(b"ab\xe9c")  # a string array that lies about being UTF-8
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 4], np.int32)), data)
    pq.write_table(pa.table({"text": bad}), path)
    with pytest.raises(InputError, match="review '#1': byte 2 is not UTF-8"):
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
    with pytest.raises(InputError, match=r"a\.txt is not a folder, a \.jsonl, a \.csv"):
        read(tmp_path / "a.txt")
    monkeypatch.setenv("DVC_EXP_NAME", "tall-tale")
    with pytest.raises(InputError, match=r"no such file or folder: gone.*`dvc add`"):
        read(Path("gone"))


@pytest.mark.parametrize("kind", ["folder", "jsonl", "csv", "parquet"])
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
    elif kind == "csv":
        path = tmp_path / "mine.csv"
        path.write_text("\n".join(["text", *texts]))
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


def ids(path: Path, **changes: Any) -> list[str]:
    found: list[str] = read(path, **changes)["id"].to_pylist()
    return found


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        names = sorted(set().union(*rows))
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = sorted(set().union(*rows))
    columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
    pq.write_table(pa.table(columns), path)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "mine.jsonl": write_jsonl,
    "mine.CSV": write_csv,
    "mine.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_ratings_and_labels_refuse_no_corpus(tmp_path: Path, name: str) -> None:
    kept = {"8": 8, "-3": -3, "8.0": 8, "8.5": None, "N/A": None, "1000": None, "": None}
    rows = [{"text": "a", "rating": rating, "label": rating} for rating in kept]
    table = read(WRITERS[name](tmp_path / name, [*rows, {"text": "b"}]))
    assert table["rating"].to_pylist() == [*kept.values(), None]
    labels = table["label"].to_pylist()
    assert labels[:3] == ["8", "-3", "8.0"] and labels[-1] is None
    assert table.schema == corpus.SCHEMA


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("8.5", None),
        ("9.0", 9),
        ("1e9999", None),
        ("NaN", None),
        ("99999999999999999999", None),
        ("[8]", None),
        ('{"stars": 8}', None),
    ],
)
def test_ratings_of_any_type(tmp_path: Path, given: str, kept: int | None) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"text": "a", "rating": {given}, "label": "\\ud800", "split": "\\ud800"}}')
    (row,) = read(path).to_pylist()
    assert (row["rating"], row["label"], row["split"]) == (kept, "\\ud800", "\\ud800")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([8.5, None]),
        pa.array([[1], [2]]),
        pa.array([{"a": 1}, None]),
        pa.array([b"\xff", b"8"]),
        pa.array([datetime(2024, 5, 1), None]),
        pa.array([2**52, None]).cast(pa.timestamp("ms")),  # a year that Python doesn't know
        pa.nulls(2),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_columns_of_any_type(tmp_path: Path, column: pa.Array) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "rating": column, "label": column}), path)
    table = read(path)
    assert table["text"].to_pylist() == ["a", "b"]
    assert table.schema == corpus.SCHEMA


@pytest.mark.parametrize("name", ["text", "id", "rating"])
def test_two_columns_of_one_name_are_named(tmp_path: Path, name: str) -> None:
    names = ["text", "id", "rating", name]
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table([["a"], ["b"], ["c"], ["d"]], names=names), path)
    with pytest.raises(InputError, match=rf"{path} has two columns of the name '{name}'"):
        read(path)
    path = tmp_path / "mine.csv"
    path.write_text(",".join(names) + "\na,b,c,d\n")
    with pytest.raises(InputError, match=rf"{path} has two columns of the name '{name}'"):
        read(path)


def test_two_columns_of_one_name_that_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["x", "text", "x"]), path)
    assert read(path)["text"].to_pylist() == ["b"]


@pytest.mark.parametrize("name", WRITERS)
def test_given_ids_and_numbers_do_not_collide(tmp_path: Path, name: str) -> None:
    given = ["2", None, "3", "#4", None, "#5", "##5"]
    rows = [{"text": "a", **({"id": g} if g else {})} for g in given]
    found = ids(WRITERS[name](tmp_path / name, rows))
    assert found == ["2", "#2", "3", "##4", "#5", "##5", "###5"]
    assert len(set(found)) == len(given)


def test_gaps_among_numbers_as_ids(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"], "id": [float("nan"), 7.0, None]}), path)
    assert ids(path) == ["#1", "7.0", "#3"]


def test_only_visible_text_files_are_reviews(tmp_path: Path) -> None:
    names = ["a.txt", "B.TXT", "sub/c.Txt"]
    hidden = [".a.txt", ".git/a.txt", "sub/.ipynb_checkpoints/c-checkpoint.txt", "a.txt~", "txt"]
    for name in names + hidden:
        path = tmp_path / ".home/texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("A film.", encoding="utf-8")
    assert ids(tmp_path / ".home/texts") == ["B", "a", "sub/c"]
    (tmp_path / ".home/texts/a.TXT").write_text("Another film.", encoding="utf-8")
    with pytest.raises(InputError, match="the id 'a' occurs more than once"):
        read(tmp_path / ".home/texts")


IDS = """
import sys
from pathlib import Path
from minigpt.config import CorpusConfig
from minigpt.data import archive, own_files

folder, packed = map(Path, sys.argv[1:])
config = CorpusConfig(format="files", url="x", folders=["top/a/\\xe9"])
for read in (own_files.read(str(folder), config), archive.read(packed, config, folder.parent)):
    print(*(ascii(name) for batch in read for name in batch["id"].to_pylist()))
"""


def test_ids_do_not_depend_on_the_locale(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("é漢.txt".encode(), b"\xff.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path / "mine") + b"/" + name)).write_bytes(b"a")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", encoding="utf-8") as archive:
        archive.add(tmp_path / "mine/é漢.txt", "top/a/é/3_7.txt")
    command = [sys.executable, "-c", IDS, str(tmp_path / "mine"), str(tmp_path / "a.tar.gz")]
    told = []
    for locale in (
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C.UTF-8"},
    ):
        environment = {**os.environ, **locale, "PYTHONIOENCODING": "utf-8"}
        ran = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
        assert ran.returncode == 0, ran.stderr
        told.append(ran.stdout)
    assert told[0] == told[1]
    assert "\\\\xff" in told[0] and "\\xe9\\u6f22" in told[0] and "xe9/3_7" in told[0]


def test_a_folder_that_can_not_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(path: Any) -> Any:
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("A film.", encoding="utf-8")
    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        read(tmp_path)


LINES = 'é\u0085\u2028b, "c"\nd\r\ne\x0b\x1cf'


def test_csv_holds_texts_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["stars", "text", "id"], [5, LINES, "x"], [], ["", "a" * 200_000, ""]])
    table = read(path)
    assert table["text"].to_pylist() == [LINES, "a" * 200_000]
    assert table["id"].to_pylist() == ["x", "#2"]


def test_json_lines_hold_texts_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"text": LINES}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read(path)["text"].to_pylist() == [LINES]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no text in 'text'.*its columns are none"),
        ("text\n", "holds no reviews"),
        ("a;text\n1;x\n", "no text in 'text'.*its columns are 'a;text'"),
        ("text,id\nan actor, a film,1\n", "line 2 has 3 cells, but the header has 2: put texts"),
        ('text\n"a\nb\n', "line 3 is not CSV: unexpected end"),
        ('text\n"a" b\n', "line 2 is not CSV"),
        ("id,text\n1\n", "review '1' has no text"),
        ("id,text\n1,\n", "review '1' is empty"),
    ],
)
def test_unusable_csv(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.CSV"])
def test_compressed_lines(tmp_path: Path, name: str) -> None:
    plain = WRITERS[name](tmp_path / name, [{"text": "a film " * 9, "id": "x"}, {"text": "b"}])
    packed = tmp_path / f"{name}.gz"
    with gzip.open(packed, "wb") as file:
        file.write(plain.read_bytes())
    assert read(packed).equals(read(plain))
    whole = packed.read_bytes()
    for damaged in (whole[:-9], whole[:20], plain.read_bytes(), whole[:-8] + b"12345678"):
        packed.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{packed} is not a whole gzip file"):
            read(packed)


def test_compressed_lines_are_held_to_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"\n" * 2**22)
    with pytest.raises(InputError, match=r"over 100 times its size.*corpus\.max_ratio"):
        read(path)
    with pytest.raises(InputError, match=r"over 1,000 bytes.*corpus\.max_bytes"):
        read(path, max_bytes=1000)


RUSSIAN = "Фильм был очень хорош, даже лучше книги."
WIDE = [
    (encoding, mark, text)
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le")
    for mark in ("", "\ufeff")
    for text in ("This film was good.", RUSSIAN)
    if mark or "16" in encoding
]


@pytest.mark.parametrize(("encoding", "mark", "text"), WIDE)
@pytest.mark.parametrize("undecodable", ["fail", "replace"])
@pytest.mark.parametrize("name", ["a.txt", "mine.jsonl", "mine.csv"])
def test_utf_16_is_to_be_converted(
    tmp_path: Path, encoding: str, mark: str, text: str, undecodable: str, name: str
) -> None:
    content = {"a.txt": text, "mine.jsonl": json.dumps({"text": text}), "mine.csv": f"text\n{text}"}
    (tmp_path / name).write_bytes((mark + content[name]).encode(encoding))
    path = tmp_path if name == "a.txt" else tmp_path / name
    with pytest.raises(InputError, match=r"is UTF-(16|32): convert it to UTF-8") as caught:
        read(path, undecodable=undecodable)
    assert "replace" not in str(caught.value)


def test_texts_with_nul_are_no_utf_16(tmp_path: Path) -> None:
    texts = ["a\0b film\0\0", "\0" * 20, "\x01\0\x02" * 9, RUSSIAN, "a\0b"]
    path = write_jsonl(tmp_path / "mine.jsonl", [{"text": text} for text in texts])
    assert read(path)["text"].to_pylist() == texts


def test_a_failing_disk_is_not_called_a_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(5, "Input/output error")

    path = write_parquet(tmp_path / "mine.parquet", [{"text": "a"}])
    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read(path)
    monkeypatch.setattr(gzip, "open", fail)
    shutil.copy(path, tmp_path / "mine.csv.gz")
    with pytest.raises(OSError, match="Input/output error"):
        read(tmp_path / "mine.csv.gz")

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minigpt.common.errors import InputError
from minigpt.data import archive, corpus

REAL_ARCHIVE = Path(
    os.environ.get(
        "MINIGPT_IMDB_ARCHIVE",
        Path(__file__).resolve().parents[2] / "shared/data/aclImdb_v1.tar.gz",
    )
)
FOLDERS = ["aclImdb/train/pos", "aclImdb/train/neg"]
REVIEWS: dict[str, bytes] = {
    "aclImdb/train/neg/3_1.txt": b"Dull.",
    "aclImdb/train/pos/10_8.txt": "Très bien<br /><br />vu".encode(),
    "aclImdb/train/pos/9_10.txt": b"Fine.\n",
}


def read_archive(*args: Any, **kwargs: Any) -> pa.Table:
    return pa.Table.from_batches(archive.read_archive(*args, **kwargs))


def read_files(*args: Any, **kwargs: Any) -> pa.Table:
    return pa.Table.from_batches(archive.read_files(*args, **kwargs))


# --- read_archive -----------------------------------------------------------------------------


def pack(path: Path, members: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for other in others:
            archive.addfile(other)
    return path


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "README"
    return member


def test_archive_is_read_in_order_and_steps_over_the_rest(tmp_path: Path) -> None:
    others = {
        "aclImdb/README": b"\xff\xfe",
        "aclImdb/train/labeledBow.feat": b"9 0:9",
        "aclImdb/train/unsup/0_0.txt": b"Not asked for.",
        "aclImdb/train/pos/deeper/1_1.txt": b"Not in the folder itself.",
        "other/train/pos/1_1.txt": b"Another top.",
    }
    path = pack(
        tmp_path / "a.tar.gz", REVIEWS | others, special("aclImdb/train/pos", tarfile.DIRTYPE)
    )
    table = read_archive(path, FOLDERS)
    assert table.schema == corpus.SCHEMA
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("train/pos/9_10", "train", "pos", 10, "Fine.\n"),
        ("train/pos/10_8", "train", "pos", 8, "Très bien<br /><br />vu"),
        ("train/neg/3_1", "train", "neg", 1, "Dull."),
    ]
    extra = read_archive(path, [*FOLDERS, "aclImdb/train/unsup"])
    assert extra["label"].to_pylist() == ["pos", "pos", "neg", "unsup"]


def test_reviews_come_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "a.tar.gz", REVIEWS)
    table = read_archive(path, FOLDERS)
    monkeypatch.setattr(corpus, "REVIEWS_AT_ONCE", 2)
    assert [len(batch) for batch in archive.read_archive(path, FOLDERS)] == [2, 1]
    assert read_archive(path, FOLDERS).equals(table)


def test_archive_with_dotted_names_reads_the_same(tmp_path: Path) -> None:
    dotted = {f"./{name}": data for name, data in REVIEWS.items()}
    assert read_archive(pack(tmp_path / "dotted.tar.gz", dotted), FOLDERS).equals(
        read_archive(pack(tmp_path / "plain.tar.gz", REVIEWS), [f"{f}/" for f in FOLDERS])
    )


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (special("aclImdb/l", tarfile.SYMTYPE), ("aclImdb/l", "link")),
        (special("aclImdb/l", tarfile.LNKTYPE), ("aclImdb/l", "link")),
        (special("elsewhere/d", tarfile.CHRTYPE), ("elsewhere/d", "device")),
        (special("elsewhere/f", tarfile.FIFOTYPE), ("elsewhere/f", "device")),
        (special("/etc/passwd", tarfile.REGTYPE), ("/etc/passwd", "outside")),
        (special("/etc", tarfile.DIRTYPE), ("/etc", "outside")),
        (special("aclImdb/../../x", tarfile.REGTYPE), ("aclImdb/../../x", "outside")),
        (special("..", tarfile.DIRTYPE), ("..", "outside")),
    ],
)
def test_unsafe_members_are_refused(
    tmp_path: Path, member: tarfile.TarInfo, words: tuple[str, ...]
) -> None:
    path = pack(tmp_path / "a.tar.gz", REVIEWS, member)
    with pytest.raises(InputError) as caught:
        read_archive(path, FOLDERS)
    assert all(word in str(caught.value) for word in (str(path), *words))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"aclImdb/train/pos/1_7.txt": b" \n\t"}, ("train/pos/1_7.txt", "empty")),
        ({"aclImdb/train/pos/1_7.txt": b""}, ("train/pos/1_7.txt", "empty")),
        ({"aclImdb/train/pos/1_7.txt": b"ab\xe9c"}, ("train/pos/1_7.txt", "byte 2", "UTF-8")),
        ({"./aclImdb/train/neg/3_1.txt": b"Again."}, ("train/neg/3_1", "more than once")),
        ({"aclImdb/train/pos/notes.txt": b"x"}, ("train/pos/notes.txt", "<n>_<rating>.txt")),
        ({"aclImdb/train/pos/1_7.html": b"x"}, ("train/pos/1_7.html", "<n>_<rating>.txt")),
        ({"aclImdb/train/pos/1_700.txt": b"x"}, ("train/pos/1_700.txt", "<n>_<rating>.txt")),
    ],
)
def test_unusable_reviews_are_named(
    tmp_path: Path, members: dict[str, bytes], words: tuple[str, ...]
) -> None:
    path = pack(tmp_path / "a.tar.gz", REVIEWS | members)
    with pytest.raises(InputError) as caught:
        read_archive(path, FOLDERS)
    assert all(word in str(caught.value) for word in (str(path), *words))


def test_undecodable_bytes_can_be_replaced(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar.gz", REVIEWS | {"aclImdb/train/neg/1_1.txt": b"ab\xe9c"})
    table = read_archive(path, FOLDERS, undecodable="replace")
    assert table["text"][2].as_py() == "ab\ufffdc"


@pytest.mark.parametrize("folder", ["aclImdb/test/pos", "aclImdb/empty/pos"])
def test_folder_without_reviews_is_named(tmp_path: Path, folder: str) -> None:
    path = pack(tmp_path / "a.tar.gz", REVIEWS, special("aclImdb/empty/pos", tarfile.DIRTYPE))
    with pytest.raises(InputError, match=f"{folder}' of corpus.folders holds no reviews"):
        read_archive(path, [*FOLDERS, folder])
    with pytest.raises(InputError, match="top/split/label"):
        read_archive(path, ["train/pos"])


def test_damaged_archives_are_errors(tmp_path: Path) -> None:
    whole = pack(tmp_path / "a.tar.gz", REVIEWS).read_bytes()
    tar = gzip.decompress(whole)
    header = tar.index(b"aclImdb/train/pos/9_10.txt")
    damaged = {
        "missing": None,
        "nothing": b"",
        "not gzip": b"<html>Sign in</html>",
        "not a tar": gzip.compress(b"<html>Sign in</html>" * 99),
        "altered": whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:],
        "altered header": gzip.compress(tar[:header] + b"b" + tar[header + 1 :]),
        "altered first header": gzip.compress(b"b" + tar[1:]),
        "tar cut between members": gzip.compress(tar[:header]),
        "tar cut in a review": gzip.compress(tar[: header + 514]),
    }
    damaged |= {f"cut at {end}": whole[:end] for end in range(1, len(whole), 7)}
    for name, data in damaged.items():
        path = tmp_path / f"{name}.tar.gz"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(InputError, match="is not a whole"):
            read_archive(path, FOLDERS[1:])


@pytest.mark.real
@pytest.mark.skipif(not REAL_ARCHIVE.exists(), reason="the real archive is not here")
def test_real_archive() -> None:
    folders = [
        f"aclImdb/{split}/{label}" for split in ("train", "test") for label in ("pos", "neg")
    ]
    table = read_archive(REAL_ARCHIVE, folders)
    assert table.num_rows == 50_000
    assert sum(len(text.encode()) for text in table["text"].to_pylist()) == 65_483_508
    assert table["id"][0].as_py() == "train/pos/0_9"
    numbers = [int(name.split("/")[2].split("_")[0]) for name in table["id"].to_pylist()]
    assert numbers == [*range(12_500)] * 4
    assert set(table["rating"].to_pylist()) == {1, 2, 3, 4, 7, 8, 9, 10}


def bomb(path: Path, headers: bytes, zeros: int) -> Path:
    """A .tar.gz of some headers and then so many zeros, which cost it a thousandth of that."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(headers)
        for _ in range(zeros // 2**20):
            file.write(bytes(2**20))
    return path


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("name", "size", "limits", "message"),
    [
        ("aclImdb/README", 2**45, {}, "over 100 times its size.*corpus.max_ratio"),
        (
            "aclImdb/README",
            2**45,
            {"max_ratio": 10_000, "max_bytes": 2**21},
            "over 2,097,152 bytes",
        ),
        ("aclImdb/train/pos/1_7.txt", 2**45, {}, "1_7.txt' has over 268,435,456 bytes"),
        ("aclImdb/train/pos/1_7.txt", 2**27, {}, "over 100 times its size"),
    ],
)
def test_a_bomb_is_stopped_at_the_limits(
    tmp_path: Path, name: str, size: int, limits: dict[str, Any], message: str
) -> None:
    path = bomb(tmp_path / "a.tar.gz", header(name, size), zeros=2**23)
    read = 0

    class Counted(gzip.GzipFile):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal read
            data = super().read(size)
            read += len(data)
            return data

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match=message):
        patch.setattr(gzip, "open", Counted)
        read_archive(path, FOLDERS, limits=archive.Limits(**limits))
    assert read < 2**22, "what lies beyond the limit is not unpacked"


def test_ten_million_members_are_stopped_at_the_limit(tmp_path: Path) -> None:
    members = b"".join(header(f"aclImdb/train/unsup/{n}_0.txt", 0) for n in range(1000))
    path = bomb(tmp_path / "a.tar.gz", members * 3, zeros=0)
    limits = archive.Limits(max_members=2500, max_ratio=10_000)
    kept = []

    class Watched(tarfile.TarFile):
        def next(self) -> tarfile.TarInfo | None:
            kept.append(len(self.members))
            return super().next()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="over 2,500 memb"):
        patch.setattr(tarfile, "open", Watched.open)
        read_archive(path, FOLDERS, limits=limits)
    assert len(kept) == 2502  # the first of them as the archive is opened
    assert max(kept) <= 1, "members are not kept"


PAX = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**45)}


def pax(records: dict[str, str], copies: int = 1) -> bytes:
    """Extended headers in front of a member that has them all."""
    member = tarfile.TarInfo("aclImdb/train/pos/1_7.txt")
    member.pax_headers = records
    made = member.tobuf(tarfile.PAX_FORMAT)
    return made[: -tarfile.BLOCKSIZE] * copies + made[-tarfile.BLOCKSIZE :]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (header("././@LongLink", 2**33, tarfile.GNUTYPE_LONGNAME), "header of 8,589,934,592 bytes"),
        (header("././@LongLink", 2**33, tarfile.GNUTYPE_LONGLINK), "header of 8,589,934,592 bytes"),
        (header("././@PaxHeader", 2**33, tarfile.XHDTYPE), "a header of 8,589,934,592 bytes"),
        (header("././@PaxHeader", 2**33, tarfile.XGLTYPE), "a header of 8,589,934,592 bytes"),
        (header("aclImdb/train/pos/1_7.txt", 9, tarfile.GNUTYPE_SPARSE), "a sparse member"),
        (pax(PAX), "a sparse member"),
        (pax({"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}), "'aclImdb/.*are refused"),
        (pax({"GNU.sparse.map": "a,b"}), "is not a whole"),
        (pax({"size": "-1"}), "is not a whole|is empty"),
        (pax({"size": "9" * 30}), "has over 268,435,456 bytes"),
        (pax({"path": "a" * 5000}), "a header of 5,"),
        (pax({"path": "/etc/passwd"}), "lies outside"),
        (pax({"path": "a/../../b"}), "lies outside"),
        (pax({"comment": "x"}, copies=2000), "is not a whole"),
        (header("aclImdb/train/pos/1_7.txt", -1), "negative size"),
    ],
)
def test_hostile_headers_are_errors(tmp_path: Path, headers: bytes, message: str) -> None:
    path = bomb(tmp_path / "a.tar.gz", headers, zeros=2**20)
    with pytest.raises(InputError, match=message) as caught:
        read_archive(path, FOLDERS, limits=archive.Limits(max_ratio=1e6))
    assert str(path) in str(caught.value)


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    odd = {"aclImdb/\udcff\udcfe/a": b"x", "caf\udce9/b": b"x"}
    path = pack(tmp_path / "a.tar.gz", REVIEWS | odd)
    assert read_archive(path, FOLDERS).num_rows == 3
    path = pack(tmp_path / "a.tar.gz", odd)
    with pytest.raises(
        InputError, match=r"other folders: 'aclImdb/\\udcff\\udcfe', 'caf"
    ) as caught:
        read_archive(path, FOLDERS)
    str(caught.value).encode()
    path = pack(tmp_path / "a.tar.gz", {"aclImdb/train/pos/1_7\udcff.txt": b"x"})
    with pytest.raises(InputError, match="is not named <n>"):
        read_archive(path, FOLDERS)


def test_members_that_come_again(tmp_path: Path) -> None:
    twice = special("aclImdb/README", tarfile.REGTYPE)
    path = pack(tmp_path / "a.tar.gz", REVIEWS, twice, twice)
    assert read_archive(path, FOLDERS).num_rows == 3
    review = special("aclImdb/train/neg/3_1.txt", tarfile.REGTYPE)
    review.size = 5
    path.write_bytes(b"")
    with tarfile.open(path, "w:gz") as archive:
        for _ in range(2):
            archive.addfile(review, io.BytesIO(b"Dull."))
    with pytest.raises(InputError, match=r"the id 'train/neg/3_1' is there more than once"):
        read_archive(path, ["aclImdb/train/neg"])


# --- read_files -------------------------------------------------------------------------------


def test_folder_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("Inner")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfWith a mark")
    (tmp_path / "notes.md").write_text("Not a review")
    table = read_files(tmp_path)
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
    assert [tuple(row.values()) for row in read_files(path, "body").to_pylist()] == [
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
    assert [tuple(row.values()) for row in read_files(path).to_pylist()] == [
        ("1", "", "1", None, "Un"),
        ("2", "", "0", None, "Deux é"),
    ]
    pq.write_table(pa.table({"text": texts, "id": [5, 4], "rating": [1.0, None]}), path)
    assert [tuple(row.values()) for row in read_files(path).to_pylist()] == [
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
        (b'{"id": "\\ud800", "text": "a"}', "can't be stored"),
        (b'{"id": 2, "text": "a"}\n{"text": "b"}', "the id '2' is there more than once"),
        (b'{"text": "a", "rating": "good"}', "can't be stored"),
        (b'{"text": "a", "rating": 7.5}', "can't be stored"),
        (b'{"text": "a", "rating": 1000}', "can't be stored"),
        (b'{"text": "a", "rating": 99999999999999999999}', "can't be stored"),
    ],
)
def test_unusable_json_lines(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_files(path)
    assert str(path) in str(caught.value)


def test_json_lines_with_undecodable_bytes_replaced(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"text": "a\xff"}\n{"text": "b\\ud800"}')
    texts = read_files(path, undecodable="replace")["text"].to_pylist()
    assert texts[0] == "a\ufffd" and set(texts[1]) == {"b", "\ufffd"}


def test_unusable_parquet(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"review": ["a"]}), path)
    with pytest.raises(InputError, match="no text in 'text'"):
        read_files(path)
    pq.write_table(pa.table({"text": [[1]]}), path)
    with pytest.raises(InputError, match="can't be read"):
        read_files(path)
    data = pa.py_buffer(b"ab\xe9c")  # a string array that lies about being UTF-8
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 4], np.int32)), data)
    pq.write_table(pa.table({"text": bad}), path)
    with pytest.raises(InputError, match="review '1': byte 2 is not UTF-8"):
        read_files(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="can't be read as Parquet"):
        read_files(path)


def test_unusable_folders_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="holds no reviews"):
        read_files(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"ab\xe9c")
    with pytest.raises(InputError, match="review 'a': byte 2 is not UTF-8"):
        read_files(tmp_path)
    assert read_files(tmp_path, undecodable="replace")["text"][0].as_py() == "ab\ufffdc"
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(InputError, match="review 'a' is empty"):
        read_files(tmp_path)
    with pytest.raises(InputError, match=r"not a folder of \.txt, a \.jsonl or a"):
        read_files(tmp_path / "a.txt")
    monkeypatch.setenv("DVC_EXP_NAME", "tall-tale")
    with pytest.raises(InputError, match=r"no such file or folder: gone.*`dvc add`"):
        read_files(Path("gone"))


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
    assert read_files(path, limits=archive.Limits(80, 2)).num_rows == 2
    with pytest.raises(InputError, match=r"holds over 79 bytes: .*raise corpus\.max_bytes"):
        read_files(path, limits=archive.Limits(79, 2))
    with pytest.raises(InputError, match=r"holds over 1 members or reviews.*corpus\.max_members"):
        read_files(path, limits=archive.Limits(80, 1))
    monkeypatch.setattr(archive, "MAX_REVIEW_BYTES", 39)
    with pytest.raises(InputError, match="has over 39 bytes, too many for one review"):
        read_files(path)

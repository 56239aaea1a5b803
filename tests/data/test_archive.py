"""Archives: what is read and in which order, and how hostile and damaged ones are refused."""

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from minigpt.common.errors import InputError
from minigpt.config import CorpusConfig
from minigpt.data import archive, corpus

FOLDERS = ["aclImdb/train/pos", "aclImdb/train/neg"]
REVIEWS: dict[str, bytes] = {
    "aclImdb/train/neg/3_1.txt": b"Dull.",
    "aclImdb/train/pos/10_8.txt": "Très bien<br /><br />vu".encode(),
    "aclImdb/train/pos/9_10.txt": b"Fine.\n",
}


def configured(folders: list[str] = FOLDERS, **changes: Any) -> CorpusConfig:
    return CorpusConfig(format="archive", url="a", sha256="0" * 64, folders=folders, **changes)


def read(path: Path, folders: list[str] = FOLDERS, **changes: Any) -> pa.Table:
    return pa.Table.from_batches(archive.read(path, configured(folders, **changes)))


def pack(path: Path, members: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as packed:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
        for other in others:
            packed.addfile(other)
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
    table = read(path)
    assert table.schema == corpus.SCHEMA
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("train/pos/9_10", "train", "pos", 10, "Fine.\n"),
        ("train/pos/10_8", "train", "pos", 8, "Très bien<br /><br />vu"),
        ("train/neg/3_1", "train", "neg", 1, "Dull."),
    ]
    extra = read(path, [*FOLDERS, "aclImdb/train/unsup"])
    assert extra["label"].to_pylist() == ["pos", "pos", "neg", "unsup"]


def test_reviews_come_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "a.tar.gz", REVIEWS)
    table = read(path)
    monkeypatch.setattr(corpus, "REVIEWS_AT_ONCE", 2)
    assert [len(batch) for batch in archive.read(path, configured())] == [2, 1]
    assert read(path).equals(table)


def test_archive_with_dotted_names_reads_the_same(tmp_path: Path) -> None:
    dotted = {f"./{name}": data for name, data in REVIEWS.items()}
    assert read(pack(tmp_path / "dotted.tar.gz", dotted), FOLDERS).equals(
        read(pack(tmp_path / "plain.tar.gz", REVIEWS), [f"{f}/" for f in FOLDERS])
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
        read(path)
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
        read(path)
    assert all(word in str(caught.value) for word in (str(path), *words))


def test_undecodable_bytes_can_be_replaced(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar.gz", REVIEWS | {"aclImdb/train/neg/1_1.txt": b"ab\xe9c"})
    table = read(path, undecodable="replace")
    assert table["text"][2].as_py() == "ab\ufffdc"


@pytest.mark.parametrize("folder", ["aclImdb/test/pos", "aclImdb/empty/pos"])
def test_folder_without_reviews_is_named(tmp_path: Path, folder: str) -> None:
    path = pack(tmp_path / "a.tar.gz", REVIEWS, special("aclImdb/empty/pos", tarfile.DIRTYPE))
    with pytest.raises(InputError, match=f"{folder}' of corpus.folders holds no reviews"):
        read(path, [*FOLDERS, folder])
    with pytest.raises(InputError, match="top/split/label"):
        read(path, ["train/pos"])


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
            read(path, FOLDERS[1:])


def bomb(path: Path, headers: bytes, zeros: int) -> Path:
    """A .tar.gz of some headers and then so many zeros, which take a thousandth of their number."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(headers)
        for _ in range(zeros // 2**20):
            file.write(bytes(2**20))
    return path


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def refused(path: Path, message: str, **limits: Any) -> int:
    """Reads an archive that is refused with a message, and returns how many bytes were unpacked."""
    unpacked = 0

    class Counted(gzip.GzipFile):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal unpacked
            data = super().read(size)
            unpacked += len(data)
            return data

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match=message) as caught:
        patch.setattr(gzip, "open", Counted)
        read(path, **limits)
    assert str(path) in str(caught.value)
    return unpacked


@pytest.mark.parametrize(
    ("name", "size", "limits", "message"),
    [
        ("aclImdb/README", 2**45, {}, "over 100 times its size.*corpus.max_ratio"),
        (
            "aclImdb/README",
            2**45,
            {"max_ratio": 10_000, "max_bytes": 2**21},
            "over 2,097,152 bytes.*corpus.max_bytes",
        ),
        ("aclImdb/train/pos/1_7.txt", 2**45, {}, "1_7.txt' has over 268,435,456 bytes"),
        ("aclImdb/train/pos/1_7.txt", 2**27, {}, "over 100 times its size"),
    ],
)
def test_a_bomb_is_stopped_at_the_limits(
    tmp_path: Path, name: str, size: int, limits: dict[str, Any], message: str
) -> None:
    path = bomb(tmp_path / "a.tar.gz", header(name, size), zeros=2**23)
    assert refused(path, message, **limits) < 2**22, "nothing beyond the limit is unpacked"


def test_ten_million_members_are_stopped_at_the_limit(tmp_path: Path) -> None:
    members = b"".join(
        tarfile.TarInfo.create_pax_global_header({f"key{n}": "value"})
        + header(f"aclImdb/train/unsup/{n}_0.txt", 0)
        for n in range(1000)
    )
    path = bomb(tmp_path / "a.tar.gz", members * 3, zeros=0)
    kept = []

    class Watched(tarfile.TarFile):
        def next(self) -> tarfile.TarInfo | None:
            kept.append(len(self.members) + len(self.pax_headers))
            return super().next()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="over 2,500 memb"):
        patch.setattr(tarfile, "open", Watched.open)
        read(path, max_members=2500, max_ratio=10_000)
    assert len(kept) == 2502  # the first of them as the archive is opened
    assert max(kept) <= 2, "neither members nor global headers are kept"


REVIEW = "aclImdb/train/pos/1_7.txt"
NO_SIZE = "GNU.sparse.realsize"  # alone, it changes the size that a member seems to have
SPARSE_1 = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", NO_SIZE: str(2**45)}


def pax(records: dict[str, str], copies: int = 1, name: str = REVIEW) -> bytes:
    """Extended headers, as often as asked for, and a member that has them all."""
    member = tarfile.TarInfo(name)
    member.pax_headers = records
    made = member.tobuf(tarfile.PAX_FORMAT)
    return made[: -tarfile.BLOCKSIZE] * copies + made[-tarfile.BLOCKSIZE :]


def sparse_without_end() -> bytes:
    """A sparse member whose map continues in block after block."""
    first = tarfile.TarInfo(REVIEW)
    first.type, first.size = tarfile.GNUTYPE_SPARSE, 9
    block = bytearray(first.tobuf(tarfile.GNU_FORMAT))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    more = bytearray(b"1" * 504 + bytes(8))
    more[504] = 1
    return bytes(block) + bytes(more) * 2000


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        *(
            (before + header("././@Long", 2**33, kind), "headers of over 4,096 bytes")
            for before in (b"", header("a/README", 0), pax({NO_SIZE: "0"}, name="a/README"))
            for kind in (b"L", b"K", b"x", b"g")
        ),
        (pax({"path": "a" * 5000}), "headers of over 4,096 bytes"),
        (pax({"comment": "x"}, copies=2000), "headers of over 4,096 bytes"),
        (pax({"hdrcharset": "1" * 5000}), "headers of over 4,096 bytes"),
        (sparse_without_end(), "headers of over 4,096 bytes"),
        (header(REVIEW, 9, tarfile.GNUTYPE_SPARSE), "sparse"),
        (pax(SPARSE_1), "is not a whole"),
        (pax({"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}), "sparse"),
        (pax({"GNU.sparse.map": "a,b"}), "is not a whole"),
        (pax({NO_SIZE: str(2**27)}, name="a/README"), "over 2,097,152 bytes"),
        (pax({"size": "-1"}), "negative size"),
        (header(REVIEW, -1), "negative size"),
        (pax({"size": "9" * 30}), "has over 268,435,456 bytes"),
        (pax({"size": "9" * 30}, name="a/README"), "over 2,097,152 bytes"),
        (pax({"path": "/etc/passwd"}), "lies outside"),
        (pax({"path": "a/../../b"}), "lies outside"),
    ],
)
def test_hostile_headers_are_errors(tmp_path: Path, headers: bytes, message: str) -> None:
    path = bomb(tmp_path / "a.tar.gz", headers, zeros=2**22)
    unpacked = refused(path, message, max_ratio=100_000, max_bytes=2**21)
    assert unpacked < (2**14 if "headers" in message else 2**22)


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    odd = {"aclImdb/\udcff\udcfe/a": b"x", "caf\udce9/b": b"x"}
    path = pack(tmp_path / "a.tar.gz", REVIEWS | odd)
    assert read(path).num_rows == 3
    path = pack(tmp_path / "a.tar.gz", odd)
    with pytest.raises(
        InputError, match=r"other folders: 'aclImdb/\\udcff\\udcfe', 'caf"
    ) as caught:
        read(path)
    str(caught.value).encode()
    path = pack(tmp_path / "a.tar.gz", {"aclImdb/train/pos/1_7\udcff.txt": b"x"})
    with pytest.raises(InputError, match="is not named <n>"):
        read(path)


def test_members_that_come_again(tmp_path: Path) -> None:
    twice = special("aclImdb/README", tarfile.REGTYPE)
    path = pack(tmp_path / "a.tar.gz", REVIEWS, twice, twice)
    assert read(path).num_rows == 3
    review = special("aclImdb/train/neg/3_1.txt", tarfile.REGTYPE)
    review.size = 5
    path.write_bytes(b"")
    with tarfile.open(path, "w:gz") as packed:
        for _ in range(2):
            packed.addfile(review, io.BytesIO(b"Dull."))
    with pytest.raises(InputError, match=r"the id 'train/neg/3_1' occurs more than once"):
        read(path, ["aclImdb/train/neg"])

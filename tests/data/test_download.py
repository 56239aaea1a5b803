"""Downloads: resumed, verified, and given up with one error that shows no secret."""

import contextlib
import errno
import gzip
import hashlib
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minigpt import config
from minigpt.common.errors import InputError
from minigpt.config import CorpusConfig, EngineConfig
from minigpt.data import archive, corpus, download, own_files
from minigpt.stages import download as stage

BODY = bytes(range(256)) * 1200  # larger than one chunk and than a socket's first segment
SHA256 = hashlib.sha256(BODY).hexdigest()

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """A loopback host that gives the next of `answers`, and keeps giving the last one."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.ranges: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.ranges.append(self.headers["Range"])
                answers = server.answers
                (answers.pop(0) if len(answers) > 1 else answers[0])(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/reviews.tar.gz"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def reply(status: int = 200, body: bytes = BODY, length: int | None = -1, **headers: str) -> Answer:
    """An answer whose Content-Length is `length` (None: not announced, -1: the true one)."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        if length is not None:
            handler.send_header("Content-Length", str(len(body) if length == -1 else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def serve_ranges(handler: BaseHTTPRequestHandler) -> None:
    start = int((handler.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
    if start >= len(BODY):
        reply(416, b"", Content_Range=f"bytes */{len(BODY)}")(handler)
    elif start:
        span = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
        reply(206, BODY[start:], Content_Range=span)(handler)
    else:
        reply()(handler)


def fetch(url: str, directory: Path, sha256: str = SHA256, attempts: int = 3) -> Path:
    return download.fetch(url, sha256, directory, attempts=attempts, timeout_s=5, backoff_s=0.01)


def test_download_is_verified_kept_and_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.answers = [reply()]
    heard: list[tuple[int, int | None]] = []
    path = download.fetch(server.url, SHA256, tmp_path / "new", lambda *a: heard.append(a))
    assert path == tmp_path / "new" / f"{SHA256}.tar.gz"
    assert path.read_bytes() == BODY
    assert heard == sorted(heard) and heard[-1] == (len(BODY), len(BODY))
    assert fetch(server.url, path.parent) == path
    assert len(server.ranges) == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_kept_download_that_was_altered_is_fetched_again(server: Server, tmp_path: Path) -> None:
    server.answers = [reply()]
    path = fetch(server.url, tmp_path)
    path.write_bytes(b"altered")
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert len(server.ranges) == 2


def test_content_labelled_as_compressed_is_stored_as_sent(server: Server, tmp_path: Path) -> None:
    body = gzip.compress(b"inner", mtime=0)
    server.answers = [reply(body=body, Content_Encoding="gzip")]
    sha256 = hashlib.sha256(body).hexdigest()
    assert fetch(server.url, tmp_path, sha256).read_bytes() == body


def test_cut_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    server.answers = [reply(body=BODY[:100_000], length=len(BODY)), serve_ranges]
    heard: list[tuple[int, int | None]] = []
    path = download.fetch(server.url, SHA256, tmp_path, lambda *a: heard.append(a), backoff_s=0.01)
    assert path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=100000-"]
    assert heard == sorted(heard) and {total for _, total in heard} == {len(BODY)}


def test_the_next_call_resumes_an_earlier_download(server: Server, tmp_path: Path) -> None:
    server.answers = [reply(body=BODY[:70_000], length=len(BODY))]
    with pytest.raises(InputError, match="The next run resumes"):
        fetch(server.url, tmp_path, attempts=1)
    server.answers = [serve_ranges]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.ranges == [None, "bytes=70000-"]


def test_server_that_ignores_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.answers = [reply(body=BODY[:100_000], length=len(BODY)), reply()]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.ranges == [None, "bytes=100000-"]


@pytest.mark.parametrize("part", [BODY, BODY + b"more"], ids=["whole", "longer"])
def test_part_that_leaves_nothing_to_ask_for_starts_over(
    server: Server, tmp_path: Path, part: bytes
) -> None:
    server.answers = [serve_ranges]
    (tmp_path / f"{SHA256}.part").write_bytes(part)
    assert fetch(server.url, tmp_path, attempts=1).read_bytes() == BODY
    assert server.ranges == [f"bytes={len(part)}-", None]


def test_answer_for_another_range_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{SHA256}.part").write_bytes(BODY[:10])
    server.answers = [
        reply(206, BODY[99:], Content_Range=f"bytes 99-{len(BODY) - 1}/{len(BODY)}"),
        reply(),
    ]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.ranges == ["bytes=10-", None]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_is_asked_again_after_growing_pauses(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.answers = [reply(status, b"busy")] * 3 + [reply()]
    assert download.fetch(server.url, SHA256, tmp_path, backoff_s=7).read_bytes() == BODY
    assert pauses == [7, 14, 28]


@pytest.mark.parametrize("status", [304, 403, 404])
def test_other_answers_are_errors_at_once(server: Server, tmp_path: Path, status: int) -> None:
    server.answers = [reply(status, b"")]
    with pytest.raises(InputError, match=rf"{server.url} answered {status} .*corpus\.url"):
        fetch(server.url, tmp_path)
    assert len(server.ranges) == 1


def test_error_page_with_status_200_fails_the_checksum(server: Server, tmp_path: Path) -> None:
    page = b"<html>Please log in</html>"
    server.answers = [reply(body=page)]
    with pytest.raises(InputError) as caught:
        fetch(server.url, tmp_path)
    found = hashlib.sha256(page).hexdigest()
    assert all(word in str(caught.value) for word in (server.url, SHA256, found))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply(length=len(BODY) - 1), "wrong checksum"),
        (reply(body=BODY + b"more"), "wrong checksum"),
        (reply(body=BODY + b"more", length=None), "wrong checksum"),
        (reply(body=BODY[:-1]), "wrong checksum"),
        (reply(body=BODY[:-1], length=None), "wrong checksum"),
        (reply(body=BODY[:-1], length=len(BODY)), "could not be downloaded in 3 attempts"),
        (reply(body=b""), "wrong checksum"),
        (reply(302, b"", Location="/again"), "redirects"),
        (reply(302, b"", Location="ftp://127.0.0.1/x"), "cannot be fetched"),
    ],
)
def test_wrong_bodies_end_in_one_error(
    server: Server, tmp_path: Path, answer: Answer, message: str
) -> None:
    server.answers = [answer]
    with pytest.raises(InputError, match=message):
        fetch(server.url, tmp_path)
    assert len(server.ranges) <= 31  # requests follows 30 redirects


def test_body_without_length_is_bounded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_UNANNOUNCED_BYTES", 100_000)
    server.answers = [reply(length=None)]
    with pytest.raises(InputError, match="over 100,000 bytes"):
        fetch(server.url, tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(download, "MAX_UNANNOUNCED_BYTES", len(BODY))
    assert fetch(server.url, tmp_path).read_bytes() == BODY


def test_host_that_hangs_is_given_up(server: Server, tmp_path: Path) -> None:
    server.answers = [lambda handler: time.sleep(1)]
    with pytest.raises(InputError, match="timed out"):
        download.fetch(server.url, SHA256, tmp_path, attempts=2, timeout_s=0.1, backoff_s=0.01)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, from where the range begins."""
    start = int((handler.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
    status = {"Content_Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"} if start else {}
    reply(206 if start else 200, b"", length=len(BODY) - start, **status)(handler)
    with contextlib.suppress(OSError):  # it is hung up on
        for byte in BODY[start:]:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.02)


def test_host_that_sends_a_byte_now_and_then_is_given_up(server: Server, tmp_path: Path) -> None:
    server.answers = [drip]
    slow = {"attempts": 3, "timeout_s": 0.2, "backoff_s": 0.01, "slowest_bytes_per_s": 1000}
    with pytest.raises(InputError, match=r"in 3 attempts \(last: only [0-9]+ bytes in 0 s\)"):
        download.fetch(server.url, SHA256, tmp_path, **slow)
    (part,) = tmp_path.iterdir()
    kept = part.read_bytes()
    assert kept and BODY.startswith(kept)  # of all attempts: each goes on from the one before
    server.answers = [serve_ranges]
    assert fetch(server.url, tmp_path).read_bytes() == BODY
    assert server.ranges[-1] == f"bytes={len(kept)}-"


def test_host_that_announces_more_than_the_disk_has_room_for(
    server: Server, tmp_path: Path
) -> None:
    server.answers = [reply(length=10**15)]
    with pytest.raises(InputError, match="announces another 1,000,000,000,000,000"):
        fetch(server.url, tmp_path)
    assert len(server.ranges) == 1


def test_a_full_disk_is_named(server: Server, tmp_path: Path) -> None:
    def fill(done: int, total: int | None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    server.answers = [reply()]
    with pytest.raises(InputError, match=rf"no space left on the disk for .*{SHA256}.part"):
        download.fetch(server.url, SHA256, tmp_path, fill)
    assert len(server.ranges) == 1


def test_unreachable_host_names_the_alternatives(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/reviews.tar.gz"
        with pytest.raises(InputError) as caught:
            fetch(url, tmp_path)
    ways = (url, "dvc exp run -S corpus.url=", "params.yaml", "corpus.url=/path/to/", "make demo")
    assert all(words in str(caught.value) for words in ways)


def test_local_archives_are_used_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "a b.tar.gz"
    archive.write_bytes(BODY)
    directory = tmp_path / "downloads"
    monkeypatch.chdir(tmp_path)
    assert fetch(archive.as_uri(), directory) == archive
    assert fetch(str(archive), directory) == archive
    assert fetch("a b.tar.gz", directory) == Path("a b.tar.gz")
    assert not directory.exists()
    with pytest.raises(InputError, match="wrong checksum"):
        fetch(str(archive), directory, "0" * 64)
    assert archive.exists()


def test_missing_local_archive_says_what_experiments_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    with pytest.raises(InputError, match=r"no such file or folder: gone\.tar\.gz\.$"):
        fetch("gone.tar.gz", tmp_path)
    monkeypatch.setenv("DVC_EXP_NAME", "tall-tale")
    with pytest.raises(InputError, match="only tracked files: `dvc add` it, or give an absolute"):
        fetch("gone.tar.gz", tmp_path)
    with pytest.raises(InputError, match=r"gone\.tar\.gz\.$"):
        fetch((tmp_path / "gone.tar.gz").as_uri(), tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/a.tar.gz", "corpus.url=ftp://host/a.tar.gz cannot be read: use file:///"),
        ("file://elsewhere/a.tar.gz", "file:///absolute/path"),
        ("http://", "cannot be fetched"),
    ],
)
def test_unusable_addresses(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fetch(url, tmp_path)


SECRET = "hunter2"
SIGNED = f"?X-Amz-Signature={SECRET}&anything={SECRET}"


@pytest.mark.parametrize(
    "answer",
    [
        reply(403),
        reply(503),
        reply(body=b"another"),
        reply(length=10**15),
        reply(302, b"", Location=f"/again{SIGNED}"),
        reply(302, b"", Location=f"http://127.0.0.1:9/x{SIGNED}"),
        reply(302, b"", Location=f"ftp://me:{SECRET}@host/x{SIGNED}"),
        lambda handler: None,
    ],
)
@pytest.mark.parametrize("user", ["", f"me:{SECRET}@", f"me:p@ss{SECRET}@", f"me:?{SECRET}@"])
def test_no_secret_of_an_address_is_shown(
    server: Server, tmp_path: Path, answer: Answer, user: str
) -> None:
    server.answers = [answer]
    url = server.url.replace("//", f"//{user}") + SIGNED
    with pytest.raises(InputError) as caught:
        download.fetch(
            url, SHA256, tmp_path, key="MINIGPT_CORPUS_URL", attempts=2, timeout_s=5, backoff_s=0.01
        )
    assert SECRET not in str(caught.value)
    assert "p@ss" not in str(caught.value)


def test_a_refused_address_leads_to_a_signed_one(server: Server, tmp_path: Path) -> None:
    server.answers = [reply(403)]
    with pytest.raises(
        InputError, match=r"answered 403 .*check corpus.url, set MINIGPT_CORPUS_URL"
    ):
        fetch(server.url, tmp_path)


def test_a_faulty_proxy_is_not_blamed_on_the_address(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", "http://")
    with pytest.raises(InputError, match="check HTTP_PROXY and HTTPS_PROXY") as caught:
        fetch(server.url, tmp_path)
    assert "corpus.url" not in str(caught.value)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.WARNING, "urllib3")  # the stage's own level goes with the test
    return caplog


def resolved(url: str, storage: str = "", **changes: Any) -> SimpleNamespace:
    values = {"format": "archive", "url": url, "sha256": SHA256, "folders": ["a/b/c"]}
    engine = EngineConfig(kind="ray", storage=storage)
    return SimpleNamespace(corpus=CorpusConfig(**{**values, **changes}), engine=engine)


def test_a_signed_address_comes_from_the_environment_and_is_written_nowhere(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read(path: Path, *args: object) -> Iterator[pa.RecordBatch]:
        assert path.read_bytes() == BODY
        row = {"id": "a", "split": "", "label": None, "rating": None, "text": "a"}
        yield pa.RecordBatch.from_pylist([row], corpus.SCHEMA)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(archive, "read", read)
    configured = resolved("http://127.0.0.1:9/reviews.tar.gz")
    monkeypatch.setattr(config, "load", lambda path: configured)
    monkeypatch.setenv("MINIGPT_CORPUS_URL", f" {server.url}{SIGNED}\n")
    server.answers = [reply()]
    stage.run()
    assert Path("data/reviews.parquet").is_file()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    shown = log.text + "".join(capsys.readouterr())
    assert SECRET not in shown and SECRET.encode() not in written

    # Another body than the configuration's is refused wherever it came from.
    shutil.rmtree("data")
    server.answers = [reply(body=b"another")]
    with pytest.raises(InputError, match=r"wrong checksum.*Check MINIGPT_CORPUS_URL"):
        stage.run()
    monkeypatch.setenv("MINIGPT_CORPUS_URL", "")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(
        InputError, match=r"127\.0\.0\.1:9/reviews\.tar\.gz could not be downloaded"
    ):
        stage.run()


def test_headers_that_make_no_sense_show_no_address(
    server: Server,
    tmp_path: Path,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\nA: 1\r\n=?not a header\r\n\r\n" + BODY)

    server.answers = [answer]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(archive, "read", lambda *args: iter(()))
    configured = resolved(server.url)
    monkeypatch.setattr(config, "load", lambda path: configured)
    monkeypatch.setenv("MINIGPT_CORPUS_URL", server.url + SIGNED)
    stage.run()
    assert SECRET not in log.text


def test_files_of_one_s_own_are_read_from_where_a_file_address_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a b?"
    folder.mkdir()
    (folder / "a.txt").write_text("A film.", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT_CORPUS_URL", "http://127.0.0.1:9/x")  # for archives alone
    for url in (folder.as_uri(), folder.as_uri().replace("//", "//localhost"), "a b?"):
        configured = resolved(url, format="files", sha256="")
        monkeypatch.setattr(config, "load", lambda path, found=configured: found)
        stage.run()
        assert corpus.read_reviews(Path("data/reviews.parquet"), ["id"])["id"].to_pylist() == ["a"]
    configured = resolved("https://host/a", format="files", sha256="")
    monkeypatch.setattr(config, "load", lambda path: configured)
    with pytest.raises(InputError, match=r"corpus.url=https://host/a cannot be read: use file:///"):
        stage.run()


def test_with_a_storage_the_table_is_at_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.txt").write_text("A film.", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    configured = resolved("mine", f"file://{tmp_path}/shared", format="files", sha256="")
    monkeypatch.setattr(config, "load", lambda path: configured)
    stage.run()
    table = Path("data/reviews.parquet")
    (shard,) = pq.read_table(table).to_pylist()
    assert shard == {
        "records": 1,
        "bytes": Path("shared", shard["sha256"]).stat().st_size,
        "sha256": hashlib.sha256(Path("shared", shard["sha256"]).read_bytes()).hexdigest(),
        "address": f"file://{tmp_path}/shared/{shard['sha256']}",
    }
    assert corpus.read_reviews(table, ["id", "text"]).to_pylist() == [
        {"id": "a", "text": "A film."}
    ]
    # A storage that can't be reached is told before the corpus is read.
    monkeypatch.setattr(own_files, "read", None)
    configured.engine = EngineConfig(kind="ray", storage=f"{tmp_path}/mine/a.txt/in")
    with pytest.raises(InputError, match=r"a.txt/in can't be reached"):
        stage.run()

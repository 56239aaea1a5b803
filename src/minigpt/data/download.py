"""The archive of reviews: a local file or a download, verified by its checksum."""

import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests
import urllib3
from requests import exceptions

from minigpt.common import files
from minigpt.common.errors import InputError, missing
from minigpt.common.progress import Progress
from minigpt.common.redaction import redact

# Supplies a signed address, which corpus.url must not hold: resolved.yaml is committed.
SIGNED_URL = "MINIGPT_CORPUS_URL"
# A body of unannounced length must not fill the disk. The official archive has 80 MiB.
MAX_UNANNOUNCED_BYTES = 2**30
_CHUNK_BYTES = 2**16
# What a broken connection or a busy host raises, from the first request to the last byte.
_TEMPORARY = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)
_WRONG_URL = (
    exceptions.InvalidURL,
    exceptions.InvalidSchema,
    exceptions.MissingSchema,
    requests.TooManyRedirects,
)


def fetch(
    url: str,
    sha256: str,
    directory: Path,
    progress: Progress | None = None,
    *,
    key: str = "corpus.url",
    attempts: int = 5,
    timeout_s: float = 30.0,
    backoff_s: float = 1.0,
    slowest_bytes_per_s: float = 10_000.0,
) -> Path:
    """Returns the path of an archive with the right checksum, which it downloads if necessary.

    Args:
        url: http(s)://, which is downloaded, or file:// or a plain path, which is used in place.
        sha256: The archive's checksum, 64 lower-case hexadecimal digits.
        directory: Where downloads are kept as <sha256>.tar.gz, and partial ones as <sha256>.part.
        progress: Called as bytes arrive, with the bytes so far and the total (None if unknown).
        key: What supplied the address, for messages.
        attempts: Requests before giving up.
        timeout_s: The longest wait for a connection or for the next bytes.
        backoff_s: The pause before the second attempt; each later pause is twice as long.
        slowest_bytes_per_s: An attempt that brings less than that over `timeout_s` fails.

    Raises:
        InputError: The archive is not available, or its checksum is wrong.
    """
    if not re.match("https?://", url, re.IGNORECASE):
        path = local_path(url, key)
        if not path.is_file():
            raise missing(key, path)
        if (found := files.sha256(path)) != sha256:
            raise _wrong_checksum(redact(url), key, sha256, found, "The file is left as it is.")
        return path

    directory.mkdir(parents=True, exist_ok=True)
    archive, part = directory / f"{sha256}.tar.gz", directory / f"{sha256}.part"
    if archive.is_file() and files.sha256(archive) == sha256:
        return archive
    reason: object = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(backoff_s * 2 ** (attempt - 1))
        try:
            reason = _download(url, key, part, progress, timeout_s, slowest_bytes_per_s)
        except _TEMPORARY as error:
            reason = error
        except requests.RequestException as error:  # another request would fail the same way
            if isinstance(error, exceptions.InvalidProxyURL):
                then = "; check HTTP_PROXY and HTTPS_PROXY."
            else:
                then = f"; check {key}." if isinstance(error, _WRONG_URL) else "."
            raise InputError(f"{shown(url)} cannot be fetched: {shown(error)}{then}") from error
        except OSError as error:
            if files.is_full(error):
                raise InputError(
                    f"no space left on the disk for {part}: make room, then run this again"
                ) from error
            raise
        if reason is None:
            break
    else:
        raise InputError(
            f"{shown(url)} could not be downloaded in {attempts} attempts (last: {shown(reason)}). "
            "Use a mirror (`dvc exp run -S corpus.url=https://... -S corpus.sha256=...`, or edit "
            "corpus.url in params.yaml), a local file (corpus.url=/path/to/aclImdb_v1.tar.gz), or "
            "the embedded sample (`make demo`). The next run resumes the download."
        )
    if (found := files.sha256(part)) != sha256:
        part.unlink()
        raise _wrong_checksum(shown(url), key, sha256, found, "The download is deleted.")
    os.replace(part, archive)
    return archive


def shown(text: object) -> str:
    """Returns a text as messages show it: the queries of its URLs, which may sign them, are cut."""
    return re.sub(r"(?<=\S[?#])\S+", "...", redact(str(text)))


def local_path(url: str, key: str = "corpus.url") -> Path:
    """Returns the path that a file:// URL or a plain path names.

    Args:
        url: A file on this machine.
        key: What supplied it, for messages.

    Raises:
        InputError: It is another kind of URL.
    """
    if "://" not in url:
        return Path(url).expanduser()
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise InputError(
            f"{key}={shown(url)} cannot be read: use file:///absolute/path, a plain path or, for "
            "an archive, http:// or https://."
        )
    return Path(url2pathname(parts.path))


def _download(
    url: str,
    key: str,
    part: Path,
    progress: Progress | None,
    timeout_s: float,
    slowest_bytes_per_s: float,
) -> str | None:
    """Completes `part`; returns the reason if it fails and another attempt may succeed."""
    done = part.stat().st_size if part.exists() else 0
    # The bytes are stored as sent, since some hosts label a .gz file as a compressed transfer.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout_s) as response:
        status = response.status_code
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if done and (status == 416 or (status == 206 and not resumed)):
            part.unlink()
            return _download(url, key, part, progress, timeout_s, slowest_bytes_per_s)
        if status == 429 or status >= 500:
            return f"{status} {response.reason}"
        if status != 200 and not (done and status == 206):
            signed = f", set {SIGNED_URL} to a (new) signed address" if status in (401, 403) else ""
            raise InputError(
                f"{shown(url)} answered {status} {shown(response.reason)}: check {key}{signed}, or "
                "give a local file (corpus.url=/path/to/aclImdb_v1.tar.gz)."
            )
        done = done if status == 206 else 0
        announced = response.raw.length_remaining
        total = None if announced is None else done + announced
        free = shutil.disk_usage(part.parent).free
        if announced is not None and announced > free:
            raise InputError(
                f"{shown(url)} announces another {announced:,} bytes, but {part.parent} has room "
                f"for {free:,}: make room, or check {key}"
            )
        since, before = time.monotonic(), done
        with part.open("ab" if done else "wb") as file:
            # read1 returns what has arrived, so that a slow host is noticed before a chunk is full.
            while chunk := response.raw.read1(_CHUNK_BYTES, decode_content=False):
                file.write(chunk)
                done += len(chunk)
                if (passed := time.monotonic() - since) > timeout_s:
                    if done - before < slowest_bytes_per_s * passed:
                        return f"only {done - before:,} bytes in {passed:.0f} s"
                    since, before = time.monotonic(), done
                if total is None and done > MAX_UNANNOUNCED_BYTES:
                    part.unlink()
                    raise InputError(
                        f"{shown(url)} sends over {MAX_UNANNOUNCED_BYTES:,} bytes of unannounced "
                        f"length: check {key}, or give a local file (corpus.url=/path/to/file)."
                    )
                if progress:
                    progress(done, total)
    return None


def _wrong_checksum(url: str, key: str, expected: str, found: str, then: str) -> InputError:
    return InputError(
        f"{url} has the wrong checksum: expected sha256 {expected}, found {found}. {then} "
        f"Check {key} and corpus.sha256, and run again."
    )

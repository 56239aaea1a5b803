"""The archive of reviews: found or downloaded, and verified."""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests
import urllib3

from minigpt.common.errors import InputError, missing

# Twelve times the official archive: a body that announces no length must not fill the disk.
MAX_UNANNOUNCED_BYTES = 2**30
_CHUNK_BYTES = 2**16
# What a broken line or a busy host raises, from before the first byte to the middle of the body.
_PASSING = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)


def fetch(
    url: str,
    sha256: str,
    directory: Path,
    progress: Callable[[int, int | None], None] | None = None,
    *,
    attempts: int = 5,
    timeout_s: float = 30.0,
    backoff_s: float = 1.0,
    slowest_bytes_per_s: float = 10_000.0,
) -> Path:
    """Return a local archive whose checksum is verified, downloading it where need be.

    Args:
        url: http(s):// (downloaded), or file:// or a plain path (used where it lies).
        sha256: The archive's checksum, 64 hexadecimal digits.
        directory: Where downloads are kept, as <sha256>.tar.gz, and broken ones resumed, as .part.
        progress: Called as bytes arrive with the bytes so far and in all (None where unknown).
        attempts: Requests made before giving up.
        timeout_s: Longest wait for a connection, or for the next bytes.
        slowest_bytes_per_s: An attempt fails that brings less than that over `timeout_s`.
        backoff_s: Pause before the second attempt; each later pause is twice as long.

    Returns:
        The path of the archive.

    Raises:
        InputError: The archive can't be had, or its checksum is another.
    """
    sha256 = sha256.lower()
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(
            f"corpus.sha256={sha256!r} is not a sha256: give the 64 hexadecimal digits that "
            f"`sha256sum` prints for {url}."
        )
    if not re.match("https?://", url, re.IGNORECASE):
        path = _local_path(url)
        if (found := _sha256(path)) != sha256:
            raise _wrong_checksum(url, sha256, found, "The file is left as it is.")
        return path

    directory.mkdir(parents=True, exist_ok=True)
    archive, part = directory / f"{sha256}.tar.gz", directory / f"{sha256}.part"
    if archive.is_file() and _sha256(archive) == sha256:
        return archive
    reason: object = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(backoff_s * 2 ** (attempt - 1))
        try:
            reason = _download(url, part, progress, timeout_s, slowest_bytes_per_s)
        except _PASSING as error:
            reason = error
        except OSError as error:  # a URL that no request can mend, or a disk that is full
            raise InputError(f"{url} can't be fetched into {directory}: {error}") from error
        if reason is None:
            break
    else:
        raise InputError(
            f"{url} could not be downloaded in {attempts} attempts (last: {reason}). Three ways "
            "on: a mirror (`dvc exp run -S corpus.url=https://... -S corpus.sha256=...`, or edit "
            "corpus.url in params.yaml), a local file (corpus.url=/path/to/aclImdb_v1.tar.gz), or "
            "the embedded sample (`make demo`). What has arrived is kept and resumed next time."
        )
    if (found := _sha256(part)) != sha256:
        part.unlink()
        raise _wrong_checksum(url, sha256, found, "The download is deleted.")
    os.replace(part, archive)
    return archive


def _download(
    url: str,
    part: Path,
    progress: Callable[[int, int | None], None] | None,
    timeout_s: float,
    slowest_bytes_per_s: float,
) -> str | None:
    """Bring `part` up to the whole body; returns why not, where trying again may help."""
    done = part.stat().st_size if part.exists() else 0
    # Counted, resumed and hashed as stored: some hosts label a .gz file as a compressed transfer.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout_s) as response:
        status = response.status_code
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if done and (status == 416 or (status == 206 and not resumed)):
            part.unlink()
            return _download(url, part, progress, timeout_s, slowest_bytes_per_s)
        if status == 429 or status >= 500:
            return f"{status} {response.reason}"
        if status != 200 and not (done and status == 206):
            raise InputError(
                f"{url} answered {status} {response.reason}: check corpus.url in params.yaml, or "
                "give a local file (corpus.url=/path/to/aclImdb_v1.tar.gz)."
            )
        done = done if status == 206 else 0
        announced = response.raw.length_remaining
        total = None if announced is None else done + announced
        free = shutil.disk_usage(part.parent).free
        if announced is not None and announced > free:
            raise InputError(
                f"{url} announces {announced:,} bytes more, {part.parent} has room for {free:,}: "
                "make room, or check corpus.url"
            )
        since, before = time.monotonic(), done
        with part.open("ab" if done else "wb") as file:
            # Not in whole chunks: a slow host would be waited for till one is full.
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
                        f"{url} sends over {MAX_UNANNOUNCED_BYTES:,} bytes without announcing how "
                        "many: check corpus.url, or give a local file (corpus.url=/path/to/file)."
                    )
                if progress:
                    progress(done, total)
    return None


def _local_path(url: str) -> Path:
    """Return the path of an existing file given as a file:// URL or a path."""
    parts = urlsplit(url)
    if "://" in url and (parts.scheme != "file" or parts.netloc not in ("", "localhost")):
        raise InputError(
            f"corpus.url={url} is neither http:// nor https://, nor a file: give such a URL, "
            "file:///absolute/path, or a plain path."
        )
    path = Path(url2pathname(parts.path) if "://" in url else url).expanduser()
    if not path.is_file():
        raise missing("corpus.url", path)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wrong_checksum(url: str, expected: str, found: str, then: str) -> InputError:
    return InputError(
        f"{url} has the wrong checksum: expected sha256 {expected}, found {found}. {then} "
        "Check corpus.url and corpus.sha256, and run again."
    )

"""Before a stage runs: that it is alone, and that its inputs are what other stages wrote."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from minigpt.common.errors import InputError

PIPELINE = Path("dvc.yaml")
LOCK = Path("dvc.lock")


@contextlib.contextmanager
def alone(stage: str, wait_s: float = 10) -> Iterator[None]:
    """Keeps a second process of the same stage out of this folder.

    DVC's own locks do so while DVC lives: one that is killed alone leaves its stage running.

    Args:
        stage: its name.
        wait_s: how long to wait for one that is about to end.

    Raises:
        InputError: another is running.
    """
    path = Path(f".dvc/tmp/minigpt-{stage}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise InputError(
                        f"process {file.read()} runs this stage already in this folder (a killed "
                        "`dvc repro` leaves its stage running): wait for it, or end it with `kill`"
                    ) from None
            time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def recorded() -> dict[str, tuple[str, str]]:
    """The stage that wrote each output, and the md5 that DVC took of it then, by path."""
    stages = _yaml(LOCK).get("stages", {})
    return {
        out["path"]: (name, out["md5"])
        for name, entry in stages.items()
        for out in entry.get("outs", [])
        if "md5" in out
    }


def check_inputs(stage: str) -> None:
    """Compares what a stage is about to read with what DVC recorded as it was written.

    DVC itself looks at its content only where time or size have changed, and before.

    Args:
        stage: as dvc.yaml names it.

    Raises:
        InputError: a file was altered since.
    """
    if "DVC_STAGE" not in os.environ:
        return  # without DVC, dvc.lock may tell of an earlier run
    entry, written = _yaml(PIPELINE)["stages"][stage], recorded()
    params = [param for param in entry.get("params", []) if isinstance(param, dict)]
    for path in [*entry.get("deps", []), *(file for param in params for file in param)]:
        by, md5 = written.get(path, (stage, ""))
        if by != stage and (altered := _altered(Path(path), md5)):
            raise InputError(
                f"{altered} is not what the stage {by} wrote (its md5 differs from that in "
                f"{LOCK}): remove it and run `dvc repro`, which brings it back, or keep it by "
                f"`dvc commit {by}`"
            )


def _altered(path: Path, md5: str) -> Path | None:
    """The file that differs (its folder where DVC's cache can't tell which), if any."""
    if not path.is_dir():
        return None if path.is_file() and _md5(path) == md5 else path
    found = {f.relative_to(path).as_posix(): _md5(f) for f in path.rglob("*") if f.is_file()}
    listed = [{"md5": found[name], "relpath": name} for name in sorted(found)]
    if f"{hashlib.md5(json.dumps(listed).encode()).hexdigest()}.dir" == md5:
        return None
    # In DVC's queued runs the cache is that of the repository.
    cache = Path(os.environ.get("DVC_ROOT", "."), ".dvc/cache/files/md5", md5[:2], md5[2:])
    with contextlib.suppress(OSError, ValueError):
        kept = {entry["relpath"]: entry["md5"] for entry in json.loads(cache.read_text())}
        return path / min(name for name in {*kept, *found} if kept.get(name) != found.get(name))
    return path


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _yaml(path: Path) -> dict[str, Any]:
    return (yaml.safe_load(path.read_text()) if path.exists() else None) or {}

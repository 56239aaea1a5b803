"""Rows about the engine: what Ray costs at the size of the sample, and 1x to 16x the corpus."""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import yaml

from benchmarks.data import FOLDERS, existing
from benchmarks.measure import PROJECT, NotMeasuredError, Options, Result, run
from minigpt.common import files

FACTORS = (1, 4, 16)
STAGES = ("download", "vocab", "sequences")
SPREAD = ("vocab", "sequences", "train")  # the stages that Ray runs


def overhead(options: Options) -> Result:
    """Seconds of vocab, sequences and an epoch of experiment=demo by two processes or workers.

    The other side is Ray, and what it takes longer is its own: the sample is small. Each stage is
    printed as soon as it is measured.
    """
    if not importlib.util.find_spec("ray"):
        raise NotMeasuredError("Ray is not installed: make ray")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for engine in ("local", "ray"):
        with tempfile.TemporaryDirectory() as folder:
            clone = Path(folder, "project")
            run("git", "clone", "--quiet", PROJECT, clone)
            params = yaml.safe_load((clone / "params.yaml").read_text(encoding="utf-8"))
            params["groups"] |= {"experiment": "demo", "engine": engine}
            params["train"] |= {"backend": "jax", "epochs": 1}
            params["engine"] = {"workers": 2}
            files.write_text(clone / "params.yaml", yaml.safe_dump(params))
            for stage in ("compose", "download", *SPREAD):
                measured = _stage(stage, clone)
                if stage in SPREAD:
                    print(f"{engine}, {stage}: {measured}", file=sys.stderr, flush=True)
                    found.setdefault(engine, {})[stage] = measured
    here, there = (
        sum(measured["seconds"] for measured in found[engine].values())
        for engine in ("local", "ray")
    )
    return Result([here], [there], facts=found)


def scale(options: Options) -> Result:
    """Seconds of download, vocab and sequences at 1x, 4x and 16x the corpus, and their memory.

    Where Ray is installed, two of its workers do vocab and sequences too, and must leave the same
    bytes. The result is the time per review at 16x without Ray, as a multiple of the time at 1x.
    Each stage is printed as soon as it is measured.
    """
    engines = ["local", "ray"] if importlib.util.find_spec("ray") else ["local"]
    found: dict[str, dict[str, list[float]]] = {}
    for factor in FACTORS:
        with tempfile.TemporaryDirectory() as folder:
            project = Path(folder)
            path = project / "reviews.tar.gz"
            _repeat(existing(options.archive), path, factor, options.every)
            settings = yaml.safe_load((PROJECT / "resolved.yaml").read_text(encoding="utf-8"))
            settings["corpus"] |= {"format": "archive", "url": str(path), "folders": FOLDERS}
            settings["corpus"]["sha256"] = files.sha256(path)
            for name in ("data", "reports"):
                (project / name).mkdir()
            digests = []
            for engine in engines:
                settings["engine"] = {"kind": engine, "workers": 2 if engine == "ray" else 1}
                settings["train"]["backend"] = "jax" if engine == "ray" else "tensorflow"
                files.write_text(project / "resolved.yaml", yaml.safe_dump(settings))
                for stage in STAGES if engine == "local" else STAGES[1:]:
                    name = stage if engine == "local" else f"{stage} by Ray"
                    measured = _stage(stage, project)
                    print(f"{factor}x, {name}: {measured}", file=sys.stderr, flush=True)
                    for what, figure in measured.items():
                        found.setdefault(name, {}).setdefault(what, []).append(figure)
                made = sorted(path for path in (project / "data").glob("*/*") if path.is_file())
                digests.append([(path.name, files.sha256(path)) for path in made])
            if digests[0] != digests[-1]:
                raise RuntimeError("Ray's workers left other bytes than the local stages")
    whole = np.sum([found[stage]["seconds"] for stage in STAGES], axis=0)
    facts = {"factors": FACTORS, "every": options.every, **found}
    return Result([float(whole[-1] / whole[0] / FACTORS[-1])], facts=facts)


def _stage(stage: str, project: Path) -> dict[str, float]:
    """Runs a stage in a folder.

    Returns:
        Seconds, and processor time with all processes that it starts; the peak memory in MB of the
        stage's own process, and of the largest worker of Ray.
    """
    command = [sys.executable, "-m", "minigpt.stages", stage]
    env = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    del env["KERAS_BACKEND"]  # this process's own
    began = time.perf_counter()
    seen: dict[int, tuple[float, float, bool]] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        running = subprocess.Popen(command, cwd=project, env=env, stdout=said, stderr=said)
        own = psutil.Process(running.pid)
        while running.poll() is None:
            with contextlib.suppress(psutil.Error):  # it has ended, as any of the others may
                for process in [own, *own.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error, FileNotFoundError, ProcessLookupError):
                        seen[process.pid] = _seen(process)
            time.sleep(0.2)
        seconds = time.perf_counter() - began
        if running.returncode:
            said.seek(0)
            raise NotMeasuredError(f"the stage {stage} failed: {said.read()[-500:]}")
    found = {
        "seconds": round(seconds, 2),
        "processor_s": round(sum(processor_s for processor_s, _, _ in seen.values()), 2),
        "peak_MB": round(seen[running.pid][1], 1),
    }
    workers = [peak for _, peak, is_worker in seen.values() if is_worker]
    return found | ({"worker_peak_MB": round(max(workers), 1)} if workers else {})


def _seen(process: psutil.Process) -> tuple[float, float, bool]:
    """Returns a process's processor time, its peak memory in MB, and whether Ray's tasks run in it.

    Raises:
        psutil.Error, OSError: It has ended.
    """
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    if not peak:  # a process that has ended has no memory
        raise psutil.NoSuchProcess(process.pid)
    times, called = process.cpu_times(), process.cmdline()
    is_worker = bool(called) and called[0].startswith("ray::")
    return times.user + times.system, int(peak[1]) * 1024 / 1e6, is_worker


def _repeat(source: Path, target: Path, times: int, every: int) -> None:
    """Writes an archive of every n-th review of another, so many times, under new numbers."""
    seen = 0
    with tarfile.open(source) as old, tarfile.open(target, "w:gz", compresslevel=1) as new:
        for member in old:
            folder, _, name = member.name.rpartition("/")
            if not member.isreg() or folder not in FOLDERS:
                continue
            seen += 1
            if seen % every:
                continue
            file = old.extractfile(member)
            assert file is not None  # a regular member has one
            text = file.read()
            number, _, rest = name.partition("_")
            for copy in range(times):
                info = tarfile.TarInfo(f"{folder}/{int(number) + copy * 10**6}_{rest}")
                info.size = len(text)
                new.addfile(info, io.BytesIO(text))

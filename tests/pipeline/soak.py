"""Kills the pipeline again and again, and compares what it ends with: `make soak MINUTES=10`.

The pipeline of the tests runs once undisturbed, stage by stage.  Then copies of the project from
before a stage (or before all of them) run that stage under the real `dvc`, and are killed with
SIGKILL at random moments: everything at once, the stage alone, or DVC alone.  After some kills a
run is left to finish, and every byte of its outputs is compared with the undisturbed ones.
"""

import argparse
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from helpers import Project, new_project

KILLS_A_RUN = 8
ATTEMPTS = 12  # to finish; a stage that DVC left behind is waited for
WHOLE = "dvc repro"  # all stages
# Which training it was, and when: never the same twice.
NEVER_THE_SAME = {"reports/run.json"}
# Where it was never committed there is nothing to go back to.
LAST_LOCK = ["sh", "-c", "git checkout --quiet dvc.lock || rm dvc.lock"]
# What DVC itself leaves half written, and what brings it back.
MENDS = {
    # A folder of its run cache, made and not yet filled.
    "join() argument must be str": ["find", ".dvc/cache/runs", "-type", "d", "-empty", "-delete"],
    "JSON structure is corrupted": ["rm", "-f", ".dvc/tmp/rwlock"],
    "'dvc.lock' is invalid": LAST_LOCK,
    "dvc.lock' validation failed": LAST_LOCK,
}


@dataclass
class Row:
    """What happened to a stage."""

    seconds: float = 0.0  # undisturbed
    latest: float = 0.0  # of the last that was not killed; the machine may be busier by now
    runs: int = 0
    running: int = 0
    faults: int = 0
    finished: int = 0
    differing: int = 0  # bytes, or files that are there on one side only
    mended: int = 0  # files of DVC's own


class Soak:
    """One reference, and the runs that are compared with it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.lock = threading.Lock()
        self.before: dict[str, Project] = {}
        self.rows: dict[str, Row] = {}
        self.number = 0

    def reference(self) -> None:
        """Runs each stage once, and keeps the project as it was before."""
        project = new_project(self.folder / "reference/project")
        # Longer, so that kills meet training and not only its imports.
        project.edit("conf/train/default.yaml", r"^epochs:.*", "epochs: 6")
        project.commit()
        for stage in project.yaml("dvc.yaml")["stages"]:
            self.before[stage] = project.copy(self.folder / f"before-{stage}/project")
            began = time.monotonic()
            project.dvc("repro", "--single-item", stage)
            self.rows[stage] = Row(*(time.monotonic() - began,) * 2)
            project.commit()
        self.before[WHOLE] = self.before[next(iter(self.rows))]
        self.rows[WHOLE] = Row(*(sum(row.seconds for row in self.rows.values()),) * 2)
        self.finished = project

    def work(self, until: float) -> None:
        """Runs what has been killed least, till the time is up."""
        while time.monotonic() < until:
            with self.lock:
                stage = min(self.rows, key=self.killed)
                row = self.rows[stage]
                row.runs, row.running = row.runs + 1, row.running + 1
                self.number += 1
                folder = self.folder / f"run-{self.number}"
            self.run(stage, self.before[stage].copy(folder / "project"), until)
            subprocess.run(["rm", "-rf", str(folder)], check=True)

    def killed(self, stage: str) -> int:
        """How often a stage has been killed, and will have been by the runs under way."""
        return self.rows[stage].faults + KILLS_A_RUN * self.rows[stage].running

    def run(self, stage: str, project: Project, until: float) -> None:
        """Kills a stage some times, lets it finish, and compares."""
        row, faults, mended = self.rows[stage], 0, 0
        command = ["dvc", "repro", *([] if stage == WHOLE else ["--single-item", stage])]
        log = project.root.parent / "log"
        code: int | None = None
        for attempt in range(KILLS_A_RUN + ATTEMPTS):
            began = time.monotonic()
            with log.open("w") as file:
                running = subprocess.Popen(
                    command,
                    cwd=project.root,
                    env=project.env,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            killed = False
            if attempt < KILLS_A_RUN and began < until:
                # Most of a stage's first half is imports.
                wait_s = row.latest * self.random.uniform(0.2, 1.1)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.wait(wait_s)
                killed = running.poll() is None and self.kill(running, project)
            faults += killed
            code = running.wait()
            printed = log.read_text()
            if code and not killed:
                for word, mend in MENDS.items():
                    if word in printed:
                        mended += 1
                        project.run(*mend)
            if code == 0:
                row.latest = time.monotonic() - began
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        differing = self.compare(stage, project) if code == 0 else 0
        with self.lock:
            row.faults += faults
            row.running -= 1
            row.mended += mended
            row.finished += code == 0
            row.differing += differing
            print(f"{stage}: {faults} faults, exit {code}, {differing} bytes differ", flush=True)
            if code:
                print(f"{stage} did not finish:\n{log.read_text()[-3000:]}", flush=True)

    def kill(self, running: "subprocess.Popen[bytes]", project: Project) -> bool:
        """Ends everything, the stage or DVC; says whether there was anything to end."""
        target = self.random.choice(["all", "all", "stage", "dvc"])
        try:
            if target == "all":
                os.killpg(running.pid, signal.SIGKILL)
            elif target == "dvc":
                running.kill()
            else:
                stages = [
                    process
                    for process in psutil.Process(running.pid).children(recursive=True)
                    if "minigpt.stages" in process.cmdline()
                ]
                for process in stages:
                    process.kill()
                return bool(stages)
        except (ProcessLookupError, psutil.Error):
            return False
        return True

    def compare(self, stage: str, project: Project) -> int:
        """Bytes that differ from the undisturbed run, and points that MLflow has twice or lacks."""
        differing = 0
        entries = self.finished.yaml("dvc.lock")["stages"]
        named = entries.values() if stage == WHOLE else [entries[stage]]
        for path in {out["path"] for entry in named for out in entry["outs"]} - NEVER_THE_SAME:
            if stage == WHOLE and path in ("reports/registered.json", "reports/model_card.md"):
                continue  # names the run, which is another
            ours, theirs = files(project / path), files(self.finished / path)
            differing += len(ours.keys() ^ theirs.keys())
            for name in ours.keys() & theirs.keys():
                a, b = ours[name], theirs[name]
                differing += abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b, strict=False))
        left = [*project.root.glob("*.tmp"), *project.root.glob("*/*.tmp")]
        if left:
            print(f"left behind: {left}", flush=True)
        return differing + len(left) + wrong_in_mlflow(project, stage)


def files(path: Path) -> dict[str, bytes]:
    """The content of a file, or of all files of a folder."""
    inside = path.rglob("*") if path.is_dir() else [path]
    return {str(p.relative_to(path)): p.read_bytes() for p in inside if p.is_file()}


def wrong_in_mlflow(project: Project, stage: str) -> int:
    """Runs, points or versions that are there twice, or are missing."""
    if not (project / "mlflow.db").exists():
        return 0
    database = sqlite3.connect(project / "mlflow.db")
    try:
        runs = database.execute("SELECT count(*) FROM runs").fetchone()[0]
        again = "SELECT key FROM metrics GROUP BY run_uuid, key, step HAVING count(*) > 1"
        twice = database.execute(again).fetchall()
        losses = database.execute("SELECT count(*) FROM metrics WHERE key = 'loss'").fetchone()[0]
        versions = database.execute("SELECT count(*) FROM model_versions").fetchone()[0]
        aliases = database.execute(
            "SELECT count(*) FROM registered_model_aliases WHERE version = 1"
        ).fetchone()[0]
    finally:
        database.close()
    wrong = (runs != 1) + len(twice) + (losses != 6)
    if stage in ("register", WHOLE):
        wrong += (versions != 1) + (aliases != 2)  # @challenger and @champion
    if wrong:
        print(f"{stage}: MLflow has {runs} runs, {losses} losses, {versions} versions, {aliases}")
    return wrong


def main() -> int:
    """Prints the table; 1 where a run did not finish or a byte differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=2, help="runs at once")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="minigpt-soak-") as folder:
        until = time.monotonic() + 60 * chosen.minutes
        soak = Soak(Path(folder), chosen.seed)
        soak.reference()
        workers = [threading.Thread(target=soak.work, args=(until,)) for _ in range(chosen.workers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    head = ("stage", "seconds undisturbed", "faults injected", "runs", "finished")
    head += ("bytes differing", "DVC's own files mended")
    print("| " + " | ".join(head) + " |")
    print("| --- " * len(head) + "|")
    for name, row in soak.rows.items():
        cells = (f"{row.seconds:.1f}", row.faults, row.runs, row.finished, row.differing)
        print(f"| {name} | " + " | ".join(map(str, (*cells, row.mended))) + " |")
    rows = soak.rows.values()
    return int(any(row.differing or row.finished < row.runs for row in rows))


if __name__ == "__main__":
    sys.exit(main())

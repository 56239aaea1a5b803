"""Takes the README's pictures of the MLflow UI with a headless browser.

    python docs/screenshots.py [--store sqlite:///mlflow.db] [--browser chromium]

The store needs a few runs and a registered model. It is only read: the server runs on a copy.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

from mlflow import MlflowClient

from minigpt.tracking import store as stores
from minigpt.tracking import view

HOST = "mlflow.localhost"  # on 127.0.0.1 the UI opens an assistant over the page
NAME = "minigpt"  # of the experiment and the model
FLAGS = """--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=60000
    --blink-settings=primaryHoverType=2,availableHoverTypes=2"""  # a mouse, which hides tools
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd")


@contextlib.contextmanager
def server(store: str, log: Path) -> Iterator[str]:
    """Runs `mlflow server` on loopback, as `make ui` starts it; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", f"--backend-store-uri={store}"]
    command += ["--workers=1", f"--port={port}", f"--cors-allowed-origins=http://{HOST}:{port}"]
    command += [f"--allowed-hosts={HOST}:{port},127.0.0.1:{port}"]
    with log.open("w", encoding="utf-8") as out:
        running = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        health = f"http://127.0.0.1:{port}/health"
        while running.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=1):
                break
            time.sleep(1)
        else:
            sys.exit(f"error: {log.read_text(encoding='utf-8')[-1000:]}")
        yield f"http://{HOST}:{port}"
    finally:
        os.killpg(running.pid, signal.SIGKILL)  # its store is a copy
        running.wait()


def main() -> None:
    """Takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--store", default="sqlite:///mlflow.db", help="a sqlite file")
    parser.add_argument("--browser", default="chromium", help="Chromium or Chrome")
    args = parser.parse_args()
    source = stores.sqlite_path(args.store)
    if not (source and source.is_file() and shutil.which(args.browser)):
        sys.exit(f"error: {args.store} and {args.browser} are needed; see --help")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store = f"{folder}/mlflow.db"
        sqlite3.connect(source).backup(sqlite3.connect(store))
        client = MlflowClient(f"sqlite:///{store}")
        (where,) = (e.experiment_id for e in client.search_experiments() if e.name == NAME)
        view.furnish(client, where)  # an older store has no view
        found = client.search_runs([where], order_by=["metrics.val_loss"])
        for run, colour in zip(found, COLOURS, strict=False):
            client.set_tag(run.info.run_id, "mlflow.runColor", colour)
        text = client.list_artifacts(best := found[0].info.run_id, "texts")[-1].path
        runs, machine = f"experiments/{where}/runs", "?workflowType=machine_learning"
        losses = f"{runs}{machine}&viewStateShareKey={view.NAME}&compareRunsMode"
        pages = {
            "runs": ("1800,560", f"{losses}=TABLE"),
            "compare": ("1500,1100", f"{losses}=CHART"),
            "texts": ("1500,520", f"{runs}/{best}/artifacts/{text}{machine}"),
            "model": ("1500,1760", f"models/{NAME}{machine}"),
        }
        browser = [args.browser, *FLAGS.split(), *["--no-sandbox"] * (os.geteuid() == 0)]
        with server(f"sqlite:///{store}", Path(folder) / "log") as address:
            for name, (size, page) in pages.items():
                picture = Path(__file__).with_name(f"{name}.png")
                own = [f"--user-data-dir={folder}/{name}", f"--window-size={size}"]
                own += [f"--screenshot={picture}", f"{address}/#/{page}"]
                subprocess.run([*browser, *own], check=True, capture_output=True)
                print(f"{picture}: {picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

"""Takes the pictures of the MLflow UI and of the page of `minigpt serve`, with a headless browser.

    python docs/screenshots.py [--store sqlite:///mlflow.db] [--browser chromium]
    python docs/screenshots.py --model FOLDER --model FOLDER2

Without `--model` the pictures are those of the MLflow UI. The store needs a few runs and a
registered model. It is only read: the server runs on a copy.
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
def server(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Runs a server on loopback, and goes on when it is healthy."""
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
        yield
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)  # it changes nothing: MLflow's store is a copy
        running.wait()


def free_port() -> int:
    """Returns a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def picture_of_page(models: list[str], browser: str, log: Path) -> None:
    """Takes the picture of the page: texts, and the candidates at one place."""
    from playwright.sync_api import expect, sync_playwright

    picture, port = Path(__file__).with_name("serve.png"), free_port()
    command = [sys.executable, "-m", "minigpt.cli", "serve", f"--port={port}"]
    command += [f"--model={model}" for model in models]
    with server(command, port, log), sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=shutil.which(browser))
        page = launched.new_page(viewport={"width": 1200, "height": 780})
        page.goto(f"http://127.0.0.1:{port}")
        page.get_by_label("Prompt").fill("this movie is")
        page.get_by_label("Most tokens").fill("50")
        if len(models) > 1:
            page.get_by_label("Compare with").select_option(index=2)
        page.get_by_role("button", name="Write").click()
        for article in page.get_by_role("article").all():
            expect(article.locator(".outcome")).not_to_be_empty(timeout=60_000)
            article.locator(".token").nth(12).click()
        page.screenshot(path=picture)
        launched.close()
    print(f"{picture}: {picture.stat().st_size:,} bytes")


def main() -> None:
    """Takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--store", default="sqlite:///mlflow.db", help="a sqlite file")
    parser.add_argument("--browser", default="chromium", help="Chromium or Chrome")
    parser.add_argument("--model", action="append", help="a model directory, for the page")
    args = parser.parse_args()
    if not shutil.which(args.browser):
        sys.exit(f"error: there is no {args.browser}; see --browser")
    if args.model:
        with tempfile.TemporaryDirectory() as folder:
            picture_of_page(args.model, args.browser, Path(folder) / "log")
        return
    source = stores.sqlite_path(args.store)
    if not (source and source.is_file()):
        sys.exit(f"error: {args.store} is needed; see --help")
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
        port = free_port()
        address = f"http://{HOST}:{port}"
        command = [sys.executable, "-m", "mlflow", "server", f"--port={port}", "--workers=1"]
        command += [f"--backend-store-uri=sqlite:///{store}", f"--cors-allowed-origins={address}"]
        command += [f"--allowed-hosts={HOST}:{port},127.0.0.1:{port}"]
        with server(command, port, Path(folder) / "log"):
            for name, (size, page) in pages.items():
                picture = Path(__file__).with_name(f"{name}.png")
                own = [f"--user-data-dir={folder}/{name}", f"--window-size={size}"]
                own += [f"--screenshot={picture}", f"{address}/#/{page}"]
                subprocess.run([*browser, *own], check=True, capture_output=True)
                print(f"{picture}: {picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

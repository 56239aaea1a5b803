"""What `make demo` runs and ends with: texts, the curve of the losses, and what to try next."""

import logging
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

from minigpt.common import files, paths

FOLDER = Path(".demo")
TEXTS = 3
WIDTH, HEIGHT = 64, 10  # of the chart, in characters

NEXT = """\
What to try next (after `source .venv/bin/activate`):

  make ui
      shows this run in MLflow, on http://127.0.0.1:5000
  dvc exp run -S groups.experiment=demo -S train.epochs=3
      trains longer; `dvc metrics diff demo` compares
  dvc exp run -S groups.experiment=demo -S groups.corpus=files -S corpus.url=/path/to/texts
      trains on a folder of .txt files of your own: docs/own-corpus.md
"""


def main() -> int:
    """Runs the pipeline on the embedded sample and prints what came of it.

    It runs in a copy of the project (--temp), so the tracked files stay as they are.

    Returns:
        The exit code.
    """
    from dvc.cli import main as dvc

    # DVC warns of each output that the copy does not have yet, which is all of them.
    logging.getLogger("dvc_data.index.checkout").setLevel(logging.ERROR)
    # Not `dvc exp run --force`, which also removes an earlier demo, but runs every stage again.
    remove = ["dvc", "exp", "remove", "--quiet", "demo"]
    subprocess.run(remove, stderr=subprocess.DEVNULL, check=False)  # there may be none
    run = ["exp", "run", "--temp", "--name", "demo", "-S", "groups.experiment=demo"]
    if code := dvc(run):
        return int(code)
    shutil.rmtree(FOLDER, ignore_errors=True)
    if code := dvc(["get", "--quiet", ".", "reports", "--rev", "demo", "--out", str(FOLDER)]):
        return int(code)
    print(page(FOLDER))
    return 0


def page(reports: Path) -> str:
    """Returns what is worth reading in the reports of a run.

    Args:
        reports: A copy of the folder reports/, written with some of the reviews held out.
    """
    texts = (reports / paths.SAMPLES_TEXT.name).read_text(encoding="utf-8").split("\n\n")
    shown = [
        textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  ")
        for text in texts[:: max(len(texts) // TEXTS, 1)][:TEXTS]  # spread over the prompts
    ]
    steps = _columns(reports / paths.STEPS.name)
    epochs = _columns(reports / paths.LOSSES.name)
    ends = [steps["step"][steps["epoch"] == epoch].max() for epoch in epochs["epoch"]]
    figures = files.read_json(reports / paths.EVALUATION.name)
    return "\n\n".join(
        [
            f"\nWhat the model writes (more in {reports / paths.SAMPLES_TEXT.name}):",
            *shown,
            f"Loss in nats per token, over {steps['step'].max():.0f} steps: "
            "* in training, o on held-out reviews",
            chart(steps["step"], steps["loss"], np.array(ends), epochs["val_loss"]),
            f"On held-out reviews the loss is {figures['loss']:.3f} (perplexity "
            f"{figures['perplexity']:.2f}). An n-gram model reaches "
            f"{figures['kneser_ney']['loss']:.3f}, word frequencies alone "
            f"{figures['unigram']['loss']:.3f}.",
            NEXT,
        ]
    )


def chart(x: np.ndarray, line: np.ndarray, marked_x: np.ndarray, marks: np.ndarray) -> str:
    """Returns a chart in characters.

    Args:
        x: Where the points of the line are, in ascending order.
        line: Their values, drawn as `*`.
        marked_x: Where single points are.
        marks: Their values, drawn as `o`.
    """
    low, high = min(line.min(), marks.min()), max(line.max(), marks.max())
    columns = np.linspace(x.min(), x.max(), WIDTH)
    rows = [[" "] * WIDTH for _ in range(HEIGHT)]
    for sign, xs, ys in (("*", columns, np.interp(columns, x, line)), ("o", marked_x, marks)):
        for column, value in zip(xs, ys, strict=True):
            down = round((high - value) / max(high - low, 1e-9) * (HEIGHT - 1))
            rows[down][int(np.abs(columns - column).argmin())] = sign
    labels = [f"{high:6.2f}", *[" " * 6] * (HEIGHT - 2), f"{low:6.2f}"]
    return "\n".join(
        f"{label} |{''.join(row)}".rstrip() for label, row in zip(labels, rows, strict=True)
    )


def _columns(path: Path) -> dict[str, np.ndarray]:
    rows = files.read_csv(path)
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


if __name__ == "__main__":
    sys.exit(main())

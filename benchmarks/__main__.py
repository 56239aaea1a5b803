"""Measures this project against the published script, both sides in turn in one run.

    python -m benchmarks [--only ROW ...] [--rounds 5] [--archive FILE] [--out DIR]

Prints a table of ratios and writes it as JSON and as a figure; --only replaces the named rows and
keeps the others. KERAS_BACKEND=jax measures a GPU where there is one.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ARCHIVE, PROJECT, SHARED, NotMeasuredError, Options, median
from minigpt.common import backend, files


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: What is measured.
        function: `module.name` in this package.
        unit: The unit of the measurements; for "tokens/s" they are seconds per token.
        at_least: The ratio to reach.
        reach_for: The ratio to hope for.
        peer: The other side.
        arguments: Arguments of the function after the options.
    """

    what: str
    function: str
    unit: str = "s"
    at_least: float | None = None
    reach_for: float | None = None
    peer: str = "published script"
    arguments: tuple[Any, ...] = ()


HUB = "KerasHub"


def _generation(
    what: str,
    at_least: float,
    reach_for: float | None,
    batch: int,
    jit_compile: bool,
    peer: str = "published script",
) -> Row:
    function = "generation.peer" if peer == HUB else "generation.published"
    return Row(what, function, "tokens/s", at_least, reach_for, peer, (batch, jit_compile))


ROWS = {
    "step": Row("training step, float32", "training.step", "s", 1.25, 1.5),
    "bfloat16": Row("training step, bfloat16 products", "training.step_bfloat16", "s", 2, 2.5),
    "memory": Row("peak memory of training", "training.memory", "MB", 2, 3),
    "one": _generation("one prompt", 40, 90, 1, False),
    "one-xla": _generation("one prompt, XLA", 40, 90, 1, True),
    "many": _generation("64 prompts at once", 400, 1000, 64, False),
    "many-xla": _generation("64 prompts at once, XLA", 400, 1000, 64, True),
    "hub-one": _generation("one prompt", 1, None, 1, False, HUB),
    "hub-one-xla": _generation("one prompt, XLA", 1, None, 1, True, HUB),
    "hub-many": _generation("64 prompts", 1, None, 64, False, HUB),
    "hub-many-xla": _generation("64 prompts, XLA", 1, None, 64, True, HUB),
    "vocabulary": Row("vocabulary of the reviews", "data.vocabularies", "s", 4, 8),
    "prepare": Row("vocabulary and sequences", "data.preparation", "s", 4, 6),
    "input": Row("input's share of a step (below 0.01)", "training.input_share", ""),
    "cold": Row("cold start to the first token", "generation.cold"),
    "serve": Row(
        "32 clients of a server", "serving.serve", "tokens/s", 4, 8, "mlflow models serve"
    ),
    "nothing": Row("dvc repro with nothing to do", "data.nothing"),
    "device": Row("share of the device's peak in a step", "training.device", ""),
    "seed": Row("restated script's step", "training.seed", "s", None, None, "the script itself"),
    "engine": Row("vocab, sequences and an epoch of the sample", "engine.overhead", peer="Ray"),
    "scale": Row("time a review, 16x the corpus to 1x", "engine.scale", ""),
    "losses": Row("losses of experiment=seed", "training.losses", "nats"),
    "speedrun": Row(
        "training to the published recipe's best", "speedrun.speedrun", "s", 6, 12, "its recipe"
    ),
}
ASKED_FOR = ("engine", "scale", "losses", "speedrun")  # these take many minutes


def main() -> None:
    """Measures the rows, prints each and then the table, and writes both files."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"These run only when named, since they take minutes: {', '.join(ASKED_FOR)}.",
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument(
        "--archive", type=Path, default=ARCHIVE, help="the reviews, aclImdb_v1.tar.gz"
    )
    parser.add_argument(
        "--seed", type=Path, default=SHARED / "seed", help="folder of miniature_gpt.md"
    )
    parser.add_argument("--epochs", type=int, default=2, help="epochs of `losses`")
    parser.add_argument("--every", type=int, default=1, help="take every n-th review in `scale`")
    parser.add_argument("--out", type=Path, default=PROJECT / "benchmarks/results")
    parser.add_argument("--tiny", action="store_true", help="only show that everything runs")
    args = parser.parse_args()
    backend.choose()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if args.tiny:
        os.environ["BENCHMARKS_TINY"] = "1"
    options = Options(args.archive, args.seed, args.rounds, args.epochs, args.every)
    where = machine()
    path = args.out / f"{os.environ['KERAS_BACKEND']}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only or [name for name in ROWS if name not in ASKED_FOR]:
        results[name] = {**asdict(ROWS[name]), **measure(name, options), "measured_on": where}
        print(line(results[name]), flush=True)
        results = {name: results[name] for name in ROWS if name in results}
        files.write_json(path, results)  # now, since a later row may fail
    print("\n" + table([results[name] for name in args.only or results]))
    draw(results, path.with_suffix(".png"))
    print(f"\nall rows: {path} and {path.with_suffix('.png').name} beside it")


def measure(name: str, options: Options) -> dict[str, Any]:
    """Returns the measurements of a row, or why there are none."""
    module, function = ROWS[name].function.split(".")
    try:
        with backend.silenced():
            loaded = importlib.import_module(f"benchmarks.{module}")
        found = getattr(loaded, function)(options, *ROWS[name].arguments)
    except NotMeasuredError as error:
        return {"not_measured": str(error)}
    ratio = median(found.there) / median(found.here) if found.there else None
    return {**asdict(found), "ratio": ratio}


def line(row: dict[str, Any]) -> str:
    """Returns a row as one line of text."""
    cells = _cells(row)
    facts = json.dumps(row["facts"], default=str) if row.get("facts") else ""
    return f"{cells[0]}: {', '.join(cell for cell in cells[1:4] if cell)} {facts}"


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rows as a table in Markdown."""
    head = ["what", "the other side", "here", "ratio", "at least", "reach for"]
    lines = [head, ["---"] * len(head), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: dict[str, Any]) -> list[str]:
    goals = [f"{row[goal]:g}" if row[goal] else "" for goal in ("at_least", "reach_for")]
    if "not_measured" in row:
        return [row["what"], "", f"not measured: {row['not_measured']}", "", *goals]
    there = _spread(row["there"], row["unit"])
    there = f"{there} ({row['peer']})" if there and row["peer"] != "published script" else there
    ratio = f"{row['ratio']:.3g}" if row["ratio"] else ""
    return [row["what"], there, _spread(row["here"], row["unit"]), ratio, *goals]


def _spread(values: list[float], unit: str) -> str:
    """Returns the median with the range of the values."""
    if not values:
        return ""
    if unit == "tokens/s":
        values = [1 / value for value in values]
    middle, low, high = (f"{v:,.4g}" for v in (median(values), min(values), max(values)))
    return f"{middle} {unit}".strip() + f" ({low} to {high})"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws the ratios beside their goals, and the row `scale` if it was measured."""
    from matplotlib.figure import Figure

    rows = [row for row in reversed(list(results.values())) if row.get("ratio") and row["at_least"]]
    scale = results.get("scale", {}).get("facts")
    figure = Figure((11 if scale else 7, 1.5 + 0.32 * len(rows)), layout="constrained")
    panels = figure.subplots(
        1, 3 if scale else 1, squeeze=False, width_ratios=[3, 1, 1][: 3 if scale else 1]
    )[0]
    heights = range(len(rows))
    panels[0].barh(heights, [row["ratio"] for row in rows], color="tab:blue")
    for goal, marker in (("at_least", "|"), ("reach_for", "D")):
        found = [
            (row[goal], height) for row, height in zip(rows, heights, strict=True) if row[goal]
        ]
        if found:
            panels[0].plot(
                *zip(*found, strict=True), marker, color="black", label=goal.replace("_", " ")
            )
    panels[0].set_yticks(heights, [f"{row['what']} / {row['peer']}" for row in rows], fontsize=8)
    panels[0].set(xscale="log", xlabel="times as good as the other side (ratio of medians)")
    if rows:
        panels[0].legend(fontsize=8)
    for panel, column in zip(panels[1:], ("seconds", "peak_MB"), strict=False):
        for stage in ("download", "vocab", "sequences"):
            panel.plot(scale["factors"], scale[stage][column], "o-", label=stage)
        panel.set(xlabel="times the corpus", ylabel=column.replace("_", " "), ylim=(0, None))
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def machine() -> dict[str, Any]:
    """Returns what the measurements depend on."""
    from importlib.metadata import version

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    command = ("git", "describe", "--always", "--dirty")
    described = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": described.stdout.strip(),
        "processor": f"{os.cpu_count()} x {models[0] if models else platform.processor()}",
        "load_before": round(os.getloadavg()[0], 2),
        "backend": os.environ["KERAS_BACKEND"],
        **{name: version(name) for name in ("keras", "tensorflow")},
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()

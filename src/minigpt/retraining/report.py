"""The report of a retraining, in Markdown that GitHub shows in a job summary or a comment."""

import csv
import json
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minigpt.common import paths
from minigpt.common.errors import InputError
from minigpt.tracking import champion, mirror, registry

FIGURES = ("bits_per_byte", "loss", "perplexity", "accuracy", "unk_share", "copied_run_p95")
MARKER = "<!-- minigpt retrain -->"  # by which the workflow finds its comment again
LITERAL = {ord(character): f"&#{ord(character)};" for character in "<>&\\`*_|[]~@#"}
LONGEST_DIFF = 100  # lines of a table: a comment on GitHub holds 65,536 characters


def page(root: Path, base: str, stages: Sequence[Any], failed: bool) -> str:
    """Writes the report of the run that the files of the project tell of.

    Args:
        root: the project's folder.
        base: the revision that parameters and metrics are compared with.
        stages: name, outcome and seconds of each, in the order in which they ran.
        failed: whether the pipeline failed; then only what is sure is told.
    """
    timing = table(
        ("stage", "outcome", "seconds"),
        [(stage.name, stage.outcome, f"{stage.seconds:.1f}") for stage in stages],
    )
    if failed:
        at = f" at `{stages[-1].name}`" if stages else ""
        return f"{MARKER}\n# Retraining failed{at}\n\nThe log tells why.\n\n## Stages\n\n{timing}"
    gate = json.loads((root / paths.GATE).read_text())
    registered = json.loads((root / paths.REGISTERED).read_text())
    rows = list(csv.DictReader((root / paths.LOSSES).read_text().splitlines()))
    uri = mirror.tracking_uri(root)
    return "\n".join(
        [
            f"{MARKER}\n# Retraining: {gate['verdict']}\n",
            f"{escape(gate['reason'])}\n",
            _sides(gate),
            f"## What changed against `{base}`\n",
            _diff(root, "params", base),
            _diff(root, "metrics", base),
            "## Loss by epoch\n",
            curves(rows),
            "## Texts, from the same prompts and seeds\n",
            _texts(root, uri, registered["name"], gate),
            f"## Stages\n\n{timing}",
            f"## MLflow\n\n{_links(uri, registered)}",
        ]
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; what stands in a cell can't end it."""
    lines = [header, ["---"] * len(header), *([escape(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escape(value: Any) -> str:
    """A value as Markdown shows it literally, on one line: a model may write anything."""
    return " ".join(str(value).split()).translate(LITERAL)


def curves(rows: Sequence[dict[str, str]]) -> str:
    """The losses of each epoch as a chart that GitHub draws.

    See https://mermaid.js.org/syntax/xyChart.html.

    Args:
        rows: lines of losses.csv.
    """
    lines = {name: [row[name] for row in rows] for name in ("loss", "val_loss") if name in rows[0]}
    values = [float(value) for line in lines.values() for value in line]
    epochs = ", ".join(row["epoch"] for row in rows)
    chart = [
        f'xychart-beta\n    title "nats per token: {" and ".join(lines)}"',
        f'x-axis "epoch" [{epochs}]',
        f"y-axis {min(values) - 0.1:.2f} --> {max(values) + 0.1:.2f}",
        *(f"line [{', '.join(f'{float(v):.4f}' for v in line)}]" for line in lines.values()),
    ]
    return "```mermaid\n" + "\n    ".join(chart) + "\n```\n" + table(["epoch", *lines], [
        [row["epoch"], *(f"{float(row[name]):.4f}" for name in lines)] for row in rows
    ])  # fmt: skip


def _sides(gate: dict[str, Any]) -> str:
    ours, theirs = gate["challenger"], gate["champion"] or {}
    rows = [
        (name, *(f"{side[name]:.4f}" if name in side else "-" for side in (ours, theirs)))
        for name in FIGURES
        if name in ours
    ]
    header = ["", *(_version(side, what) for side, what in ((ours, "this"), (theirs, "champion")))]
    return table(header, rows)


def _version(side: dict[str, Any], what: str) -> str:
    return f"{what} (version {side['version']})" if side.get("version") else f"{what} (none)"


def _diff(root: Path, kind: str, base: str) -> str:
    command = ["dvc", kind, "diff", "--md", base]
    if kind == "params":
        command[-1:] = ["--targets", str(paths.RESOLVED), "--", base]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        return f"`dvc {kind} diff` failed: {escape(done.stderr.strip())}\n"
    lines = done.stdout.strip().splitlines()
    left_out = f"\n{len(lines) - LONGEST_DIFF} more lines are left out\n"
    shown = "\n".join(lines[:LONGEST_DIFF]) + "\n" + left_out * (len(lines) > LONGEST_DIFF)
    return shown if lines else f"No {kind} changed.\n"


def _texts(root: Path, uri: str, name: str, gate: dict[str, Any]) -> str:
    """What this model and the champion of before it write."""
    from minigpt.generation.decoding import Generator, Sampling
    from minigpt.model import directory  # only where they are needed: they load TensorFlow

    ours = [json.loads(line) for line in (root / paths.SAMPLES).read_text().splitlines()]
    before = (gate["champion"] or {}).get("version")
    if before is None:
        return table(("prompt", "this"), [(row["prompt"], row["text"]) for row in ours])
    settings = {key: value for key, value in ours[0].items() if key not in ("prompt", "text")}
    try:
        with tempfile.TemporaryDirectory() as folder:
            fetched = registry.fetch(uri, name, before, Path(folder))
            if fetched is None:
                raise InputError("it holds no model directory")
            theirs = directory.load(fetched)
            style = theirs.config["vocabulary"]["style"]
            write = Generator(theirs.network, theirs.vocabulary, style)
            texts = write([row["prompt"] for row in ours], Sampling(**settings))
    except InputError as error:
        texts = [f"(the champion can't write this: {error})"] * len(ours)
    return table(
        ("prompt", "this", f"champion (version {before})"),
        [(row["prompt"], row["text"], text) for row, text in zip(ours, texts, strict=True)],
    )


def _links(uri: str, registered: dict[str, Any]) -> str:
    name, version, run_id = (registered[key] for key in ("name", "version", "run_id"))
    where = mirror.redact(uri)
    if not uri.startswith(("http://", "https://")):
        return f"Run {run_id}, version {version or '-'} of {name}, in {where}\n"
    with champion.store(uri) as client:
        experiment = client.get_run(run_id).info.experiment_id
    links = [f"[run {run_id}]({where}/#/experiments/{experiment}/runs/{run_id})"]
    if version:
        links.append(f"[version {version} of {name}]({where}/#/models/{name}/versions/{version})")
    return "\n".join(f"- {link}" for link in links) + "\n"

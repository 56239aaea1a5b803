"""The report of a retraining, in Markdown that GitHub shows in a job summary or a comment."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt import config
from minigpt.common import files, paths
from minigpt.common.errors import InputError
from minigpt.common.redaction import redact
from minigpt.tracking import gate, registry, store
from minigpt.tracking.markdown import escape, table

MARKER = "<!-- minigpt retrain -->"  # by which the workflow finds its comment again
LONGEST_DIFF = 100  # lines of a table: a comment on GitHub holds 65,536 characters


def page(root: Path, base: str, stages: Sequence[Any], failed: bool) -> str:
    """Returns the report of the run that the project's files describe.

    Args:
        root: The project's folder.
        base: The revision that parameters and metrics are compared with.
        stages: Name, outcome and seconds of each, in the order in which they ran.
        failed: Whether the pipeline failed; the report is then the table of stages alone.
    """
    timing = table(
        ("stage", "outcome", "seconds"),
        [(stage.name, stage.outcome, f"{stage.seconds:.1f}") for stage in stages],
    )
    if failed:
        at = f" at `{stages[-1].name}`" if stages else ""
        return f"{MARKER}\n# Retraining failed{at}\n\nSee the log.\n\n## Stages\n\n{timing}"
    verdict = _json(root / paths.GATE)
    registered = _json(root / paths.REGISTERED)
    uri = store.tracking_uri(root)
    return "\n".join(
        [
            f"{MARKER}\n# Retraining: {verdict['verdict']}\n",
            f"{escape(verdict['reason'])}\n",
            _sides(verdict),
            f"## What changed against `{base}`\n",
            _diff(root, "params", base),
            _diff(root, "metrics", base),
            "## Loss by epoch\n",
            curves(files.read_csv(root / paths.LOSSES)),
            "## Texts, from the same prompts and seeds\n",
            _texts(root, uri, registered["name"], verdict),
            f"## Stages\n\n{timing}",
            f"## MLflow\n\n{_links(uri, registered)}",
        ]
    )


def curves(rows: Sequence[dict[str, str]]) -> str:
    """Returns the losses of each epoch, as a chart that GitHub draws and as a table.

    See https://mermaid.js.org/syntax/xyChart.html.

    Args:
        rows: Of reports/losses.csv.
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


def _sides(verdict: dict[str, Any]) -> str:
    ours, theirs = verdict["challenger"], verdict["champion"] or {}
    rows = [
        (name, *(f"{side[name]:.4f}" if name in side else "-" for side in (ours, theirs)))
        for name in gate.FIGURES
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


def _texts(root: Path, uri: str, name: str, verdict: dict[str, Any]) -> str:
    """Returns what this model and the previous champion write."""
    ours = files.read_json_lines(root / paths.SAMPLES)
    before = (verdict["champion"] or {}).get("version")
    if before is None:
        return table(("prompt", "this"), [(row["prompt"], row["text"]) for row in ours])
    theirs = _written(uri, name, before, ours)
    return table(
        ("prompt", "this", f"champion (version {before})"),
        [(row["prompt"], row["text"], text) for row, text in zip(ours, theirs, strict=True)],
    )


def _written(uri: str, name: str, version: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns what a version writes after the prompts of samples.jsonl, with their settings."""
    from minigpt.generation.decoding import Generator
    from minigpt.model import directory  # only where they are needed: they load TensorFlow

    settings = {key: rows[0][key] for key in config.SamplingConfig.model_fields}
    sampling = config.validate(config.SamplingConfig, settings)
    with tempfile.TemporaryDirectory() as folder:
        fetched = registry.fetch(uri, name, version, Path(folder))
        try:
            if fetched is None:
                raise InputError("it holds no model directory")
            theirs = directory.load(fetched)
            generator = Generator(theirs.network, theirs.tokenizer)
            return generator([row["prompt"] for row in rows], sampling)
        except InputError as error:
            return [f"(the champion can't write this: {error})"] * len(rows)


def _links(uri: str, registered: dict[str, Any]) -> str:
    name, version, run_id = (registered[key] for key in ("name", "version", "run_id"))
    where = redact(uri)
    if not uri.startswith(("http://", "https://")):
        return f"Run {run_id}, version {version or '-'} of {name}, in {where}\n"
    with store.open_store(uri) as client:
        experiment = client.get_run(run_id).info.experiment_id
    links = [f"[run {run_id}]({where}/#/experiments/{experiment}/runs/{run_id})"]
    if version:
        links.append(f"[version {version} of {name}]({where}/#/models/{name}/versions/{version})")
    return "\n".join(f"- {link}" for link in links) + "\n"


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))

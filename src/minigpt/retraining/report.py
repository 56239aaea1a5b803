"""The report of a retraining, in Markdown that GitHub shows in a job summary or a comment."""

import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from minigpt import config
from minigpt.common import backend, files, paths
from minigpt.common.errors import InputError
from minigpt.common.redaction import redact
from minigpt.tracking import gate, registry, store
from minigpt.tracking.markdown import escape, table

MARKER = "<!-- minigpt retrain -->"  # by which the workflow finds its comment again
MOST_BYTES = 65_000  # a comment on GitHub holds 65,536 characters
# Of one section: all of them together, with the rest of the page, stay within the bytes above.
_DIFF_BYTES, _TEXTS_BYTES, _STAGES_BYTES = 10_000, 25_000, 4_000
_MOST_EPOCHS = 100
_LONGEST_CELL = 1000  # characters

T = TypeVar("T")

# What fails where a file is missing, the disk is full or MLflow is away.
_FAULTS = (InputError, *store.FAILURES)


def page(root: Path, base: str, stages: Sequence[Any], failed: bool) -> tuple[str, list[str]]:
    """Returns the report of the run that the project's files describe.

    Args:
        root: The project's folder.
        base: The revision that parameters and metrics are compared with.
        stages: Name, outcome and seconds of each, in the order in which they ran.
        failed: Whether the pipeline failed; the report is then the table of stages alone.

    Returns:
        The report, with what there is, and a line for each part that it lacks.
    """
    rows = [(stage.name, stage.outcome, f"{stage.seconds:.1f}") for stage in stages]
    timing = ("Stages", _table(("stage", "outcome", "seconds"), rows, _STAGES_BYTES))
    if failed:
        at = f" at `{stages[-1].name}`" if stages else ""
        return _joined(f"# Retraining failed{at}\n\nSee the log.\n", [timing]), []
    lacking: list[str] = []

    def attempt(part: str, function: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return function(*arguments)
        except _FAULTS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            lacking.append(f"{part}: {redact(reason)[:_LONGEST_CELL]}")
            return None

    verdict = attempt("the verdict", files.read_json, root / paths.GATE) or {}
    registered = attempt("the version", files.read_json, root / paths.REGISTERED) or {}
    samples = attempt("the texts", files.read_json_lines, root / paths.SAMPLES) or []
    before = (verdict.get("champion") or {}).get("version")
    uri = attempt("the address of MLflow", store.tracking_uri, root)
    theirs = experiment = None
    if uri and registered and samples and before:
        name = registered["name"]
        theirs = attempt("the champion's texts", _written, uri, name, before, samples)
    if uri and registered and uri.startswith(("http://", "https://")):
        experiment = attempt("the links to MLflow", _experiment, uri, registered["run_id"])
    sections = [
        (
            f"What changed against {_dead(base)}",
            attempt("the parameters that changed", _diff, root, "params", base),
        ),
        ("", attempt("the metrics that changed", _diff, root, "metrics", base)),
        (
            "Loss by epoch",
            attempt("the losses", lambda: curves(files.read_csv(root / paths.LOSSES))),
        ),
        ("Texts, from the same prompts and seeds", _texts(samples, before, theirs)),
        timing,
        ("MLflow", _links(uri, registered, experiment) if uri and registered else None),
    ]
    top = _verdict(verdict) if verdict else "# Retraining\n"
    if lacking:
        top += "\nThis report lacks\n\n" + "".join(f"- {_dead(line)}\n" for line in lacking)
    return _joined(top, sections), lacking


def _joined(top: str, sections: Iterable[tuple[str, str | None]]) -> str:
    """Returns the page, with the sections that there are and no more bytes than GitHub takes."""
    parts = [f"{MARKER}\n{top}"]
    parts += [f"## {title}\n\n{text}" if title else text for title, text in sections if text]
    text = redact("\n".join(parts))
    if len(text.encode()) > MOST_BYTES:
        kept = text.encode()[:MOST_BYTES].rpartition(b"\n")[0].decode()
        return f"{kept}\n\nThe rest is left out: it is too long.\n"
    return text


def curves(rows: Sequence[dict[str, str]]) -> str:
    """Returns the losses by epoch, as a chart that GitHub draws and as a table.

    See https://mermaid.js.org/syntax/xyChart.html.

    Args:
        rows: Of reports/losses.csv. Of many, a hundred are shown, the last among them.
    """
    step = math.ceil(len(rows) / _MOST_EPOCHS) or 1
    rows = rows[::-1][::step][::-1]
    columns = {name: [row.get(name) or "nan" for row in rows] for name in ("loss", "val_loss")}
    lines = {name: list(map(float, column)) for name, column in columns.items()}
    lines = {name: line for name, line in lines.items() if all(map(math.isfinite, line))}
    epochs = [int(row["epoch"]) for row in rows]
    values = [value for line in lines.values() for value in line]
    if not values:
        return "There are no losses.\n"
    chart = [
        f'xychart-beta\n    title "nats per token: {" and ".join(lines)}"',
        f'x-axis "epoch" [{", ".join(map(str, epochs))}]',
        f"y-axis {min(values) - 0.1:.2f} --> {max(values) + 0.1:.2f}",
        *(f"line [{', '.join(f'{value:.4f}' for value in line)}]" for line in lines.values()),
    ]
    cells = [[f"{value:.4f}" for value in line] for line in lines.values()]
    body = table(["epoch", *lines], list(zip(epochs, *cells, strict=True)))
    return "```mermaid\n" + "\n    ".join(chart) + "\n```\n" + body


def _verdict(verdict: dict[str, Any]) -> str:
    ours, theirs = verdict["challenger"], verdict["champion"] or {}
    rows = [
        (name, *(_figure(side.get(name)) for side in (ours, theirs)))
        for name in gate.FIGURES
        if name in ours
    ]
    header = ["", *(_version(side, what) for side, what in ((ours, "this"), (theirs, "champion")))]
    title = f"# Retraining: {_dead(verdict['verdict'])}"
    told = [_dead(verdict["reason"])]
    if "way_on" in verdict:
        told.append(f"**Nothing is registered.** What to do: {_dead(verdict['way_on'])}")
    return "\n\n".join([title, *told, table(header, rows)])


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)  # "nan" is a text


def _version(side: dict[str, Any], what: str) -> str:
    return f"{what} (version {side['version']})" if side.get("version") else f"{what} (none)"


def _diff(root: Path, kind: str, base: str) -> str:
    """Returns a table of the parameters or metrics that changed."""
    targets = ["--targets", str(paths.RESOLVED)] if kind == "params" else []
    command = ["dvc", kind, "diff", "--json", *targets, "--", base]
    done = subprocess.run(
        command, cwd=root, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise InputError(f"`dvc {kind} diff` failed: {done.stderr.strip()}")
    rows = [
        (path, key, *(_value(change.get(side)) for side in ("old", "new")))
        for path, changes in sorted(json.loads(done.stdout or "{}").items())
        for key, change in sorted(changes.items())
    ]
    header = ("file", kind, "before", "now")
    return _table(header, rows, _DIFF_BYTES) if rows else f"No {kind} changed.\n"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _texts(
    rows: Sequence[dict[str, Any]], before: str | None, theirs: list[str] | None
) -> str | None:
    """Returns what this model and the previous champion, where that is known, write."""
    if not rows:
        return None
    if not theirs:
        return _table(
            ("prompt", "this"), [(row["prompt"], row["text"]) for row in rows], _TEXTS_BYTES
        )
    header = ("prompt", "this", f"champion (version {before})")
    cells = [(row["prompt"], row["text"], text) for row, text in zip(rows, theirs, strict=True)]
    return _table(header, cells, _TEXTS_BYTES)


def _written(uri: str, name: str, version: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns what a version writes after the prompts of samples.jsonl, with their settings."""
    with backend.silenced():  # imported only where they are needed, since they load TensorFlow
        from minigpt.generation.decoding import Generator
        from minigpt.model import directory

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


def _experiment(uri: str, run_id: str) -> str:
    with store.open_store(uri) as client:
        return str(client.get_run(run_id).info.experiment_id)


def _links(uri: str, registered: dict[str, Any], experiment: str | None) -> str:
    name, version, run_id = (registered[key] for key in ("name", "version", "run_id"))
    where = redact(uri)
    if experiment is None:
        return (
            f"Run {_dead(run_id)}, version {version or '-'} of {_dead(name)}, in {_dead(where)}\n"
        )
    where = quote(where, safe=":/%")
    links = [f"[run {run_id}]({where}/#/experiments/{experiment}/runs/{run_id})"]
    if version:
        place = f"{where}/#/models/{quote(name, safe='')}/versions/{version}"
        links.append(f"[version {version} of {_dead(name)}]({place})")
    return "\n".join(f"- {link}" for link in links) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], most_bytes: int) -> str:
    """Returns a table of as many rows as there is room for."""
    text = table(header, [])
    for number, row in enumerate(rows):
        line = table(header, [[_short(cell) for cell in row]]).removeprefix(table(header, []))
        if len((text + line).encode()) > most_bytes:
            return f"{text}\n{len(rows) - number:,} more rows are left out.\n"
        text += line
    return text


def _dead(value: Any) -> str:
    """Returns a value on one line of text, in which Markdown finds nothing."""
    return escape(_short(value))


def _short(value: Any) -> str:
    """Returns a value as a text without secrets that is not too long."""
    text = redact(str(value))
    return text if len(text) <= _LONGEST_CELL else text[:_LONGEST_CELL] + "..."

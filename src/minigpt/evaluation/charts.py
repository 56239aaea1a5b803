"""The evaluation's charts as PNG files, for readers without DVC's vega plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NATS = "nats per token"

Rows = Sequence[Mapping[str, Any]]


def draw_all(folder: Path, losses: Rows, by_position: Rows, by_band: Rows) -> None:
    """Draws loss_by_epoch.png, loss_by_position.png and loss_by_band.png.

    Args:
        folder: An existing folder.
        losses: Rows of reports/losses.csv and of the published losses.
        by_position: Rows of `held_out.loss_by_position`.
        by_band: Rows of `held_out.loss_by_band`.
    """
    epochs = [{**row, "epoch": int(row["epoch"])} for row in losses]
    names = ("loss", "val_loss", "seed_loss", "published_loss")
    by_epoch = {
        name: _line([row for row in epochs if name in row], "epoch", name) for name in names
    }
    draw(folder / "loss_by_epoch.png", "epoch", by_epoch)
    model = {"model": _line(by_position, "position", "loss")}
    draw(folder / "loss_by_position.png", "tokens of context", model)
    columns = {"model": "loss", "Kneser-Ney": "kneser_ney_loss", "unigram": "unigram_loss"}
    bands = {name: _line(by_band, "band", column) for name, column in columns.items()}
    draw(folder / "loss_by_band.png", "frequency rank of the target", bands)


def draw(
    path: Path, x_label: str, lines: Mapping[str, tuple[Sequence[Any], Sequence[Any]]]
) -> None:
    """Draws lines into a PNG; the same lines give the same bytes.

    Args:
        path: The file.
        x_label: The label of the x axis; the y axis is in nats per token.
        lines: The xs and ys of each line, by name. Words as xs keep their order; ys that are None
            or "" are left out.
    """
    from matplotlib.figure import Figure  # hidden while a stage is imported, see common/backend.py

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, (xs, ys) in lines.items():
        points = [(x, float(y)) for x, y in zip(xs, ys, strict=True) if y not in (None, "")]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(xlabel=x_label, ylabel=NATS)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _line(rows: Rows, x: str, y: str) -> tuple[list[Any], list[Any]]:
    return [row[x] for row in rows], [row.get(y) for row in rows]

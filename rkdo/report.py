"""What people see of a run: tables and curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rkdo.evaluate import LABELS
from rkdo.files import write_atomically

COLUMNS = 2  # of metrics beside the loss
NAMED, PARTED = 10, 20  # classes beside a field's block, and between lines in it
FIELD = {
    "field_entropy": "entropy of a row (nats)",
    "field_purity": "mass on the own class",
}


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics as rows, `columns` by their titles."""
    names = [name for name in LABELS if any(name in metrics for metrics in columns.values())]
    width = max(len(LABELS[name]) for name in names)
    lines = [" " * width + "".join(f"{title:>10}" for title in columns)]
    for name in names:
        values = (
            f"{metrics[name]:10.4f}" if name in metrics else f"{'–':>10}"
            for metrics in columns.values()
        )
        lines.append(f"{LABELS[name]:<{width}}" + "".join(values))
    return "\n".join(lines)


def evaluations(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations among the lines of metrics.jsonl."""
    return [line for line in metrics if "linear_probe" in line]


def draw_curves(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """The loss by step, relative to the first; beside it every metric in a scale of its own."""
    judged = evaluations(metrics)
    names = [name for name in LABELS if any(name in line for line in judged)]
    rows = max(1, -(-len(names) // COLUMNS))
    figure = _figure(11, 1.5 * max(rows, 3))
    grid = figure.add_gridspec(rows, 2 + COLUMNS)
    _draw_loss(
        figure.add_subplot(grid[:, : 2 if names else None]),
        [(line["step"], line["loss"]) for line in metrics if "loss" in line],
        title,
    )
    for place, name in enumerate(names):
        row, column = divmod(place, COLUMNS)
        points = [(line["step"], line[name]) for line in judged if name in line]
        axes = figure.add_subplot(grid[row, 2 + column])
        _draw_points(axes, points, f"{LABELS[name]}\n{_change([y for _, y in points])}")
        if place + COLUMNS >= len(names):
            axes.set_xlabel("step", fontsize="small")
    _save(figure, path)


def draw_field(
    block: Tensor,  # [N, N], rows that sum to one
    labels: Tensor | None,  # [N], in order
    metrics: list[dict[str, Any]],
    title: str,
    path: Path,
) -> None:
    """The field's block as a heat map; beside it its rows' entropy and purity by epoch."""
    from matplotlib.colors import LogNorm

    n = len(block)
    lines = [line for line in metrics if "field_entropy" in line]
    measures = {name: text for name, text in FIELD.items() if any(name in x for x in lines)}
    figure = _figure(11, 5.5)
    grid = figure.add_gridspec(max(1, len(measures)), 3)
    heat = figure.add_subplot(grid[:, : 2 if measures else None])
    # From a hundredth of the uniform share up, in decades: the diagonal outweighs all else.
    shown = heat.imshow(
        block.double().cpu().numpy(), norm=LogNorm(0.01 / n, 1, clip=True), cmap="magma"
    )
    figure.colorbar(shown, ax=heat, label="mass in the row")
    heat.set(title=title, xlabel="image", ylabel="image")
    if labels is not None:
        _label_classes(heat, labels)
    for row, (name, text) in enumerate(measures.items()):
        axes = figure.add_subplot(grid[row, 2])
        points = [(line["epoch"], line[name]) for line in lines if name in line]
        _draw_points(axes, points, f"{text}\n{_change([y for _, y in points])}")
        if row == len(measures) - 1:
            axes.set_xlabel("epoch", fontsize="small")
    _save(figure, path)


def _label_classes(heat: Any, labels: Tensor) -> None:
    """Name as many classes as there is room for, and part them by lines if they are few."""
    kinds, counts = labels.unique(return_counts=True)
    ends = counts.cumsum(0)
    if len(kinds) <= PARTED:
        for end in ends[:-1].tolist():
            heat.axhline(end - 0.5, color="white", linewidth=0.3, alpha=0.6)
            heat.axvline(end - 0.5, color="white", linewidth=0.3, alpha=0.6)
    every = -(-len(kinds) // NAMED)
    places, names = (ends - (counts + 1) / 2).tolist()[::every], kinds.tolist()[::every]
    heat.set_xticks(places, names)
    heat.set_yticks(places, names)
    heat.set(xlabel="label", ylabel="label")


def _draw_loss(axes: Any, steps: list[tuple[int, float]], title: str) -> None:
    losses = [loss for _, loss in steps]
    relative = bool(losses) and losses[0] > 0
    heights = np.array([loss / losses[0] if relative else loss for loss in losses])
    places = np.array([step for step, _ in steps])
    window = max(1, len(steps) // 40)
    axes.plot(places, heights, linewidth=0.6, alpha=0.4, color="C0")
    if len(steps) >= window:
        smooth = np.convolve(heights, np.full(window, 1 / window), "valid")
        axes.plot(places[window // 2 :][: len(smooth)], smooth, linewidth=1.6, color="C0")
    axes.set(xlabel="step", ylabel="loss ÷ loss at the start" if relative else "loss (nats)")
    axes.set_title(f"{title}\nloss {_change(losses)} nats" if losses else title)
    axes.grid(alpha=0.3)


def _draw_points(axes: Any, points: list[tuple[float, float]], title: str) -> None:
    """A few values in a scale of their own."""
    from matplotlib.ticker import MaxNLocator

    axes.plot([x for x, _ in points], [y for _, y in points], "o-", markersize=3.5, linewidth=1.2)
    axes.set_title(title, fontsize="small")
    axes.margins(y=0.15)
    axes.tick_params(labelsize="x-small")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.grid(alpha=0.3)


def _change(values: list[float]) -> str:
    """From the first to the last."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{values[0]:.3f} → {values[-1]:.3f}"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))

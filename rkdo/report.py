"""What people see of a run: tables and curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rkdo.evaluate import LABELS
from rkdo.record import write_atomically


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics as rows, `columns` by their titles."""
    names = [name for name in LABELS if any(name in metrics for metrics in columns.values())]
    width = max(len(LABELS[name]) for name in names)
    lines = [" " * width + "".join(f"{title:>10}" for title in columns)]
    for name in names:
        values = (f"{metrics[name]:10.4f}" for metrics in columns.values())
        lines.append(f"{LABELS[name]:<{width}}" + "".join(values))
    return "\n".join(lines)


def evaluations(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations among the lines of metrics.jsonl."""
    return [line for line in metrics if "linear_probe" in line]


def draw_curves(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss by step on the left, the evaluations on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = [line for line in metrics if "loss" in line]
    left.plot([line["step"] for line in steps], [line["loss"] for line in steps], linewidth=0.8)
    left.set(xlabel="step", ylabel="loss (nats)", title=title)
    judged = evaluations(metrics)
    for name, label in LABELS.items():
        right.plot(
            [line["step"] for line in judged], [line[name] for line in judged], "o-", label=label
        )
    right.set(xlabel="step", ylim=(0, 1.02), title="test images")
    right.legend(fontsize="small")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def draw_field(
    block: Tensor,  # [N, N], rows that sum to one
    labels: Tensor | None,  # [N], in order
    metrics: list[dict[str, Any]],
    title: str,
    path: Path,
) -> None:
    """The field's block as a heat map on the left, its rows' entropy and purity by epoch on the
    right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    n = len(block)
    # From a hundredth of the uniform share up, in decades: the diagonal outweighs all else.
    shown = left.imshow(
        block.double().cpu().numpy(), norm=LogNorm(0.01 / n, 1, clip=True), cmap="magma"
    )
    figure.colorbar(shown, ax=left, label="mass in the row")
    left.set(xlabel="image", ylabel="image", title=title)
    if labels is not None:
        kinds, counts = labels.unique(return_counts=True)
        ends = counts.cumsum(0)
        for end in ends[:-1].tolist():
            left.axhline(end - 0.5, color="white", linewidth=0.4)
            left.axvline(end - 0.5, color="white", linewidth=0.4)
        left.set_xticks((ends - (counts + 1) / 2).tolist(), kinds.tolist())
        left.set_yticks((ends - (counts + 1) / 2).tolist(), kinds.tolist())
        left.set(xlabel="label", ylabel="label")

    lines = [line for line in metrics if "field_entropy" in line]
    epochs = [line["epoch"] for line in lines]
    right.plot(epochs, [line["field_entropy"] for line in lines], "o-", label="row entropy (nats)")
    right.set(xlabel="epoch", ylabel="row entropy (nats)", title="mean over the shown rows")
    right.set_ylim(bottom=0)
    if labels is not None:
        right.plot([], [], "s-", color="C1", label="class purity")
        purity = right.twinx()
        purity.plot(epochs, [line["field_purity"] for line in lines], "s-", color="C1")
        purity.set(ylabel="mass on the own class", ylim=(0, 1.02))
    right.legend(loc="lower left")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))

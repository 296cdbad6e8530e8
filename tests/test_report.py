"""What people see of a run: every number in a scale where it can be read, and nothing crowded."""

import numpy as np
import pytest
import torch

from rkdo import report
from rkdo.evaluate import LABELS
from rkdo.report import draw_curves, draw_field, table


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figure that was saved last, once it has been drawn."""
    figures = []
    save = report._save
    monkeypatch.setattr(
        report, "_save", lambda figure, path: (figures.append(figure), save(figure, path))
    )

    def draw(function, *arguments):
        function(*arguments, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


def metrics_of(losses, judged=(0, 20, 40), names=tuple(LABELS)):
    rng = np.random.default_rng(0)
    lines = [
        {"step": step, "epoch": step / 20, **{name: rng.uniform(0.3, 1) for name in names}}
        for step in judged
    ]
    return lines + [
        {"step": step, "epoch": step / 20, "loss": loss} for step, loss in enumerate(losses, 1)
    ]


LOSSES = [*(2.5 * 0.97**step for step in range(40))]


def texts(figure):
    """All that is written in a picture, with the place it takes."""
    figure.canvas.draw()
    for axes in figure.axes:
        labels = [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            labels += [label for tick in ticks for label in (tick.label1, tick.label2)]
        for label in labels:
            if label.get_visible() and label.get_text():
                yield label.get_text(), label.get_window_extent()


def assert_readable(figure):
    found = list(texts(figure))
    assert found
    frame = figure.bbox.padded(1)
    for i, (text, box) in enumerate(found):
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0
        assert inside, f"{text!r} is cut off"
        assert box.y1 <= frame.y1, f"{text!r} is cut off"
        for other, its in found[:i]:
            assert not box.padded(-1).overlaps(its.padded(-1)), f"{text!r} lies on {other!r}"


def test_the_loss_is_relative_to_the_first_step(drawn):
    figure = drawn(draw_curves, metrics_of(LOSSES), "rkdo on digits")
    axes = figure.axes[0]
    x, y = axes.lines[0].get_data()
    assert y[0] == 1
    assert list(x) == list(range(1, 41))
    assert y[-1] == pytest.approx(LOSSES[-1] / LOSSES[0])
    assert axes.get_ylabel() == "loss ÷ loss at the start"
    assert "2.500 → 0.762 nats" in axes.get_title()


@pytest.mark.parametrize("first", [0.0, -1.0])
def test_a_loss_that_has_no_ratio_is_shown_as_it_is(first, drawn):
    figure = drawn(draw_curves, metrics_of([first, 1.0, 2.0]), "title")
    assert list(figure.axes[0].lines[0].get_ydata()) == [first, 1.0, 2.0]
    assert figure.axes[0].get_ylabel() == "loss (nats)"


def test_every_metric_has_a_scale_of_its_own(drawn):
    metrics = metrics_of(LOSSES)
    figure = drawn(draw_curves, metrics, "rkdo on digits")
    assert len(figure.axes) == 1 + len(LABELS)
    for axes, (name, label) in zip(figure.axes[1:], LABELS.items(), strict=True):
        values = [line[name] for line in metrics if name in line]
        assert list(axes.lines[0].get_ydata()) == values
        assert axes.get_title() == f"{label}\n{values[0]:.3f} → {values[-1]:.3f}"
        low, high = axes.get_ylim()
        assert high - low < 1.5 * (max(values) - min(values))


@pytest.mark.parametrize(
    ("judged", "names", "scale"),
    [
        ((), tuple(LABELS), 1),
        ((0,), tuple(LABELS), 1e6),
        (range(0, 41, 2), tuple(LABELS), 1e-7),
        ((0, 20, 40), tuple(LABELS)[:3], 1),
        ((0, 40), ("linear_probe",), 1),
    ],
    ids=str,
)
def test_curves_are_readable(judged, names, scale, drawn):
    metrics = metrics_of([scale * loss for loss in LOSSES], judged, names)
    assert_readable(drawn(draw_curves, metrics, "a title that is not all that short"))


def test_curves_of_a_run_that_made_no_step(drawn):
    assert_readable(drawn(draw_curves, metrics_of([], (0,)), "rkdo on digits"))
    assert_readable(drawn(draw_curves, [], "rkdo on digits"))


def field_of(classes, images=6):
    labels = torch.arange(classes).repeat_interleave(images)
    same = (labels[:, None] == labels).double()
    return torch.softmax(3 * same + torch.eye(len(labels)), 1), labels


def by_epoch(epochs, names=("field_entropy", "field_purity")):
    return [
        {"step": 22 * epoch, "epoch": float(epoch), **dict.fromkeys(names, 0.9**epoch)}
        for epoch in range(1, epochs + 1)
    ]


@pytest.mark.parametrize(
    ("classes", "epochs"), [(1, 1), (2, 300), (10, 12), (37, 0), (100, 3), (1000, 1)]
)
def test_a_field_is_readable(classes, epochs, drawn):
    block, labels = field_of(classes, images=1 if classes == 1000 else 6)
    figure = drawn(draw_field, block, labels, by_epoch(epochs), "dense field on digits, step 22")
    assert_readable(figure)
    named = [x.get_text() for x in figure.axes[0].get_xticklabels()]
    assert set(named) <= {str(label) for label in range(classes)}
    assert min(classes, 5) <= len(named) <= 10
    assert len(figure.axes) == (4 if epochs else 2)


def test_a_field_without_labels_is_drawn(drawn):
    block, _ = field_of(10)
    figure = drawn(draw_field, block, None, by_epoch(3, ("field_entropy",)), "title")
    assert_readable(figure)
    assert figure.axes[0].get_xlabel() == "image"


def test_a_table_of_runs_of_which_one_knows_fewer_metrics():
    lines = table({"before": {"knn": 0.5}, "after": {"knn": 0.75, "one_label": 0.25}}).splitlines()
    assert [line.split()[-2:] for line in lines] == [
        ["before", "after"], ["–", "0.2500"], ["0.5000", "0.7500"]
    ]  # fmt: skip

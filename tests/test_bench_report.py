"""Tables, pictures and comparisons: from result files alone, and never of unlike with unlike."""

from dataclasses import replace

import pytest
from bench_results import complaint, result, write

from bench import plot, record, report, session
from bench.__main__ import main

# ---- against another file ------------------------------------------------------------------------


def both(ours, **others):
    return [result("eager", p50=8.0), result("ours", p50=ours, **others)]


@pytest.mark.parametrize(
    ("now", "worse"),
    [
        (both(1.04), 0),
        (both(1.06), 1),
        (both(1.0, peak_bytes=10_900_000), 0),  # less than a megabyte is no growth
        (both(1.0, peak_bytes=12_000_000), 1),
        (both(None, status="oom"), 1),
        ([result("eager", p50=16.0), result("ours", p50=2.0)], 0),  # a slower machine
        (both(0.5), 0),
        (both(1.0, status="wrong", detail="9 × the limit"), 1),
    ],
)
def test_against_fails_past_five_percent(tmp_path, capsys, now, worse):
    before = write(tmp_path / "before.jsonl", both(1.0))
    after = write(tmp_path / "after.jsonl", now)
    assert main(["--against", str(before), "--with", str(after)]) == bool(worse)
    assert len(report.against(both(1.0), now)[0]) == worse


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (1.04, "nothing is over 5 % worse than in"),
        (1.06, "rkdo_loss ours N=64 d=64 fp32: time +6.0 %"),
        (0.97, "nothing is over 5 % worse than in"),
        (0.80, "rkdo_loss ours N=64 d=64 fp32: time -20.0 %"),
    ],
)
def test_against_says_what_changed(tmp_path, capsys, now, said):
    before = write(tmp_path / "before.jsonl", both(1.0))
    main(["--against", str(before), "--with", str(write(tmp_path / "after.jsonl", both(now)))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(said)
    assert len([x for x in lines if "time" in x]) == (abs(now - 1) > 0.05)


@pytest.mark.parametrize(
    "now",
    [
        both(1.0, device="other"),
        both(1.0, threads=4),
        [*both(1.0), *both(1.0, device="other")],
        [result("eager", p50=8.0)],
        [result(p50=1.0, n=128)],
    ],
    ids=["device", "threads", "two devices", "none of ours", "another size"],
)
def test_unlike_files_are_not_compared(tmp_path, capsys, now):
    before = write(tmp_path / "before.jsonl", both(1.0))
    after = write(tmp_path / "after.jsonl", now)
    assert "nothing to compare" in complaint(capsys, ["--against", before, "--with", after])


@pytest.mark.parametrize("other", [{"device": "Abacus"}, {"threads": 77}])
def test_hardware_is_compared_before_anything_is_measured(tmp_path, capsys, monkeypatch, other):
    here = dict(zip(("device", "threads"), session.hardware("cpu"), strict=True))
    monkeypatch.setattr(session, "measure_all", None)
    before = write(tmp_path / "before.jsonl", both(1.0, **{**here, **other}))
    out = tmp_path / "out.jsonl"
    said = complaint(capsys, ["--device", "cpu", "--against", before, "--out", out])
    assert "nothing to compare" in said
    assert not out.exists()


def test_a_missing_contender_is_one_line():
    (note,) = report.against([*both(1.0), result("ours, graph", p50=1.0)], both(1.0))[1]
    assert note == "rkdo_loss ours, graph N=64 d=64 fp32: not measured this time"
    (note,) = report.against(both(1.0), [result("ours", p50=1.0)])[1]
    assert note.endswith("no eager beside it, so times are compared as they are")


def test_on_a_gpu_times_are_compared_as_they_are():
    before = [result("eager", p50=8.0, driver="1"), result(p50=1.0, driver="1")]
    after = [result("eager", p50=16.0, driver="1"), result(p50=1.06, driver="1")]
    assert len(report.against(before, after)[0]) == 1


# ---- table and pictures --------------------------------------------------------------------------


def test_the_table_and_its_sentences():
    results = [
        *both(2.0),
        result("compiled", p50=4.0),
        result("chunked", p50=None, status="oom", detail="out of memory"),
    ]
    lines = report.table(results).splitlines()
    assert "4.00" in next(x for x in lines if "eager" in x)
    assert "OOM" in next(x for x in lines if "chunked" in x)
    assert report.ratios(results)[0].startswith("rkdo_loss N=64 d=64 fp32: eager ÷ ours = 4.00")
    depths = [replace(result(f"ours depth {k}", p50=p), case="depth") for k, p in ((1, 2), (8, 3))]
    assert report.ratios(depths) == ["depth N=64 d=64 fp32: ours: depth 8 ÷ depth 1 = 1.50"]


def test_depths_are_compared_at_one_size():
    found = [
        replace(result(f"eager depth {k}", n=n, p50=p, status=status), case="depth")
        for k, n, p, status in ((1, 64, 1, "ok"), (8, 64, 4, "ok"), (1, 512, 2, "ok"),
                                (8, 512, None, "oom"))
    ]  # fmt: skip
    assert [(x.n, y.n, y.p50) for x, y in report.depths(found)] == [(64, 64, 4)]


def sizes(*counts, p50=1e-6, **others):
    return [result(x, n=n, p50=p50 * n, **others) for n in counts for x in ("eager", "ours")]


def test_pictures_come_from_files_alone(tmp_path):
    results = sizes(64, 1024, 4096)
    results[4] = result("eager", n=4096, p50=None, status="oom")
    results += [result("inf-cl", n=n, p50=None, status="unavailable") for n in (64, 1024)]
    path = write(tmp_path / "results.jsonl", results)
    (picture,) = plot.draw([path], tmp_path / "pictures")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 80_000
    assert plot.drawn_from(picture) == plot.digest(plot.groups(path)[picture.name])
    assert plot.draw([path], tmp_path / "pictures", "rkdo_loss") == [picture]
    assert picture.read_bytes() == content
    assert plot.fate([x for x in results if x.contender == "eager"]) == "out of memory at N = 4096"


def test_a_picture_shows_what_is_right(tmp_path, monkeypatch):
    """Lines, labels and units, read from the figure itself."""
    shown = []
    monkeypatch.setattr(plot, "save", lambda figure, *_: shown.append(figure))
    results = sizes(64, 128)
    results[2] = result("eager", n=128, p50=5.0, status="wrong")
    plot.picture(results, tmp_path / "none.png")
    times, memory = shown[0].axes
    lines = {line.get_label(): list(line.get_xydata().ravel()) for line in times.lines}
    assert lines["eager (wrong at N = 128)"] == [64, 0.064]
    assert lines["ours"] == [64, 0.064, 128, 0.128]
    assert lines["hardware's floor"] == [64, 100, 128, 100]
    assert [len(line.get_xdata()) for line in memory.lines] == [2, 1, 2]
    assert list(memory.lines[-1].get_ydata()) == [2 * 64 * 4 * n / 1e6 for n in (64, 128)]
    for axes, unit in ((times, "ms"), (memory, "MB")):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert unit in axes.get_ylabel()
        assert "N" in axes.get_xlabel()
        assert [x.get_text() for x in axes.get_xticklabels()] == ["64", "128"]


def test_nothing_to_draw_is_one_line(tmp_path, capsys, monkeypatch):
    one = write(tmp_path / "one.jsonl", [result()])
    depth = write(tmp_path / "depth.jsonl", [result("ours depth 8", n=n) for n in (64, 128)])
    two = write(tmp_path / "two.jsonl", sizes(64, 128))
    for arguments in ([one], [depth], [two, "--case", "nonesuch"]):
        assert "nothing to draw" in complaint(capsys, ["plot", *arguments])
    assert "cannot be a folder" in complaint(capsys, ["plot", two, "--out", one])
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    assert "no result files" in complaint(capsys, ["plot"])


def test_plot_draws_the_kept_files(tmp_path, capsys):
    assert main(["plot", "--out", str(tmp_path), "--case", "rkdo_loss"]) == 0
    pictures = capsys.readouterr().out.split()
    assert pictures
    assert sorted(pictures) == sorted(str(x) for x in tmp_path.iterdir())

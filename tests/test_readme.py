"""README says what bench/results says: its tables, its pictures, and no other figure."""

import json
import re
import shutil

import pytest
import torch
from bench_results import complaint, result, write

from bench import demo, plot, readme, record
from bench.__main__ import main
from rkdo.__main__ import _parse
from rkdo.evaluate import LABELS
from rkdo_kernels import ResponseField

TEXT = readme.README.read_text(encoding="utf-8")
CODE = re.compile(r"```.*?```|^ {4}.*?$|`[^`]*`|\]\([^)]*\)|Apache-2.0", re.DOTALL | re.MULTILINE)
FIGURE = re.compile(
    r"""\d\s*(?:%|×(?!\s*\d)|(?:s|ms|µs|ns|[kKMGT]i?B|x)\b|[-\s](?:times|fold|hours?|minutes?|seconds?)\b)
    |\b(?:two|three|four|five|six|eight|ten|twenty)\s(?:times|hours|minutes|seconds)\b
    |(?<!≥\s)\b\d+\.\d+|\b\d+e-?\d+""",
    re.VERBOSE,
)
# The table of recursions: what its fields take is computed here, and no other figure is in it.
CLOCK = 16  # its seed and its count of updates
MEMORY = re.compile(r"^\| `--recursion` \|.*?\n(?=\n)", re.DOTALL | re.MULTILINE)
FIELDS = {
    "`batch`": None,
    "`dense`": lambda n: ResponseField.dense(n, device="meta"),
    "`dense --field-dtype bfloat16`": lambda n: ResponseField.dense(
        n, dtype=torch.bfloat16, device="meta"
    ),
    "`snapshot --history 4`": lambda n: ResponseField.snapshot(n, 64, history=4, device="meta"),
}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A README, results and docs of its own."""
    (tmp_path / "docs").mkdir()
    shutil.copytree(record.FOLDER, tmp_path / "results")
    (tmp_path / "README.md").write_text(TEXT, encoding="utf-8")
    for module in (record, readme):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(plot, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    return tmp_path / "README.md"


def test_readme_is_what_the_files_give():
    assert readme.rendered(TEXT) == TEXT
    assert readme.stale() == []


def test_no_other_figure_stands_in_it():
    prose = CODE.sub("", MEMORY.sub("", readme.BLOCK.sub("", TEXT)))
    assert [x.group() for x in FIGURE.finditer(prose)] == []


def size(count):
    unit, name = next(x for x in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if count >= x[0])
    return f"{count / unit:#.3g} {name}"


def test_a_fields_memory_is_what_its_tensors_take():
    header, _, *rows = ([x.strip() for x in row.split("|")[1:-1]] for row in table(MEMORY))
    sizes = [int(x.rpartition("n = ")[2].replace(",", "")) for x in header[2:4]]
    assert sizes == [50_000, 1_281_167]
    assert [row[0] for row in rows] == list(FIELDS)
    for row in rows:
        make = FIELDS[row[0]]
        assert row[2:4] == [size(make(n).nbytes) if make else "none" for n in sizes]
        assert FIGURE.findall(CODE.sub("", " ".join([row[1], *row[4:]]))) == []


@pytest.mark.parametrize("n", [50_000, 1_281_167])
def test_a_fields_memory_follows_from_its_formula(n):
    entries = n * n
    beside = 4 * n + 8 * n  # a dense field's diagonal in float32 and its rows' sums in float64
    embeddings = n * 4 * 64 * 2  # K = 4 visits, d = 64, both views
    visits = n * 4 * 2 * 4 + 4 * n  # alpha and scale of each in float32, and their number
    found = {name: make(n).nbytes for name, make in FIELDS.items() if make}
    assert found == {
        "`dense`": 4 * entries + beside + CLOCK,
        "`dense --field-dtype bfloat16`": 2 * entries + beside + CLOCK,
        "`snapshot --history 4`": 2 * embeddings + visits + CLOCK,
    }


def table(pattern):
    (found,) = pattern.findall(TEXT)
    return found.splitlines()


def test_every_training_command_is_one(tmp_path):
    commands = re.findall(r"^ {4}(?:torchrun .* -m )?rkdo (.*?)(?: +#.*)?$", TEXT, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        if "--resume" not in command:  # that asks for the run
            assert callable(_parse(re.sub(r" \[.*\]", "", command).split()).run)


@pytest.mark.parametrize(
    "text",
    ["17.8 times faster", "takes 83 s", "1.44 GB", "5 % worse", "20× eager", "in ten minutes",
     "errors of 3e-08", "30 seconds", "a 10-fold gain", "50 µs"],
)  # fmt: skip
def test_what_counts_as_a_figure(text):
    assert FIGURE.search(text)


def test_every_picture_is_shown_and_small():
    shown = set(re.findall(r"\]\((docs/[^)]+)\)", TEXT))
    assert shown == {f"docs/{path.name}" for path in plot.DOCS.glob("*.png")}
    assert all(path.stat().st_size < 80_000 for path in plot.DOCS.glob("*.png"))


def test_a_number_edited_by_hand_fails(page, capsys):
    assert main(["readme"]) == 0
    assert main(["readme", "--check"]) == 0
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"(\| rkdo_loss .*?)\d", r"\g<1>9", text, count=1), encoding="utf-8")
    assert main(["readme", "--check"]) == 1
    assert "README.md is not what bench/results gives" in capsys.readouterr().out
    assert main(["readme"]) == 0
    assert page.read_text(encoding="utf-8") == text


def test_other_files_give_another_readme(page):
    for path in record.benchmark_files():
        path.unlink()
    about = {"device": "Abacus 9", "driver": "580", "commit": "0123456789", "dirty": True}
    results = [
        result(who, n=n, p50=p, status=status, **about)
        for who, n, p, status in (
            ("eager", 64, 3e-3, "ok"), ("ours", 64, 4e-3, "ok"), ("compiled", 64, 1e-3, "wrong"),
            ("eager", 65536, None, "oom"), ("ours", 65536, 9e-3, "ok"),
        )
    ]  # fmt: skip
    path = write(readme.FOLDER / "gpu-abacus.jsonl", results)
    assert main(["readme"]) == 0
    text = page.read_text(encoding="utf-8")
    assert "Abacus 9, driver 580, commit 0123456 with changes (`bench/results/gpu-abacus" in text
    row = "| rkdo_loss (64, fp32) | 64 | 3 ms | wrong | 4 ms | 0.75 | – | 10.0 MB | 10.0 MB |"
    assert row in text
    assert "| 65536 | out of memory | – | 9 ms | – | – |" in text
    assert readme.NO_GPU not in text
    picture = plot.DOCS / "gpu-abacus-rkdo_loss-d64-fp32.png"
    assert f"(docs/{picture.name})" in text
    assert main(["readme", "--check"]) == 0
    write(path, [*results[:4], result("ours", n=65536, p50=8e-3, **about)])
    assert readme.stale() == [picture.name]


def test_the_demo_is_kept_with_its_curves(page, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = {"dataset": "digits", "method": "rkdo", "epochs": 1, "seed": 42}
    (run / "config.json").write_text(json.dumps({"config": config}))
    metrics = [
        {"step": 0, "epoch": 0.0, **dict.fromkeys(LABELS, 0.5)},
        {"step": 1, "epoch": 1.0, "loss": 2.0, "images_per_second": 8.0},
        {"step": 1, "epoch": 1.0, **dict.fromkeys(LABELS, 0.75)},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
    kept = demo.lines(run, {"device": "Abacus 9", "threads": 2, "seconds": 7.2})
    assert "images_per_second" not in kept[2]
    (readme.FOLDER / "demo.jsonl").write_text("".join(json.dumps(x) + "\n" for x in kept))
    assert main(["readme"]) == 0
    text = page.read_text(encoding="utf-8")
    assert "| digits, 1 epochs (1 steps) | before | after |" in text
    assert "| linear probe accuracy | 0.5000 | 0.7500 |" in text
    assert "7 s on Abacus 9, 2 threads (`bench/results/demo.jsonl`)." in text
    assert plot.drawn_from(plot.DOCS / "curves.png") == plot.digest(kept[1:])


def test_what_is_missing_is_one_line(page, capsys):
    page.write_text(TEXT.replace("<!-- generated: demo -->", ""), encoding="utf-8")
    assert "README.md needs the blocks" in complaint(capsys, ["readme"])
    page.write_text(TEXT, encoding="utf-8")
    for name, text, said in (
        ("demo.jsonl", "{}", "is not what python -m bench demo writes"),
        ("precision.jsonl", "", "holds no result"),
        ("precision.jsonl", "x", "is not JSON lines"),
    ):
        kept = (readme.FOLDER / name).read_bytes()
        (readme.FOLDER / name).write_text(text)
        assert said in complaint(capsys, ["readme"])
        (readme.FOLDER / name).write_bytes(kept)
    (readme.FOLDER / "demo.jsonl").unlink()
    assert "demo.jsonl cannot be read" in complaint(capsys, ["readme"])

"""The matrix of machines: which there are, and that a row that fails is told."""

import sys

import matrix
import numpy as np
import pytest
import torch


@pytest.fixture
def usual(tmp_path, monkeypatch):
    """Environments that are this one, and logs that are nobody else's."""
    monkeypatch.setattr(matrix, "ENVIRONMENTS", tmp_path / "environments")
    monkeypatch.setattr(matrix, "LOGS", tmp_path / "logs")
    for machine in [*matrix.TOGETHER, *matrix.APART]:
        folder = machine.environment.folder / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / ".ready").touch()
        (folder / "python").unlink(missing_ok=True)
        (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (folder / "python").chmod(0o755)
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["matrix.py", *arguments])
    return matrix.main()


@pytest.mark.parametrize("rows", ["TOGETHER", "APART"])
def test_every_release_python_and_instruction_set_has_a_row(rows):
    machines = [matrix.TOGETHER[0], *getattr(matrix, rows)]
    environments = {machine.environment for machine in machines}
    assert {e.python for e in environments} == {"3.10", "3.11", "3.12", "3.13"}
    assert {e.torch for e in environments} == {"torch==2.11.*", "torch==2.14.*", "torch"}
    assert len({e.folder for e in environments}) == len(environments)
    settings = {f"{k}={v}" for m in machines for k, v in m.variables.items()}
    assert settings == {
        "ATEN_CPU_CAPABILITY=default", "ATEN_CPU_CAPABILITY=avx2", "ATEN_CPU_CAPABILITY=avx512",
        "MKL_ENABLE_INSTRUCTIONS=AVX2", "MKL_ENABLE_INSTRUCTIONS=AVX512", "MKL_CBWR=COMPATIBLE",
        "TEST_THREADS=2", "TEST_THREADS=5",
    }  # fmt: skip
    assert any("random" in option for m in machines for option in m.options)


def test_apart_is_one_thing_at_a_time(monkeypatch, capsys):
    assert all(len(m.variables) + (m.options != ()) <= 1 for m in matrix.APART)
    for arguments, rows in (([], matrix.TOGETHER), (["--apart"], matrix.APART)):
        assert run(monkeypatch, "--list", *arguments) == 0
        names = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
        assert names == ["usual", *(m.name for m in rows if m.name != "usual")]


def test_a_row_is_told_with_what_it_ran(usual, monkeypatch, capsys):
    (usual / "test_fine.py").write_text(
        "import os\ndef test_it():\n    assert os.environ['MKL_CBWR'] == 'COMPATIBLE'\n"
    )
    assert run(monkeypatch, "mkl-comp", "--jobs", "1", "--", str(usual / "test_fine.py")) == 0
    row = capsys.readouterr().out
    assert row.startswith("| mkl-compatible | 3.11 | torch==2.14.* | MKL_CBWR=COMPATIBLE | passed")
    assert "1 passed" in row


@pytest.mark.parametrize("text", ["def test_it():\n    assert False\n", "", "import nowhere\n"])
def test_a_row_that_fails_or_ran_nothing_fails_the_matrix(usual, monkeypatch, capsys, text):
    (usual / "test_broken.py").write_text(text)
    assert run(monkeypatch, "usual", "--jobs", "1", "--", str(usual / "test_broken.py")) == 1
    assert "FAILED" in capsys.readouterr().out


def test_an_environment_that_cannot_be_made_fails_its_row(usual, monkeypatch, capsys):
    (matrix.OLDEST.folder / ".ready").unlink()
    monkeypatch.setenv("PATH", str(usual))
    assert run(monkeypatch, "oldest") == 1
    assert "no environment: " in capsys.readouterr().out


def test_a_name_that_no_row_has(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "abacus")
    assert stop.value.code == 2
    assert "no row is named abacus" in capsys.readouterr().err


@pytest.mark.parametrize("turn", [1, 2])
def test_random_numbers_are_the_same_in_any_order_of_the_tests(turn):
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
    assert np.random.rand() == np.random.RandomState(0).rand()

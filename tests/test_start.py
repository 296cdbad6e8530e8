"""A command does not wait for libraries that it has no use for."""

import gc
import subprocess
import sys

import pytest
from runs import ROOT, environment

from rkdo.imports import importing

CODE = """
import sys
import rkdo.__main__
print(*sorted({"numpy", "torch", "tyro"} & set(sys.modules)))
import rkdo.embed, rkdo.field, rkdo.train
print(*sorted({"matplotlib", "pandas", "scipy", "sklearn", "tensorboard"} & set(sys.modules)))
"""


def test_the_collector_rests_only_while_importing():
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()  # whoever had it off keeps it off
    finally:
        gc.enable()


def test_a_command_starts_with_what_it_needs_alone():
    process = subprocess.run(
        [sys.executable, "-c", CODE], env=environment(), capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "\n\n"

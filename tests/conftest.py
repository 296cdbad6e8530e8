"""For the whole session: without a GPU, Triton's kernels run on CPU tensors in its interpreter."""

import os
import random
import re

import numpy as np
import pytest
import torch
from pairs import thin

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
# The tensors are small: threads would wait for one another. Other numbers are for tests/matrix.py.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


def pytest_addoption(parser):
    parser.addoption(
        "--all-cases", action="store_true", help="of tests marked `pairs`, all combinations"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "pairs: of its parameters' product, every pair of values")


@pytest.hookimpl(trylast=True)  # after what the command line chooses
def pytest_collection_modifyitems(config, items):
    for item in items:  # processes that share the tests must give them the same names
        if re.search("0x[0-9a-fA-F]{6}", item.nodeid):
            raise pytest.UsageError(f"a test is named by an address in memory: {item.nodeid}")
    if not config.getoption("--all-cases"):
        items[:], left_out = thin(items)
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """For each test, whichever ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def poisoned():
    """torch.empty is full of NaN: what a kernel forgets to write, or should not read, shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["wide tiles", "tall tiles"])
def tiles(request, monkeypatch):
    """Tiles of different heights and widths, small enough for a small problem to need many."""
    from rkdo_kernels import launch
    from rkdo_kernels import tiles as machinery

    rows, cols = {"wide tiles": (16, 32), "tall tiles": (32, 16)}[request.param]
    monkeypatch.setattr(launch, "INTERPRETED", launch.Config(rows, cols, 1, 1))
    monkeypatch.setattr(machinery, "ROWS", rows)
    monkeypatch.setattr(machinery, "LEAST_ROWS", rows)
    monkeypatch.setattr(machinery, "COLS", cols)
    monkeypatch.setattr(machinery, "STRIP_BYTES", 3000)

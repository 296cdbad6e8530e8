"""The arrows run one way. To allow a new one, add it to the table and say why in a review."""

import ast
from pathlib import Path

import pytest

import rkdo
import rkdo_kernels

# Every module of rkdo_kernels and the modules of the package that it may import.
ARROWS = {
    # the ground: mathematics, arguments and arithmetic know nobody
    "reference": set(),
    "checks": set(),
    "constants": set(),
    "ratios": set(),
    "once": set(),
    "needs": {"once"},
    "stand_ins": set(),
    "primitives": set(),
    "distances": {"needs", "tiles"},
    "tiles": {"needs"},
    "distributed": set(),
    # what follows from a call's settings alone
    "chebyshev": {"constants"},
    "quadrature": {"chebyshev", "constants"},
    # PyTorch: losses by tiles, or all at once
    "one_pass": {"needs", "quadrature", "tiles"},
    "tiled": {"distances", "needs", "one_pass", "tiles"},
    "small": {"constants", "once"},
    "rounding": set(),
    "field_blocks": {"needs", "tiles"},
    "field_tiles": {"field_blocks", "needs", "rounding"},
    # Triton: kernels know their pieces and their launch tables
    "launch": {"chebyshev", "constants", "launch_tables"},
    "launch_tables": set(),
    "parts": {"launch", "primitives"},
    "levels": {"launch", "parts", "primitives"},
    "recursion_rows": {"primitives"},
    "moments": {
        "launch",
        "needs",
        "primitives",
        "quadrature",
        "recursion_rows",
        "single_launch",
    },
    "moments_gradient": {"gradient_stripes", "launch", "levels", "needs", "parts", "primitives"},
    "gradient_stripes": {"launch", "levels", "needs", "primitives"},
    "single_launch": {
        "checks",
        "launch",
        "parts",
        "primitives",
        "recursion_rows",
    },
    "gradient_loop": {"levels", "parts", "primitives"},
    "softmax_sums": {"launch", "levels", "needs", "parts", "primitives", "gradient_loop"},
    "recursion": {"launch", "levels", "needs", "parts", "primitives", "gradient_loop"},
    "symmetric": {
        "launch",
        "levels",
        "needs",
        "parts",
        "primitives",
        "moments",
        "moments_gradient",
    },
    "field_mixture": {"primitives", "softmax_sums"},
    "field_snapshot": {"field_mixture", "launch", "needs", "parts", "primitives", "softmax_sums"},
    "field_rows": {"primitives"},
    "field_walk": {"field_rows", "parts", "primitives"},
    "field_gradient": {"field_rows", "moments_gradient", "parts", "primitives"},
    "field": {
        "field_gradient",
        "field_rows",
        "field_snapshot",
        "field_walk",
        "launch",
        "needs",
        "parts",
        "primitives",
        "softmax_sums",
    },
    "kernels": {
        "launch",
        "moments",
        "moments_gradient",
        "symmetric",
        "softmax_sums",
        "recursion",
    },
    # operators choose between kernels and tiles
    "ops": {"chebyshev", "kernels", "needs", "once", "quadrature", "tiled", "ratios"},
    "field_ops": {"field", "field_tiles", "needs", "ops"},
    # the response field: p⁰, its two kinds of state, a batch of it, the class
    "initial": {"checks"},
    "batch": {"checks", "distributed", "launch", "needs", "once", "ops", "problem"},
    "turns": set(),
    "field_state": {"turns"},
    "dense_field": {
        "batch",
        "checks",
        "field_ops",
        "field_state",
        "field_tiles",
        "initial",
        "needs",
        "turns",
    },
    "snapshot_field": {
        "batch",
        "checks",
        "field_ops",
        "field_state",
        "initial",
        "needs",
        "problem",
    },
    "response": {
        "batch",
        "checks",
        "constants",
        "dense_field",
        "field_state",
        "initial",
        "losses",
        "needs",
        "ops",
        "snapshot_field",
        "turns",
    },
    # losses: arguments, rows, public functions, modules
    "problem": {"checks", "constants", "launch", "needs", "once", "ops", "small", "stand_ins"},
    "rows": {"problem", "launch", "needs", "once", "one_pass", "ops", "small"},
    "losses": {"checks", "constants", "launch", "ops", "reference", "rows", "problem"},
    "modules": {"checks", "constants", "losses"},
    "__init__": {"losses", "modules", "response"},
}
PUBLIC_MODULES = {"distributed"}  # that rkdo may import besides the names of rkdo_kernels
# Modules that need Triton to be imported.
TRITON = {
    "primitives", "gradient_loop", "recursion_rows", "moments", "moments_gradient", "symmetric",
    "softmax_sums", "recursion", "single_launch", "gradient_stripes", "field", "field_snapshot",
    "field_gradient", "field_rows", "field_walk", "field_mixture", "parts", "levels",
}  # fmt: skip
KERNELS = sorted(Path(rkdo_kernels.__file__).parent.glob("*.py"))
TRAINER = sorted(Path(rkdo.__file__).parent.glob("*.py"))


def imports_of(path, package):
    """Modules of `package` that a file imports, wherever in the file, and the names it takes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == package:
                    yield name.name.removeprefix(package).removeprefix("."), None
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module.split(".")[0] != package:
                continue
            module = module.removeprefix(package).removeprefix(".") if node.level == 0 else module
            for name in node.names:
                yield (module, name.name) if module else (name.name, None)


def test_the_table_lists_every_module():
    assert {path.stem for path in KERNELS} == set(ARROWS)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_arrow_runs_back(path):
    found = {module.split(".")[0] for module, _ in imports_of(path, "rkdo_kernels")}
    assert found <= ARROWS[path.stem], f"{path.stem} may import only {ARROWS[path.stem] or 'none'}"


def test_the_table_itself_has_no_cycle():
    below, left = set(), dict(ARROWS)
    while left:
        ready = {module for module, known in left.items() if known <= below}
        assert ready, f"a cycle among {sorted(left)}"
        below |= ready
        left = {module: known for module, known in left.items() if module not in ready}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_only_kernels_import_triton_when_they_are_imported(path):
    top = [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in top if isinstance(n, ast.ImportFrom) and n.module}
    names |= {a.name for n in top if isinstance(n, ast.ImportFrom) and n.level for a in n.names}
    found = {name.split(".")[0] for name in names} & ({"triton", "kernels"} | TRITON)
    assert not found or path.stem in TRITON | {"kernels"}


@pytest.mark.parametrize("path", TRAINER, ids=lambda path: path.stem)
def test_the_trainer_knows_public_names_only(path):
    for module, name in imports_of(path, "rkdo_kernels"):
        if module == "":
            assert name is None or name in rkdo_kernels.__all__
        elif name is None:
            assert module in PUBLIC_MODULES | set(rkdo_kernels.__all__)
        else:
            assert module in PUBLIC_MODULES
            assert not name.startswith("_")


def test_imports_are_found_wherever_they_stand(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import rkdo_kernels.recursion\nfrom . import ops, tiled\nfrom .rows import logsumexp\n"
        "def f():\n    from rkdo_kernels.small import MAX_ENTRIES\n    from rkdo_kernels import g\n"
        "import torch\nfrom torch import rows\n"
    )
    assert set(imports_of(file, "rkdo_kernels")) == {
        ("recursion", None), ("ops", None), ("tiled", None), ("rows", "logsumexp"),
        ("small", "MAX_ENTRIES"), ("g", None),
    }  # fmt: skip

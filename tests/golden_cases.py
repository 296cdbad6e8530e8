"""Golden values, float64: losses by row, and the gradients of Σ_i w_i loss_i with w from −1 to 1.

The inputs are exact in float32. Where alpha = 0 there are no golden gradients.
"""

import json
from pathlib import Path

import numpy as np
import torch
from accuracy import DEVICE

from rkdo_kernels import icon_loss, info_nce, reference, rkdo_loss

FILE = np.load(Path(__file__).parent / "golden" / "truths.npz")
CASES = [{"case": k, **case} for k, case in enumerate(json.loads(str(FILE["cases"])))]
LOSSES = {
    "rkdo": (rkdo_loss, reference.rkdo_loss),
    "icon": (icon_loss, reference.icon_loss),
    "info_nce": (info_nce, reference.info_nce),
}


def settings_of(case):
    settings = {k: v for k, v in case.items() if k not in ("case", "loss", "shape", "detach")}
    return settings | ({"detach_target": case["detach"]} if "detach" in case else {})


def golden_inputs(case):
    return {name: load(f"{name}_{case['shape']}") for name in ("queries", "keys")}


def golden_truth(case):
    names = {"value": "rows", "queries": "dq", "keys": "dk"}
    names = {name: f"{stored}_{case['case']}" for name, stored in names.items()}
    return {name: load(stored) for name, stored in names.items() if stored in FILE}


def golden_weights(n, device):
    return torch.linspace(-1, 1, n, dtype=torch.float64, device=device)


def load(name):
    return torch.from_numpy(FILE[name]).to(DEVICE)

"""Contrastive and recursive KL losses on row moments: no N × M matrix, on any machine.

from rkdo_kernels import rkdo_loss

loss = rkdo_loss(queries, keys)     # [N, D] unit rows, keys[i] the positive of queries[i]
loss.backward()
"""

from .losses import (
    icon_loss,
    info_nce,
    nt_xent,
    rkdo_loss,
    similarity_logsumexp,
    similarity_moments,
)
from .modules import IConLoss, InfoNCELoss, NTXentLoss, RKDOLoss
from .response import ResponseField

__version__ = "0.1.0"

__all__ = [
    "IConLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "RKDOLoss",
    "ResponseField",
    "icon_loss",
    "info_nce",
    "nt_xent",
    "rkdo_loss",
    "similarity_logsumexp",
    "similarity_moments",
]

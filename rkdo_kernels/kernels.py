"""The Triton implementation of what tiled.py does in PyTorch, under the same names."""

from .direct import recursion, recursion_backward, softmax_sums, softmax_sums_backward
from .moments import moments
from .moments_gradient import moments_backward

__all__ = [
    "moments",
    "moments_backward",
    "recursion",
    "recursion_backward",
    "softmax_sums",
    "softmax_sums_backward",
]

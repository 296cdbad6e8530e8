"""The Triton implementation of what tiled.py does in PyTorch, under the same names."""

from .moments import moments, recursion_moments
from .moments_gradient import moments_backward
from .recursion import recursion, recursion_backward
from .softmax_sums import softmax_sums, softmax_sums_backward
from .symmetric import both_sums, both_sums_backward, self_sums, self_sums_backward

__all__ = [
    "both_sums",
    "both_sums_backward",
    "moments",
    "moments_backward",
    "recursion",
    "recursion_backward",
    "recursion_moments",
    "self_sums",
    "self_sums_backward",
    "softmax_sums",
    "softmax_sums_backward",
]

"""The Triton implementation of what tiled.py does in PyTorch, under the same names.

Each runs on the device of its tensors, which need not be the current one.
"""

from . import moments as row_moments
from . import moments_gradient, symmetric
from . import recursion as direct
from . import softmax_sums as sums
from .launch import on_device

moments = on_device(row_moments.moments)
recursion_moments = on_device(row_moments.recursion_moments)
moments_backward = on_device(moments_gradient.moments_backward)
both_sums = on_device(symmetric.both_sums)
both_sums_backward = on_device(symmetric.both_sums_backward)
self_sums = on_device(symmetric.self_sums)
self_sums_backward = on_device(symmetric.self_sums_backward)
softmax_sums = on_device(sums.softmax_sums)
softmax_sums_backward = on_device(sums.softmax_sums_backward)
recursion = on_device(direct.recursion)
recursion_backward = on_device(direct.recursion_backward)

"""Batch norm over two gloo ranks against torch's own over all rows."""

import torch
from ranks import on_two_ranks
from torch import nn

from rkdo.batchnorm import GlobalBatchNorm2d, synchronise_batch_norm

ROWS = 4


def problem():
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(2 * ROWS, 5, 3, 3, generator=generator, dtype=torch.float64)
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    norm = nn.BatchNorm2d(5).double()
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    return x, upstream, norm


def run(norm, x, upstream):
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(upstream)
    return [
        y.detach(),
        x.grad,
        norm.weight.grad,
        norm.bias.grad,
        norm.running_mean,
        norm.running_var,
    ]


def one_rank(rank, _):
    x, upstream, norm = problem()
    synchronise_batch_norm(nn.Sequential(norm))
    assert type(norm) is GlobalBatchNorm2d
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    return run(norm, x[rows], upstream[rows])


def test_two_ranks_normalise_as_one(tmp_path):
    first, second = on_two_ranks(one_rank, tmp_path)
    x, upstream, norm = problem()
    y, grad_x, grad_weight, grad_bias, mean, var = run(norm, x, upstream)
    pairs = [
        (torch.cat([first[0], second[0]]), y),
        (torch.cat([first[1], second[1]]), grad_x),
        (first[2] + second[2], grad_weight),
        (first[3] + second[3], grad_bias),
        (first[4], mean),
        (second[4], mean),
        (first[5], var),
    ]
    for ours, torchs in pairs:
        assert (ours - torchs).abs().max() <= 1e-13


def test_alone_and_in_evaluation_it_is_torchs_own():
    x, upstream, norm = problem()
    wanted = run(norm, x, upstream)
    x, upstream, norm = problem()
    synchronise_batch_norm(nn.Sequential(norm))
    assert all(torch.equal(a, b) for a, b in zip(run(norm, x, upstream), wanted, strict=True))

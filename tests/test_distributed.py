"""Two ranks against one: the same loss and the same gradients, in float64."""

import torch
import torch.distributed as dist
from accuracy import sample_views
from ranks import on_two_ranks
from test_half_precision import collapsed

from rkdo_kernels import ResponseField, info_nce, rkdo_loss
from rkdo_kernels.distributed import gather_keys

ROWS = 6
LOSSES = {
    "rkdo": rkdo_loss,
    "direct": lambda *x, **s: rkdo_loss(*x, bound=None, **s),
    "nce": info_nce,
}


def whole_views():
    return tuple(
        x.cpu().requires_grad_() for x in sample_views(2 * ROWS, 5, torch.float64).values()
    )


def losses_of(rank, _):
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    results = {}
    for name, loss in LOSSES.items():
        queries, keys = (x.detach()[mine].clone().requires_grad_() for x in whole_views())
        all_keys, offset = gather_keys(keys)
        assert offset == rank * ROWS
        value = loss(queries, all_keys, positive_offset=offset)
        value.backward()
        results[name] = value.detach(), queries.grad, keys.grad, all_keys.detach()

    # what each rank's loss says of each key, with weights that differ between ranks
    keys = torch.arange(ROWS * 2, dtype=torch.float64).view(ROWS, 2).add(100 * rank)
    keys = keys.T.contiguous().T.requires_grad_()  # not contiguous
    all_keys, _ = gather_keys(keys, dist.group.WORLD)
    weights = torch.arange(all_keys.numel(), dtype=torch.float64).view(all_keys.shape) * (rank + 1)
    (all_keys * weights).sum().backward()
    results["weighted"] = all_keys.detach(), keys.grad
    return results


def test_two_ranks_are_one(tmp_path):
    ranks = on_two_ranks(losses_of, tmp_path)
    for name, loss in LOSSES.items():
        queries, keys = whole_views()
        value = loss(queries, keys)
        value.backward()
        values, d_queries, d_keys, all_keys = zip(*(rank[name] for rank in ranks), strict=True)
        assert all(torch.equal(x, keys.detach()) for x in all_keys)
        # the mean over ranks, as DDP takes it, of the means over a rank's rows
        assert abs(sum(values) / 2 - value.detach()) <= 1e-12
        assert float((torch.cat(d_queries) / 2 - queries.grad).abs().max()) <= 1e-12
        assert float((torch.cat(d_keys) / 2 - keys.grad).abs().max()) <= 1e-12
    gathered, gradients = zip(*(rank["weighted"] for rank in ranks), strict=True)
    own = torch.arange(ROWS * 2, dtype=torch.float64).view(ROWS, 2)
    assert all(torch.equal(x, torch.cat([own, own + 100])) for x in gathered)
    weights = torch.arange(ROWS * 4, dtype=torch.float64).view(2 * ROWS, 2)
    assert torch.equal(torch.cat(gradients), 3 * weights)


def collapsed_views():
    return [x.cpu() for x in collapsed(4 * ROWS, 24, torch.bfloat16, cosine=0.99).values()]


def halves_of(rank, _):
    mine = slice(rank * 2 * ROWS, (rank + 1) * 2 * ROWS)
    index, results = torch.arange(4 * ROWS), {}
    for kind, field in fields(dist.group.WORLD).items():
        for reduction in ("sum", "none"):
            pair = [x[mine].clone().requires_grad_() for x in collapsed_views()]
            loss = field.loss(*pair, index[mine], reduction=reduction)
            (loss if reduction == "sum" else 2 * loss.sum()).backward()  # a sum is DDP's mean
            results[f"{kind}, {reduction}"] = torch.cat([x.grad for x in pair], 1)
    # parts of one key's gradient: 1, and on the other rank half of bfloat16's step there
    keys = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    all_keys, _ = gather_keys(keys)
    weights = [1.0, 2**-8] if rank == 0 else [2**-8, 2**-8]
    (all_keys * torch.tensor(weights * 2, dtype=torch.bfloat16)[:, None]).sum().backward()
    results["summed"] = keys.grad
    return results


def fields(group):
    labels = torch.arange(4 * ROWS) // 3
    snapshot = ResponseField.snapshot(4 * ROWS, 24, history=2, initial=labels, process_group=group)
    dense = ResponseField.dense(4 * ROWS, initial=labels, process_group=group)
    return {"dense": dense, "snapshot": snapshot}


def test_ranks_parts_of_a_field_s_gradient_are_rounded_after_they_are_added_up(tmp_path):
    ranks = on_two_ranks(halves_of, tmp_path)
    for kind, field in fields(None).items():
        for reduction in ("sum", "none"):
            pair = [x.requires_grad_() for x in collapsed_views()]
            field.loss(*pair, slice(0, 4 * ROWS), reduction=reduction).sum().backward()
            one = torch.cat([x.grad for x in pair], 1).double()
            name = f"{kind}, {reduction}"
            found = torch.cat([rank[name] for rank in ranks]).double() / 2
            assert float((found - one).abs().max()) <= 2**-8 * float(one.abs().max())
    for rank in ranks:
        assert rank["summed"].dtype == torch.bfloat16
    assert torch.equal(ranks[0]["summed"][0], torch.full((3,), 1 + 2**-8).bfloat16())


def test_without_a_process_group_keys_stay_what_they_are():
    keys = torch.ones(3, 2, requires_grad=True)
    found, offset = gather_keys(keys)
    assert found is keys
    assert offset == 0

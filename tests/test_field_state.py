"""What a field holds is its own: loaded, copied and moved whole, whatever mode it was made in."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from accuracy import DEVICE, sample_views
from ranks import on_two_ranks
from test_field_ops import initials, same_bytes

from rkdo_kernels import ResponseField

N, D = 6, 4
KINDS = {
    "dense": lambda **s: ResponseField.dense(N, **{"device": DEVICE, **s}),
    "dense bfloat16": lambda **s: ResponseField.dense(
        N, **{"dtype": torch.bfloat16, "device": DEVICE, **s}
    ),
    "snapshot": lambda **s: ResponseField.snapshot(N, D, history=2, **{"device": DEVICE, **s}),
}
GIVEN = ["identity", "labels", "neighbours"]
EVERY = torch.arange(N, device=DEVICE)
VIEWS = [list(sample_views(N, D, seed=seed).values()) for seed in range(2)]


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def ring(*steps):
    """Every sample's neighbours are those `steps` on, as CSR weights with N · len(steps) entries
    stored."""
    p = torch.zeros(N, N)
    for step in steps:
        p[torch.arange(N), (torch.arange(N) + step) % N] = 1
    return p.to_sparse_csr()


def uneven():
    """As many entries as ring(1, 2), but 3, 1 and 2 in a row."""
    p = torch.zeros(N, N)
    for i in range(N):
        p[i, : (3, 1, 2)[i % 3]] = 1
    return p.to_sparse_csr()


STARTS = {
    "labels": [torch.arange(N) % 2, torch.arange(N) // 2],
    "neighbours": [ring(1, 2), uneven()],
}


def train(field):
    results = []
    for pair in VIEWS:
        views = [x.clone().requires_grad_() for x in pair]
        loss = field.step(*views, EVERY, alpha=0.3)
        loss.backward()
        results += [loss.detach(), *(x.grad for x in views)]
    return [*results, field.block(EVERY), field.block(EVERY[1:4])]


@pytest.mark.parametrize("order", [1, -1], ids=["first into second", "second into first"])
@pytest.mark.parametrize("given", STARTS)
def test_a_field_that_has_loaded_another_is_the_other(given, order, make):
    """Also what follows from its tensors, such as how many neighbours a sample has at most."""
    one, two = (make(initial=initial) for initial in STARTS[given][::order])
    wanted, found = two.block(EVERY), one.block(EVERY)
    assert not torch.equal(found, wanted)
    one.load_state_dict(two.state_dict())
    assert torch.equal(one.block(EVERY), wanted)
    for x, y in zip(train(one), train(two), strict=True):
        assert torch.equal(x, y)


def through_a_file(field):
    file = io.BytesIO()
    torch.save(field, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda field: pickle.loads(pickle.dumps(field)),
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("given", STARTS)
def test_a_copy_goes_on_alone(given, copied, make):
    """It loads what another start was, and the field that it is a copy of stays as it is."""
    one, two = (make(initial=initial) for initial in STARTS[given])
    train(one)
    before = one.state_dict()
    other = COPIES[copied](one)
    same_bytes(other.state_dict(), before)
    other.load_state_dict(two.state_dict())
    assert torch.equal(other.block(EVERY), two.block(EVERY))
    train(other)
    same_bytes(one.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_labels_that_were_given_are_not_the_fields(dtype, make):
    labels = (torch.arange(N, device=DEVICE) % 2).to(dtype)
    given = labels.clone()
    field, other = make(initial=given), make(initial=1 - given)
    before = field.block(EVERY[:3])
    given.zero_()
    assert torch.equal(field.block(EVERY[:3]), before)
    given.copy_(labels)
    field.load_state_dict(other.state_dict())
    assert torch.equal(given, labels)


def copies_on_a_rank(rank, _):
    found = []
    for field in (
        ResponseField.dense(N, process_group=dist.group.WORLD),
        ResponseField.snapshot(N, D, history=2, process_group=dist.group.WORLD),
    ):
        other = copy.deepcopy(field)
        mine = slice(3 * rank, 3 * rank + 3)
        views = [x[mine].cpu() for x in VIEWS[0]]
        losses = [x.step(*views, torch.arange(N)[mine]) for x in (field, other)]
        found.append((*losses, field.state_dict(), other.state_dict()))
    return found


def test_copies_share_the_ranks_of_a_group(tmp_path):
    for results in on_two_ranks(copies_on_a_rank, tmp_path):
        for loss, of_copy, state, its_state in results:
            assert torch.equal(loss, of_copy)
            same_bytes(state, its_state)


# ---- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("way", ["made", "moved", "loaded", *COPIES])
def test_what_inference_mode_has_made_trains_outside(way, given, make):
    wanted = make(initial=initials(N)[given])
    with torch.inference_mode():
        field = make(initial=initials(N)[given])
        if way == "moved":
            field = field.to(DEVICE)
        elif way == "loaded":
            field.load_state_dict(wanted.state_dict())
        elif way != "made":
            field = COPIES[way](field)
    field.load_state_dict(wanted.state_dict())
    for x, y in zip(train(field), train(wanted), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("copied", COPIES)
def test_a_field_of_inference_tensors_is_mended_by_its_copy(copied, make):
    """Such as were saved before fields were made without them."""
    field = make(initial=initials(N)["labels"])
    with torch.inference_mode():
        state = field._state
        for name, x in state.tensors.items():
            state.tensors[name] = x.clone()
    other = COPIES[copied](field)
    train(other)
    train(field.to(DEVICE))
    same_bytes(other.state_dict(), field.state_dict())


def test_updates_in_inference_mode_and_outside_are_the_same(make):
    one, two = make(), make()
    with torch.inference_mode():
        losses = [one.step(*VIEWS[0], EVERY)]
    losses += [two.step(*VIEWS[0], EVERY)]
    assert torch.equal(*losses)
    for x, y in zip(train(one), train(two), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("copied", COPIES)
def test_another_default_device_changes_nothing(copied, given, make):
    def result(default):
        with torch.device(default):
            initial = initials(N)[given]
            field = COPIES[copied](make(initial=initial)).to(DEVICE)
            field.load_state_dict(make(initial=initial).state_dict())
            return train(field), field.state_dict(), repr(field), field.updates

    def initials(n):  # made where they are, whatever the default
        labels = torch.arange(n, device="cpu") % 2
        weights = torch.eye(n, device="cpu")
        weights[2] = 0  # an empty row
        weights[3] = 1
        return {"identity": "identity", "labels": labels, "neighbours": weights.to_sparse_csr()}

    found, wanted = result("meta"), result("cpu")
    for x, y in zip(found[0], wanted[0], strict=True):
        assert torch.equal(x, y)
    same_bytes(found[1], wanted[1])
    assert found[2:] == wanted[2:]


# ---- what is given -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_neighbours_weights_as_large_and_as_small_as_there_are(dtype, make):
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    p = torch.zeros(N, N, dtype=dtype)
    p[0, 1:3] = largest
    p[1, :] = largest
    p[2, 3], p[2, 4] = largest, largest / 4
    p[3, 4:] = least
    p[4, 5] = least
    wanted = torch.zeros(N, N, dtype=torch.float64)
    wanted[0, 1:3] = 1 / 2
    wanted[1, :] = 1 / N
    wanted[2, 3], wanted[2, 4] = 4 / 5, 1 / 5
    wanted[3, 4:] = 1 / 2
    wanted[4, 5] = wanted[5, 5] = 1
    field = make(initial=p.to_sparse_csr())
    tolerance = 4e-3 if "bfloat16" in repr(field) and field.kind == "dense" else 1e-7
    assert torch.allclose(field.block(EVERY).cpu().double(), wanted, rtol=0, atol=tolerance)


HUGE = [2**63, 10**400, 10**5000]


@pytest.mark.parametrize("value", HUGE, ids=["2**63", "10**400", "10**5000"])
def test_whole_numbers_that_no_tensor_has_are_refused_by_name(value):
    for name in ("n", "dim", "history"):
        with pytest.raises(ValueError, match=rf"^{name} must be below 2\*\*63, got"):
            ResponseField.snapshot(**{"n": 3, "dim": 2, "history": 1, name: value})
    with pytest.raises(ValueError, match=r"^seed must be below 4294967296, got"):
        ResponseField.dense(3, seed=value)
    with pytest.raises(ValueError, match=r"^n must be at least 1, got -"):
        ResponseField.dense(-value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_device_has_more_than_2_to_the_63_bytes(device):
    most = 2**63 - 1
    with pytest.raises(MemoryError, match=f"dense field of {most} samples has .* {device}"):
        ResponseField.dense(most, device=device)
    for sizes in ((most, 1, 1), (1, most, 1), (1, 1, most), (most, most, most)):
        with pytest.raises(MemoryError, match=f"snapshot field of {sizes[0]} samples.* {device}"):
            ResponseField.snapshot(*sizes[:2], history=sizes[2], device=device)

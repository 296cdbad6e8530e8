"""The reference against golden values: computed once in float64, by other code."""

import pytest
import torch
from accuracy import cast, evaluate
from golden_cases import CASES, LOSSES, golden_inputs, golden_truth, golden_weights, settings_of

from rkdo_kernels import reference

TOLERANCE = 1e-12


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_agrees_with_golden_values(case):
    found = evaluate(
        lambda **views: LOSSES[case["loss"]][1](**views, **settings_of(case)),
        cast(golden_inputs(case), torch.float64),
    )
    for name, true in golden_truth(case).items():
        scale = max(1, float(true.abs().max()))
        assert float((found[name] - true).abs().max()) <= TOLERANCE * scale, name


@pytest.mark.parametrize("case", [c for c in CASES if c.get("alpha") == 0], ids=str)
def test_one_hot_targets_have_the_gradient_of_cross_entropy(case):
    """alpha = 0: every p_t is I, and the loss is the sum of −log q_t at the positives."""
    inputs = cast(golden_inputs(case), torch.float64)
    found = evaluate(lambda **v: reference.rkdo_loss(**v, **settings_of(case)), inputs)
    queries, keys = inputs.values()
    s, depth = queries @ keys.T, case["depth"]
    d_s = torch.zeros_like(s)
    for t in range(1, depth + 1):
        c = 1 / (case["temperature"] * (1 - case["cooling"] * t / depth))
        d_s += c * (torch.softmax(c * s, 1) - torch.eye(len(s), dtype=s.dtype, device=s.device))
    d_s *= golden_weights(len(s), s.device)[:, None]
    assert float((found["queries"] - d_s @ keys).abs().max()) <= TOLERANCE
    assert float((found["keys"] - d_s.T @ queries).abs().max()) <= TOLERANCE


def test_nt_xent_is_the_softmax_over_all_other_keys():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    keys = torch.cat([queries, torch.randn(4, 3, generator=generator, dtype=torch.float64)])
    losses = reference.info_nce(
        queries, keys, temperature=0.3, exclude_self=True, positive_offset=4
    )
    for i in range(4):
        logits = torch.stack([queries[i] @ keys[j] / 0.3 for j in range(8) if j != i])
        wanted = logits.exp().sum().log() - queries[i] @ keys[i + 4] / 0.3
        assert abs(float(losses[i] - wanted)) <= TOLERANCE


def test_student_kernel_is_a_softmax_of_distances():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    distances = (queries[:, None] - keys).square().sum(2)
    q = (1 + distances) ** (-1 / 0.7)
    q = q / q.sum(1, keepdim=True)
    p = torch.full((5, 5), 0.2 / 5, dtype=torch.float64) + 0.8 * torch.eye(5, dtype=torch.float64)
    wanted = (p * (p / q).log()).sum(1)
    found = reference.icon_loss(queries, keys, temperature=0.7, debias=0.2, kernel="student")
    assert float((found - wanted).abs().max()) <= TOLERANCE


def test_moments_and_logsumexp_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(4, 3, generator=generator), torch.randn(6, 3, generator=generator)
    queries, keys = queries.double(), keys.double()
    moments = reference.similarity_moments(
        queries, keys, temperature=0.4, degree=2, bound=3.0, exclude_self=True
    )
    sums = reference.similarity_logsumexp(queries, keys, temperature=0.4, exclude_self=True)
    for i in range(4):
        s = torch.stack([queries[i] @ keys[j] for j in range(6) if j != i])
        for k in range(3):
            wanted = (torch.exp((s - 3.0) / 0.4) * (s / 3.0) ** k).sum()
            assert abs(float(moments[i, k] - wanted)) <= TOLERANCE
        assert abs(float(sums[i] - (s / 0.4).exp().sum().log())) <= TOLERANCE

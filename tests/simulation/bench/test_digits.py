"""The digits federation: its gradients are right, its drawings are kept apart, and a seed is all that it depends on."""

import torch
from torch.nn import functional

from simulation.bench.digits import NUM_SITES, activations, federation, gradient_factors


def test_gradient_factors_agree_with_autograd_record_by_record() -> None:
    data = federation(3, num_records=20)
    x_BI, y_B = data.x_KNI[0, :6], data.y_KN[0, :6]
    factors = gradient_factors(x_BI, y_B, data.start)
    for record in range(6):
        layers = [layer.clone().requires_grad_() for layer in data.start]
        loss = functional.cross_entropy(activations(x_BI[record : record + 1], layers)[-1], y_B[record : record + 1])
        for (u, v), slow in zip(factors, torch.autograd.grad(loss, layers), strict=True):
            torch.testing.assert_close(torch.outer(u[record], v[record]), slow)


def test_seed_decides_everything_and_another_seed_is_another_federation() -> None:
    one, same, other = federation(0, num_records=30), federation(0, num_records=30), federation(1, num_records=30)
    assert torch.equal(one.x_KNI, same.x_KNI)
    assert all(torch.equal(a, b) for a, b in zip(one.start, same.start, strict=True))
    assert one.x_KNI.shape == (NUM_SITES, 30, 64)
    assert not torch.equal(one.x_KNI, other.x_KNI)


def test_shares_of_classes_are_those_of_the_records() -> None:
    data = federation(0, num_records=50)
    assert torch.allclose(data.share_KC.sum(1), torch.ones(NUM_SITES, dtype=torch.float64))
    assert data.share_KC[2, 7] == (data.y_KN[2] == 7).double().mean()

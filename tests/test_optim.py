import pytest
import torch
from torch import nn

from m2t_accel.optim import LARS, create_optimizer, set_learning_rate


def lars_by_hand(weight, gradients, lr, momentum, decay, eta, adapt):
    """Compute LARS by its formula, one tensor at a time in plain arithmetic."""
    buffer = torch.zeros_like(weight)
    for gradient in gradients:
        rate = lr
        w, g = weight.pow(2).sum().sqrt().item(), gradient.pow(2).sum().sqrt().item()
        if adapt and w * g > 1e-8:
            rate = lr * eta * w / (g + decay * w)
        buffer = momentum * buffer + rate * (gradient + decay * weight)
        weight = weight - buffer
    return weight


@pytest.mark.parametrize("adapt", [True, False])
def test_lars_equals_the_formula(adapt):
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)]  # zero: plain rate
    gradients = [[torch.randn_like(w) for _ in range(3)] for w in weights]
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = LARS([{"params": parameters, "adapt": adapt}], lr=0.5, momentum=0.9, weight_decay=1e-2)
    for step in range(3):
        for parameter, own in zip(parameters, gradients, strict=True):
            parameter.grad = own[step].clone()
        optimizer.step()
    for parameter, weight, own in zip(parameters, weights, gradients, strict=True):
        expected = lars_by_hand(weight, own, 0.5, 0.9, 1e-2, 1e-3, adapt)
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-14)


def test_lars_leaves_gradients_and_absent_ones_alone():
    with_gradient, without = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    with_gradient.grad = torch.ones(2, 2)
    LARS([with_gradient, without], lr=0.1).step()
    assert torch.equal(with_gradient.grad, torch.ones(2, 2))
    assert torch.equal(without, torch.ones(2, 2))


def test_lars_groups_and_frozen_parameters():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    adapted, plain = create_optimizer(module, "lars", 0.1, 0.9, 1e-6).param_groups
    assert [p.shape for p in adapted["params"]] == [(4, 3, 3, 3), (2, 4)]
    assert [p.shape for p in plain["params"]] == [(4,), (4,), (2,)]
    assert (adapted["adapt"], plain["adapt"]) == (True, False)
    assert adapted["weight_decay"] == plain["weight_decay"] == 1e-6


def test_learning_rate_reaches_every_group():
    optimizer = create_optimizer(nn.Linear(2, 2), "lars", 0.1, 0.9, 0.0)
    set_learning_rate(optimizer, 0.7)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.7]


def test_the_momentum_buffer_is_saved_and_loaded():
    def train(optimizer, parameter, steps):
        for _ in range(steps):
            parameter.grad = torch.full_like(parameter, 0.3)
            optimizer.step()

    whole = nn.Parameter(torch.ones(2, 2))
    train(LARS([whole], lr=0.1), whole, 4)
    parameter = nn.Parameter(torch.ones(2, 2))
    first = LARS([parameter], lr=0.1)
    train(first, parameter, 2)
    second = LARS([parameter], lr=0.1)
    second.load_state_dict(first.state_dict())
    train(second, parameter, 2)
    assert torch.equal(parameter, whole)

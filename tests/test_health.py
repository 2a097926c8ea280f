"""The figures of one step against plain formulas, in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional

from m2t_accel.config.recipes import build_config
from m2t_accel.health import effective_rank, share_of_way, statistics_distance
from m2t_accel.model import Teacher, create_encoder, create_student
from m2t_accel.momentum_norm import momentum_layers
from m2t_accel.optim import create_optimizer
from m2t_accel.step import TrainingStep

CONFIG = build_config({"recipe": "digits", "epochs": 2, "warmup_epochs": 1})
STEPS_PER_EPOCH = 4


def rank_of(matrix):
    """RankMe as the paper writes it, from singular values."""
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values / values.sum() + 1e-7
    return math.exp(-sum(share * math.log(share) for share in shares))


@pytest.mark.parametrize(("num_images", "size"), [(40, 7), (7, 40), (8, 8), (2, 2)])
def test_effective_rank_is_that_of_the_singular_values(num_images, size):
    torch.manual_seed(0)
    embeddings = functional.normalize(torch.randn(num_images, size) * torch.arange(1, size + 1), dim=1)
    assert effective_rank(embeddings) == pytest.approx(rank_of(embeddings.double().numpy()), rel=1e-6)


@pytest.mark.parametrize(
    ("embeddings", "rank"),
    [(torch.ones(6, 4) / 2, 1), (torch.eye(5), 5), (torch.eye(3).repeat(4, 1), 3), (torch.eye(2, 9), 2)],
)
def test_effective_rank_of_known_matrices(embeddings, rank):
    assert effective_rank(embeddings) == pytest.approx(rank, rel=2e-5)


@pytest.mark.parametrize(
    ("mean", "variance", "history_mean", "history_variance", "distance"),
    [
        (1.0, 4.0, 1.0, 4.0, 0.0),
        (3.0, 4.0, 1.0, 4.0, 1.0),  # by one standard deviation of the history
        (1.0, 4.0, 1.0, 1.0, math.log(2)),
        (1.0, 1.0, 1.0, 4.0, math.log(2)),
        (0.0, 1.0, 1.0, 4.0, 0.5 + math.log(2)),
    ],
)
def test_distance_of_statistics(mean, variance, history_mean, history_variance, distance):
    batch, history = (torch.tensor([[m], [v]]) for m, v in ((mean, variance), (history_mean, history_variance)))
    assert statistics_distance(batch, history, eps=0.0).item() == pytest.approx(distance, abs=1e-6)
    # The unit of a channel does not matter.
    two = [torch.cat([each, each * torch.tensor([[10.0], [100.0]])], dim=1) for each in (batch, history)]
    assert statistics_distance(*two, eps=0.0).tolist() == pytest.approx([distance, distance], abs=1e-6)


def test_share_of_the_way():
    start, goal = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([2.0, 0.0, 5.0])
    for share in (0.0, 0.3, 1.0):
        assert share_of_way(start, torch.lerp(start, goal, share), goal).item() == pytest.approx(share, abs=1e-6)


def norm(tensors):
    return math.sqrt(sum((tensor**2).sum().item() for tensor in tensors))


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("sgd", 0.0), ("lars", 0.9)])
def test_figures_of_a_step(optimizer, momentum):
    torch.manual_seed(0)
    student = create_student(create_encoder("resnet10-quarter"), 32, hidden_size=16, projection_size=8).double()
    rates = create_optimizer(student, optimizer, 0.1, momentum=momentum, weight_decay=0.01)
    step = TrainingStep(student, Teacher(student), rates, Accelerator(cpu=True))
    gradients = {}
    for name, parameter in step.student.named_parameters():
        gradients[name] = 0
        parameter.register_hook(lambda gradient, name=name: gradients.update({name: gradients[name] + gradient}))
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        for name in gradients:
            gradients[name] = 0
        before, teacher_before = copy.deepcopy(step.student.state_dict()), copy.deepcopy(step.teacher.state_dict())
        now = CONFIG.schedule(number + 2, STEPS_PER_EPOCH)
        step.begin(now, measures_health=True)
        views = torch.randn(4, 6, 3, 32, 32, dtype=torch.float64, generator=generator)
        views[3, :2] = views[2, :2]  # two of six images of the second sub-batch
        for first, second in (views[:2], views[2:]):
            step.forward_backward(first, second)
        step.update(now)
    figures = {name: value.item() for name, value in step.health.figures.items()}
    weights = {name: weight.detach() for name, weight in step.student.named_parameters()}
    update = norm([weights[name] - before[name] for name in weights])
    shared = [name for name, _ in step.teacher.named_parameters()]
    teacher = step.teacher.state_dict()
    expected = {
        "gradient_norm": norm(gradients.values()),
        "update_norm": update,
        "update_ratio": update / norm(weights.values()),
        "teacher_distance": norm([teacher[name] - weights[name] for name in shared])
        / norm([weights[name] for name in shared]),
        "teacher_moved": 1 - now.weight_momentum,
        "statistics_moved": now.statistics_momentum,
    }
    assert figures == pytest.approx(expected, rel=1e-9)
    assert [share.item() for share in step.health.same_views] == pytest.approx([0, 1 / 3])
    assert [len(embeddings) for embeddings in step.health.embeddings] == [6, 6]
    layers = [name for name, layer in step.teacher.named_modules() if layer in momentum_layers(step.teacher)]
    assert len(step.health.layers) == len(layers)
    for name, distance in zip(layers, step.health.layers.tolist(), strict=True):
        old, new = (
            [state[f"{name}.running_{kind}"] for kind in ("mean", "var")] for state in (teacher_before, teacher)
        )
        mean, variance = (o + (n - o) / now.statistics_momentum for o, n in zip(old, new, strict=True))
        std, old_std = (variance + 1e-5).sqrt(), (old[1] + 1e-5).sqrt()
        plain = ((mean - old[0]).abs() / old_std + (std / old_std).log().abs()).mean()
        assert distance == pytest.approx(plain.item(), rel=1e-9)


def test_a_step_without_health_measures_nothing():
    torch.manual_seed(0)
    student = create_student(create_encoder("resnet10-quarter"), 32, hidden_size=16, projection_size=8)
    step = TrainingStep(
        student, Teacher(student), create_optimizer(student, "sgd", 0.1, 0.9, 0.0), Accelerator(cpu=True)
    )
    now = CONFIG.schedule(0, STEPS_PER_EPOCH)
    for measures in (True, False):
        step.begin(now, measures)
        step.forward_backward(*torch.randn(2, 4, 3, 32, 32))
        step.update(now)
        assert (step.health is not None) == measures

import copy
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator

from m2t_accel.config.recipes import build_config
from m2t_accel.model import Teacher, create_encoder, create_student, embed
from m2t_accel.optim import create_optimizer
from m2t_accel.step import HostCopy, TrainingStep

CONFIG = build_config({"recipe": "digits", "epochs": 2, "warmup_epochs": 1})
STEPS_PER_EPOCH = 4


def training_step():
    torch.manual_seed(0)
    student = create_student(create_encoder("resnet10-quarter"), image_size=32, hidden_size=16, projection_size=8)
    student = student.double()
    optimizer = create_optimizer(student, "sgd", 0.1, momentum=0.9, weight_decay=1e-4)
    return TrainingStep(student, Teacher(student), optimizer, Accelerator(cpu=True))


def views(seed):
    return torch.randn(2, 6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return (a * b).sum(dim=1) / a.norm(dim=1) / b.norm(dim=1)


def test_each_prediction_meets_the_target_of_the_other_view():
    step = training_step()
    student, teacher = copy.deepcopy(step.student), copy.deepcopy(step.teacher)
    view_1, view_2 = views(1)
    p1, p2 = (student.predictor(student.projector(embed(student.encoder, view))) for view in (view_1, view_2))
    z1, z2 = (teacher.projector(embed(teacher.encoder, view)) for view in (view_1, view_2))
    crossed = (4 - 2 * (cosine(p1, z2) + cosine(p2, z1))).mean()
    same_view = (4 - 2 * (cosine(p1, z1) + cosine(p2, z2))).mean()
    step.begin(CONFIG.schedule(0, STEPS_PER_EPOCH))
    loss = step.forward_backward(view_1, view_2).loss
    assert loss.item() == pytest.approx(crossed.item(), abs=1e-12)
    assert abs(loss.item() - same_view.item()) > 1e-3


def test_nothing_moves_before_the_update_and_then_everything_does():
    step = training_step()
    now = CONFIG.schedule(3, STEPS_PER_EPOCH)

    def state():
        networks = {"student": step.student, "teacher": step.teacher}
        return {
            f"{owner}.{name}": tensor.clone()
            for owner, network in networks.items()
            for name, tensor in network.state_dict().items()
            if owner == "teacher" or name in dict(network.named_parameters())
        }

    before = state()
    step.begin(now)
    result = step.forward_backward(*views(2))
    assert result.loss_on_host.item() == result.loss.item()
    assert all(tensor.equal(before[name]) for name, tensor in state().items())
    step.update(now)
    after = state()
    assert [name for name, tensor in after.items() if tensor.equal(before[name])] == []
    student, teacher = dict(step.student.named_parameters()), dict(step.teacher.named_parameters())
    for name, weight in teacher.items():
        expected = now.weight_momentum * before[f"teacher.{name}"] + (1 - now.weight_momentum) * student[name]
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)


def everything(step):
    """Return all tensors that a step may move: weights, statistics, buffers that no checkpoint holds, momentum."""
    networks = {"student": step.student, "teacher": step.teacher}
    found = {
        f"{owner}.{name}": tensor.detach().clone()
        for owner, network in networks.items()
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
        if "statistics_momentum" not in name  # set at the start of each step
    }
    for i, state in enumerate(step.optimizer.state.values()):
        found[f"momentum.{i}"] = state["momentum_buffer"].clone()
    return found


def scaled_step(scale, fused=False):
    """Return a training step in float32 whose gradients are scaled as for float16."""
    torch.manual_seed(0)
    student = create_student(create_encoder("resnet10-quarter"), image_size=32, hidden_size=16, projection_size=8)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = create_optimizer(student, "sgd", 0.1, momentum=0.9, weight_decay=1e-4, fused=fused)
    return TrainingStep(student, Teacher(student), optimizer, accelerator)


def test_a_fused_optimizer_is_refused_where_gradients_are_scaled():
    """With one, torch reports no skipped step: the teacher would follow a student that has not moved."""
    with pytest.raises(ValueError, match="fused=None"):
        scaled_step(scale=64.0, fused=True)


@pytest.mark.parametrize("overflows", ["forward", "gradient"])
def test_a_step_that_overflows_moves_nothing_but_the_scale(overflows):
    step, smooth = scaled_step(scale=64.0), scaled_step(scale=32.0)

    def train(step, number, scale=1.0):
        now = CONFIG.schedule(number, STEPS_PER_EPOCH)
        step.begin(now, measures_health=True)
        results = [step.forward_backward(*(scale * views(seed).float())) for seed in (2 * number, 2 * number + 1)]
        return step.update(now), [result.loss.item() for result in results]

    assert train(step, 0)[0]
    assert train(smooth, 0)[0]
    before = everything(step)
    if overflows == "forward":
        moved, losses = train(step, 1, scale=float("inf"))
        assert not any(loss == loss for loss in losses)
    else:
        hook = step.student.predictor[0].weight.register_hook(lambda gradient: gradient * float("inf"))
        moved, losses = train(step, 1)
        hook.remove()
        assert all(0 < loss < 8 for loss in losses)
    assert not moved
    assert step.health is None, "a step that moves nothing has no health to report"
    assert step.accelerator.scaler.get_scale() == 32
    after = everything(step)
    assert [name for name, tensor in after.items() if not tensor.equal(before[name])] == []
    # The next step is that of a run without the overflow.
    assert train(step, 1) == train(smooth, 1)
    expected = everything(smooth)
    assert [name for name, tensor in everything(step).items() if not tensor.equal(expected[name])] == []


class OnMps(torch.Tensor):
    """A tensor that says it is on another accelerator than a CUDA GPU, and records the copies made of it."""

    copies: ClassVar[list] = []

    @property
    def device(self):
        return torch.device("mps")

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        if function is torch.Tensor.copy_:
            cls.copies.append(keywords)
        return super().__torch_function__(function, types, arguments, keywords or {})


def test_a_copy_in_main_memory_is_complete_on_accelerators_without_cuda():
    OnMps.copies.clear()
    copy = HostCopy(torch.tensor(2.5).as_subclass(OnMps))
    assert OnMps.copies == [{"non_blocking": False}]
    assert copy.item() == 2.5

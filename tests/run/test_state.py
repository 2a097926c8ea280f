"""Tests of the state of a run: a copy is restored bit for bit, on any number of processes."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from m2t_accel.model import Student, Teacher
from m2t_accel.optim import create_optimizer
from m2t_accel.run.state import RunState, copy_tensors, get_random_state, in_device_order, set_random_state
from m2t_accel.schedules import Schedule
from m2t_accel.step import TrainingStep


class Encoder(nn.Module):
    """A small encoder with dropout, which draws random numbers."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)

    def forward(self, pixel_values):
        return self.dropout(self.norm(self.convolution(pixel_values))).mean(dim=(2, 3))


def build(optimizer="sgd", seed=0):
    """Return a training step, and the state of its run."""
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    student = Student(Encoder(), 8, 16, 4)
    step = TrainingStep(student, Teacher(student), create_optimizer(student, optimizer, 0.1, 0.9, 1e-3), accelerator)
    return step, RunState(step.student, step.teacher, step.optimizer, accelerator)


def train(step, num_steps):
    """Train on random views. Return the losses."""
    losses = []
    for _ in range(num_steps):
        now = Schedule(learning_rate=0.1, statistics_momentum=0.4, weight_momentum=0.9)
        step.begin(now)
        losses.append(step.forward_backward(*torch.randn(2, 6, 3, 8, 8)).loss.item())
        step.update(now)
    return losses


def deep_copy(files):
    return {file: {name: tensor.clone() for name, tensor in tensors.items()} for file, tensors in files.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_restored_state_trains_on_bit_for_bit(optimizer):
    step, one = build(optimizer)
    train(step, 3)
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    files = deep_copy(one.copy(rows))
    losses = train(step, 3)
    other_step, other = build(optimizer, seed=1)
    train(other_step, 1)
    found, _ = other.restore(files, {"num_processes": 1, "gradient_scaler": None})
    assert torch.equal(torch.stack(found), torch.stack(rows))
    momentum = other.optimizer.state[other.student.encoder.convolution.weight]["momentum_buffer"]
    assert momentum.stride() == other.student.encoder.convolution.weight.stride()
    assert train(other_step, 3) == losses, "weights, statistics, momentum and the random numbers of dropout"
    ends = [state.copy([]) for state in (one, other)]
    for file, tensors in ends[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, ends[1][file][name]), f"{file}: {name}"


def test_the_positions_in_a_stream_are_restored():
    step, state = build()
    train(step, 1)
    manifest, positions = {"num_processes": 1, "gradient_scaler": None}, torch.tensor([[3, 40], [-1, -1]])
    _, found = state.restore(deep_copy(state.copy([], positions)), manifest)
    assert found.equal(positions)
    assert state.restore(deep_copy(state.copy([])), manifest) == ([], None)


def test_training_does_not_change_a_copy():
    step, state = build()
    train(step, 2)
    files = state.copy([torch.tensor([1.0, 2.0])])
    before = deep_copy(files)
    train(step, 2)
    for file, tensors in before.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, files[file][name]), f"{file}: {name}"


def test_a_copy_from_an_accelerator_without_cuda_is_complete_when_it_returns(monkeypatch):
    _, state = build()
    state.accelerator = SimpleNamespace(device=torch.device("mps"))
    copy, waited = torch.Tensor.copy_, []

    def record(self, source, non_blocking=False):
        waited.append(not non_blocking)
        return copy(self, source, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", record)
    state.copy([])
    assert waited
    assert all(waited)


def test_copies_reuse_their_memory():
    step, state = build()
    train(step, 1)
    first = {name: tensor.data_ptr() for name, tensor in state.copy([])["student"].items()}
    assert first == {name: tensor.data_ptr() for name, tensor in state.copy([])["student"].items()}


def test_tensors_of_another_network_are_refused():
    _, state = build()
    files = deep_copy(state.copy([]))
    files["teacher"]["encoder.convolution.weight"] = torch.zeros(8, 3, 5, 5)
    with pytest.raises(ValueError, match=r"1 tensor .*encoder\.convolution"):
        state.restore(files, {"num_processes": 1})
    with pytest.raises(ValueError, match=r"2 tensors .* a$"):
        copy_tensors({"b": torch.ones(1)}, {"a": torch.ones(1)})


def test_random_generators_are_restored():
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    random.gauss(0, 1), np.random.randn()  # both generate two numbers and keep the second
    state = get_random_state()
    numbers = random.gauss(0, 1), random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist()
    set_random_state(state)
    assert numbers == (random.gauss(0, 1), random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist())


@pytest.mark.parametrize("saved", [1, 2, 4])
@pytest.mark.parametrize("restored", [1, 2, 4])
def test_rows_belong_to_the_same_virtual_devices_on_any_number_of_processes(saved, restored):
    steps, devices = 3, 4
    number = torch.arange(steps * devices, dtype=torch.float64).reshape(steps, devices)

    def rows_of(process, processes):  # processes take the virtual devices in turn
        return torch.stack([number[:, process::processes].flatten()] * 2, dim=1)

    whole = in_device_order([rows_of(process, saved) for process in range(saved)])
    for process in range(restored):
        assert torch.equal(whole[process::restored], rows_of(process, restored))

"""The step as trained, with all that makes it fast, computes what the paper says: compared with a plain step.

The plain step has Python loops over the parameters, BatchNorm by its formula, contiguous tensors and no operator in
place. It shares only `mlp`, `embed` and the encoder's code with the step under test.
"""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import nn
from torch.nn import functional
from transformers import AutoModel, ResNetConfig

from m2t_accel.config.recipes import build_config
from m2t_accel.model import Student, Teacher, embed, mlp
from m2t_accel.momentum_norm import momentum_layers
from m2t_accel.optim import create_optimizer
from m2t_accel.step import TrainingStep

# A small learning rate: a large one would make the differences grow chaotically, in two plain runs as well.
CONFIG = build_config({"recipe": "digits", "epochs": 4, "warmup_epochs": 1, "learning_rate_per_256": 0.1})
STEPS, STEPS_PER_EPOCH, SUB_BATCHES, N, SIZE = 20, 5, 2, 8, 16


def encoder():
    torch.manual_seed(0)
    return AutoModel.from_config(ResNetConfig(depths=[1], hidden_sizes=[32], embedding_size=8))


class PaperNorm(nn.Module):
    """BatchNorm with momentum statistics, by the formula."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.alpha, self.seen = layer, 1.0, []

    def forward(self, x):
        layer, dtype, shape = self.layer, x.dtype, (1, -1) + (1,) * (x.dim() - 2)
        x = x.to(layer.running_mean.dtype)
        rows = x.transpose(0, 1).flatten(1)
        mean = rows.mean(dim=1)
        var = ((rows - mean[:, None]) ** 2).sum(dim=1) / (rows.shape[1] - 1)
        self.seen.append((mean, var))
        mean = self.alpha * mean + (1 - self.alpha) * layer.running_mean
        var = self.alpha * var + (1 - self.alpha) * layer.running_var
        x = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + layer.eps)
        return (x * layer.weight.view(shape) + layer.bias.view(shape)).to(dtype)

    def commit(self):
        for history, values in zip(
            (self.layer.running_mean, self.layer.running_var), zip(*self.seen, strict=True), strict=True
        ):
            history.copy_(self.alpha * sum(values) / len(values) + (1 - self.alpha) * history)
        self.seen.clear()


def with_paper_norms(module):
    for name, child in module.named_children():
        is_norm = isinstance(child, nn.modules.batchnorm._BatchNorm)
        setattr(module, name, PaperNorm(child) if is_norm else with_paper_norms(child))
    return module


def in_precision(forward, dtype):
    """Compute as Accelerate does under mixed precision; without a dtype, as it is."""
    return forward if dtype is None else ConvertOutputsToFp32(torch.autocast("cpu", dtype)(forward))


class PlainStep:
    """Student, teacher and SGD as the paper writes them."""

    def __init__(self, dtype, autocast=None, optimizer="sgd"):
        self.networks = [encoder(), mlp(32, 16, 8), mlp(8, 16, 8)]
        for network in self.networks:
            network.to(dtype).train()
        self.teacher = [with_paper_norms(copy.deepcopy(network)) for network in self.networks[:2]]
        self.norms = [m for network in self.teacher for m in network.modules() if isinstance(m, PaperNorm)]
        self.weights = [p for network in self.networks for p in network.parameters()]
        self.buffers = [torch.zeros_like(p) for p in self.weights]
        self.student_forward = in_precision(lambda view: self.unit(self.networks, view), autocast)
        self.teacher_forward = in_precision(lambda view: self.unit(self.teacher, view), autocast)
        self.optimizer = optimizer

    def unit(self, networks, view):
        out = embed(networks[0], view)
        for network in networks[1:]:
            out = network(out)
        return functional.normalize(out, dim=1)

    def rate(self, weight, now):
        """The learning rate of a weight; LARS adapts it to that of matrices and convolutions."""
        if self.optimizer == "sgd" or weight.dim() == 1 or not weight.norm() * weight.grad.norm() > 1e-8:
            return now.learning_rate
        ratio = weight.norm() / (weight.grad.norm() + CONFIG.weight_decay * weight.norm())
        return now.learning_rate * 1e-3 * ratio

    def __call__(self, now, sub_batches):
        losses = []
        for norm in self.norms:
            norm.alpha = now.statistics_momentum
        for view_1, view_2 in sub_batches:
            q1, q2 = self.student_forward(view_1), self.student_forward(view_2)
            with torch.no_grad():
                k1, k2 = self.teacher_forward(view_1), self.teacher_forward(view_2)
            loss = sum(2 - 2 * (q * k).sum(dim=1) for q, k in ((q1, k2), (q2, k1))).mean()
            (loss / len(sub_batches)).backward()
            losses.append(loss.item())
        with torch.no_grad():
            for weight, buffer in zip(self.weights, self.buffers, strict=True):
                rate, update = self.rate(weight, now), weight.grad + CONFIG.weight_decay * weight
                if self.optimizer == "lars":
                    buffer.copy_(0.9 * buffer + rate * update)
                    weight -= buffer
                else:
                    buffer.copy_(0.9 * buffer + update)
                    weight -= rate * buffer
                weight.grad = None
            for norm in self.norms:
                norm.commit()
            m = now.weight_momentum
            for mine, network in zip(self.teacher, self.networks, strict=False):
                for weight, other in zip(mine.parameters(), network.parameters(), strict=True):
                    weight.copy_(m * weight + (1 - m) * other)
        return losses

    def state(self):
        history = [t for norm in self.norms for t in (norm.layer.running_mean, norm.layer.running_var)]
        return [*self.weights, *(p for network in self.teacher for p in network.parameters()), *history]


class FastStep:
    """The production step, on one process."""

    def __init__(self, dtype, autocast=None, optimizer="sgd", backend=None):
        student = Student(encoder(), 32, 16, 8)
        student.to(dtype)
        rates = create_optimizer(student, optimizer, 0.1, CONFIG.optimizer_momentum, CONFIG.weight_decay)
        self.step = step = TrainingStep(student, Teacher(student), rates, Accelerator(cpu=True))
        step.accelerator.gradient_accumulation_steps = SUB_BATCHES
        if backend is not None:
            step.student_forward = torch.compile(step.student_forward, backend=backend)
            step.teacher_forward = torch.compile(step.teacher_forward, backend=backend)
        step.accelerator.accumulate = lambda network: step.accelerator.no_sync(network)
        step.student_forward = in_precision(step.student_forward, autocast)
        step.teacher_forward = in_precision(step.teacher_forward, autocast)

    def __call__(self, now, sub_batches):
        self.step.begin(now)
        views = [[view.contiguous(memory_format=torch.channels_last) for view in pair] for pair in sub_batches]
        losses = [self.step.forward_backward(*pair).loss.item() for pair in views]
        self.step.update(now)
        return losses

    def state(self):
        student, teacher = self.step.student, self.step.teacher
        history = [t for layer in momentum_layers(teacher) for t in (layer.running_mean, layer.running_var)]
        return [*student.parameters(), *teacher.parameters(), *history]


def train(step, dtype=torch.float32, permutation=None, steps=STEPS):
    """Return the losses (steps, sub-batches) and the final state. The order of the images must not matter."""
    generator, losses = torch.Generator().manual_seed(1), []
    for number in range(steps):
        # Two views of the same images: they differ by noise.
        images = torch.randn(SUB_BATCHES, 1, N, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
        noise = torch.randn(SUB_BATCHES, 2, N, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
        sub_batches = (images + noise / 2).to(dtype)
        if permutation is not None:
            sub_batches = sub_batches[:, :, permutation]
        losses.append(step(CONFIG.schedule(number, STEPS_PER_EPOCH), sub_batches))
    return torch.tensor(losses, dtype=torch.float64), [tensor.detach().double() for tensor in step.state()]


def difference(one, other):
    """The largest difference of the losses, and of the norm of a tensor of the state, as a share of its norm."""
    shares = [(a - b).norm() / b.norm().clamp(min=1e-3) for a, b in zip(one[1], other[1], strict=True)]
    return (one[0] - other[0]).abs().max().item(), max(shares).item()


@pytest.mark.parametrize(
    ("optimizer", "dtype", "bound"),
    [
        ("sgd", torch.float32, 1e-5),
        pytest.param("lars", torch.float32, 1e-5, marks=pytest.mark.slow),
        pytest.param("sgd", torch.float64, 1e-11, marks=pytest.mark.slow),
        pytest.param("lars", torch.float64, 1e-11, marks=pytest.mark.slow),
    ],
)
def test_the_fast_step_computes_the_plain_step(optimizer, dtype, bound):
    plain = train(PlainStep(dtype, optimizer=optimizer), dtype)
    fast = train(FastStep(dtype, optimizer=optimizer), dtype)
    assert plain[0][0].mean() > plain[0][-1].mean() + 0.1, "the run does not learn"
    losses, state = difference(fast, plain)
    assert losses < bound
    assert state < 10 * bound


@pytest.mark.slow
def test_the_fast_step_in_bf16_is_within_the_spread_of_plain_runs():
    """Runs of one step that differ only in the order of the images, and so in the rounding, are as far from each other.

    A CPU with bf16 instructions adds in another order where channels are last, so runs of either step count.
    """
    orders = [None, *(torch.randperm(N, generator=torch.Generator().manual_seed(seed)) for seed in range(2))]
    plain, fast = (
        [train(create(torch.float32, torch.bfloat16), permutation=order)[0] for order in orders]
        for create in (PlainStep, FastStep)
    )
    spread = max((one - other).abs().mean() for runs in (plain, fast) for one in runs for other in runs)
    assert spread > 1e-4, "autocast was off"
    assert min((fast[0] - one).abs().mean() for one in plain) <= spread


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_compiled_step_computes_the_eager_one_and_compiles_once(backend):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    step, graphs = FastStep(torch.float32, backend=backend), []

    def counted(*arguments):
        losses = step(*arguments)
        graphs.append(counters["stats"]["unique_graphs"])
        return losses

    counted.state = step.state
    compiled, eager = train(counted), train(FastStep(torch.float32))
    losses, state = difference(compiled, eager)
    assert losses < 1e-5
    assert state < 1e-4
    assert graphs[0] == graphs[-1], "a new value of the schedule has compiled again"

"""One step on fake CUDA tensors: devices, dtypes, memory formats, and what would wait for the GPU."""

import contextlib

import pytest
import torch
from fake_cuda import Transfers, fake_cuda, is_supported, put_on_cuda
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import ResNetConfig, ResNetModel

from m2t_accel import step as step_module
from m2t_accel.config.recipes import build_config
from m2t_accel.data.crops import Photometry
from m2t_accel.data.photometry import evaluation_view, flipped_view, photometry_batched
from m2t_accel.evaluation.features import Features
from m2t_accel.evaluation.heads import Heads
from m2t_accel.evaluation.knn import find_nearest, knn_accuracy
from m2t_accel.model import Student, Teacher, embed
from m2t_accel.momentum_norm import momentum_layers
from m2t_accel.optim import create_optimizer
from m2t_accel.step import TrainingStep

pytestmark = pytest.mark.skipif(not is_supported(), reason="this torch has no fake CUDA tensors")
CONFIG = build_config({"recipe": "8x2080Ti-b256-100ep", "dataset": "digits", "image_size": 32})
N = 4


class FakeAccelerator:
    """Does what Accelerate does to a step under mixed precision, but for the backward, which needs a real GPU."""

    scaler = None

    def __init__(self, dtype):
        self.dtype = dtype
        self.mixed_precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

    def prepare(self, student, optimizer):
        optimizer.step_was_skipped = False
        return self.prepare_model(student), optimizer

    def prepare_model(self, network, evaluation_mode=False):
        forward = network.forward

        def with_autocast(*views):
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", self.dtype)
            try:
                return tuple(out.float() for out in forward(*views))
            finally:
                torch.set_autocast_enabled("cuda", False)
                torch.clear_autocast_cache()

        network.forward = with_autocast
        return network

    def unwrap_model(self, network, keep_torch_compile):
        return network

    def accumulate(self, network):
        self.network = network
        return contextlib.nullcontext()

    def backward(self, loss):
        assert loss.dtype == torch.float32, f"the loss is {loss.dtype}"
        assert loss.device.type == "cuda"
        for parameter in self.network.parameters():
            parameter.grad = torch.empty_like(parameter)


class FakeHostCopy:
    """Stands for the copy of the loss into pinned memory, which nothing waits for."""

    def __init__(self, scalar):
        assert scalar.device.type == "cuda"


def small_encoder():
    return ResNetModel(ResNetConfig(depths=[1, 1], hidden_sizes=[16, 32], embedding_size=8, layer_type="bottleneck"))


def check_convolutions(network, dtype):
    """Fail if a convolution does not get and return channels_last tensors in the dtype of autocast."""

    def check(layer, args, out):
        for name, tensor in (("input", args[0]), ("weight", layer.weight), ("output", out)):
            assert tensor.is_contiguous(memory_format=torch.channels_last), f"{name} of {layer} is not channels_last"
        assert out.dtype == dtype, f"{layer} computes in {out.dtype}"
        assert args[0].dtype == dtype, f"autocast copies the input of {layer}"

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(check)


def train_one_step(optimizer="sgd", dtype=torch.bfloat16, fault=lambda step: None):
    """Take a step by the production code, with `fault` planted in it. Return the lines that wait for the GPU."""
    student = Student(small_encoder(), 32, 16, 8)
    rates = create_optimizer(student, optimizer, 0.1, momentum=0.9, weight_decay=1e-4)
    mode = FakeTensorMode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "HostCopy", FakeHostCopy)
        teacher = Teacher(student)
        accelerator = FakeAccelerator(dtype)
        step = TrainingStep(student, teacher, rates, accelerator)
        for network in (student, teacher):
            check_convolutions(network, dtype)
            put_on_cuda(network, mode)
        for group in rates.param_groups:  # as Accelerate does when it moves the parameters
            group["params"] = [p for p in student.parameters() if group.get("adapt", p.dim() > 1) == (p.dim() > 1)]
        if optimizer == "sgd":
            rates.param_groups[0]["params"] = list(student.parameters())
        with fake_cuda(mode), Transfers() as transfers:
            fault(step)
            for number in range(2):  # the second step finds the state of the first
                now = CONFIG.schedule(number, 2)
                step.begin(now, measures_health=number == 1)
                crops = torch.zeros(2 * N, 32, 32, 3, dtype=torch.uint8, device="cuda")
                views = photometry_batched(crops, parameters(), CONFIG).to(step.view_dtype)
                for _ in range(2):  # two sub-batches
                    result = step.forward_backward(*views.chunk(2))
                step.update(now)
            check_state(step, result)
    return transfers.lines


def parameters():
    shapes = {"factors": (2 * N, 4), "order": (2 * N, 4)}
    dtypes = {"order": torch.int64, "factors": torch.float32, "sigma": torch.float32}
    return Photometry(
        **{
            name: torch.zeros(shapes.get(name, (2 * N,)), dtype=dtypes.get(name, torch.bool), device="cuda")
            for name in Photometry._fields
        }
    )


def check_state(step, result):
    tensors = {
        **dict(step.student.named_parameters()),
        **dict(step.student.named_buffers()),
        **{f"teacher.{name}": value for name, value in step.teacher.state_dict(keep_vars=True).items()},
        **{f"optimizer.{i}": state["momentum_buffer"] for i, state in enumerate(step.optimizer.state.values())},
        "embedding_std": result.embedding_std,
        **step.health.figures,
        "health.layers": step.health.layers,
        "health.embeddings": step.health.embeddings[0],
        "health.same_views": step.health.same_views[0],
    }
    assert {name for name, tensor in tensors.items() if tensor.device.type != "cuda"} == set()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.int64}
    for layer in momentum_layers(step.teacher):
        assert not layer.forwards
        assert layer.pending.device.type == layer.collected.device.type == "cuda"


@pytest.mark.parametrize(("optimizer", "dtype"), [("sgd", torch.bfloat16), ("lars", torch.float16)])
def test_a_step_is_on_the_gpu_and_waits_for_nothing(optimizer, dtype):
    assert train_one_step(optimizer, dtype) == []


def wrap(owner, name, wrapper):
    """Replace a method of an object by `wrapper(method)`."""
    setattr(owner, name, wrapper(getattr(owner, name)))


def buffer_in_main_memory(step):
    layer = momentum_layers(step.teacher)[2]
    layer.running_mean = torch.zeros(layer.num_features)


def sums_in_main_memory(step):
    layer = momentum_layers(step.teacher)[-1]
    layer.collected = torch.zeros(3, layer.num_features)


def contiguous_weights(step):
    layer = step.teacher.encoder.embedder.embedder.convolution
    layer.weight = nn.Parameter(torch.empty(layer.weight.shape, device="cuda"), requires_grad=False)


def contiguous_views(step):
    wrap(step, "student_forward", lambda forward: lambda *views: forward(*(view.contiguous() for view in views)))


def views_in_full_precision(step):
    step.view_dtype = torch.float32


def value_read(step):
    wrap(
        step.teacher,
        "follow",
        lambda follow: lambda *args: (follow(*args), next(step.student.parameters()).sum().item()),
    )


def health_read(step):
    def with_health(begin):
        def begin_and_wrap(now, measures_health):
            begin(now, measures_health)
            if measures_health:
                wrap(
                    step.health, "measure", lambda measure: lambda *args: (measure(*args), step.health.layers.tolist())
                )

        return begin_and_wrap

    wrap(step, "begin", with_health)


def value_branched_on(step):
    def branch(collect):
        if step.teacher.projector[1].running_mean.isfinite().all():
            collect()

    wrap(step.teacher, "collect_statistics", lambda collect: lambda: branch(collect))


def masked_index(step):
    wrap(
        step,
        "student_forward",
        lambda forward: lambda *views: forward(*(view[view.sum((1, 2, 3)) > 0] for view in views)),
    )


def outputs_in_half_precision(step):
    wrap(step, "teacher_forward", lambda forward: lambda *views: tuple(out.half() for out in forward(*views)))
    wrap(step, "student_forward", lambda forward: lambda *views: tuple(out.half() for out in forward(*views)))


def networks_in_full_precision(step):
    step.accelerator.dtype = torch.float32


def statistics_in_half_precision(step):
    for layer in momentum_layers(step.teacher):
        layer.running_var = layer.running_var.bfloat16()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (buffer_in_main_memory, "(same device|different devices).*(cpu( and|,) cuda|cuda:0 and cpu)"),
        (sums_in_main_memory, "(same device|different devices).*cuda:0( and|,) cpu"),
        (contiguous_weights, "weight of Conv2d.* is not channels_last"),
        (contiguous_views, "input of Conv2d.* is not channels_last"),
        (views_in_full_precision, "autocast copies the input of Conv2d"),
        (value_read, "_local_scalar_dense"),
        (health_read, "_local_scalar_dense"),
        (value_branched_on, "_local_scalar_dense"),
        (masked_index, "nonzero"),
        (outputs_in_half_precision, "the loss is torch.float16"),
        (networks_in_full_precision, "Conv2d.* computes in torch.float32"),
        (statistics_in_half_precision, "dtype torch.bfloat16"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_caught(fault, message):
    with pytest.raises(Exception, match=message):
        train_one_step(fault=fault)


def test_planted_copies_are_listed():
    def fault(step):
        layer = momentum_layers(step.teacher)[0]
        wrap(step.teacher, "commit_statistics", lambda commit: lambda: (commit(), layer.running_mean.cpu())[0])
        wrap(step, "begin", lambda begin: lambda *_, **__: (begin(*_, **__), torch.zeros(2).to("cuda")))

    assert train_one_step(fault=fault) == ["outside", "step.py: commit = self.teacher.commit_statistics()"] * 2


def test_the_vote_of_the_neighbours_is_on_the_gpu():
    with fake_cuda(FakeTensorMode()), Transfers() as transfers:
        blocks = [Features(torch.zeros(50, dtype=torch.int64), torch.zeros(50, 8), torch.zeros(50, dtype=torch.int64))]
        similarities, neighbours = find_nearest(blocks, torch.zeros(6, 8, device="cuda"), k=5)
        assert similarities.device.type == neighbours.device.type == "cuda"
        labels = torch.zeros(50, dtype=torch.int64, device="cuda")
        with pytest.raises(DataDependentOutputException):  # the accuracy itself, once for all queries
            knn_accuracy(similarities, labels[neighbours], labels[:6], 10, k=5, temperature=0.07)
    # The bank is in main memory, which may be larger; each block is copied once.
    assert transfers.lines == [
        "knn.py: bank = functional.normalize(block.features.to(queries.device), dim=1).T",
        "knn.py: numbers = block.samples.to(queries.device)",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_of_the_probe_is_on_the_gpu(monkeypatch, dtype):
    heads = Heads(32, 10, learning_rates=(0.1, 1.0))
    encoder = small_encoder().to(memory_format=torch.channels_last).eval().requires_grad_(False)
    check_convolutions(encoder, dtype)
    mode = FakeTensorMode()
    for network in (heads, encoder):
        put_on_cuda(network, mode)
    for group, head in zip(heads.optimizer.param_groups, heads.heads, strict=True):
        group["params"] = list(head.parameters())
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: [setattr(p, "grad", p * 0) for p in heads.parameters()])
    with fake_cuda(mode), Transfers() as transfers, torch.no_grad():
        crops = torch.zeros(N, 32, 32, 3, dtype=torch.uint8, device="cuda")
        evaluation_view(crops, CONFIG)
        views = flipped_view(crops, torch.zeros(N, dtype=torch.bool, device="cuda"), CONFIG).to(dtype)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            features = embed(encoder, views).float()
        finally:
            torch.set_autocast_enabled("cuda", False)
        losses = heads.train_step(features, torch.zeros(N, dtype=torch.int64, device="cuda"), factor=1.0)
    assert losses.device.type == "cuda"
    assert losses.dtype == torch.float32
    assert {p.device.type for p in heads.parameters()} == {"cuda"}
    assert transfers.lines == []

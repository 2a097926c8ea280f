"""The steps that the benchmark compares: this project's, a plain one, a peer's, and the least work of any of them.

All take the same batch, and have projector and predictor of the same sizes, and random weights.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin, set_seed
from torch import Tensor, nn
from torch.profiler import record_function
from torchvision.models import get_model, list_models

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.crops import draw_uniforms
from m2t_accel.data.photometry import photometry
from m2t_accel.data.views import TwoViews, ViewBatch
from m2t_accel.distributed.interruption import reach_agreement
from m2t_accel.distributed.launch import collective_timeout
from m2t_accel.model import Student, create_encoder, create_student, embed, momentum_teacher_loss
from m2t_accel.optim import create_optimizer, set_learning_rate
from m2t_accel.pretrain import create_step
from m2t_accel.run.monitor import Monitor
from m2t_accel.run.resume import Progress
from m2t_accel.schedules import Schedule
from m2t_accel.step import TrainingStep

STEPS_PER_EPOCH = 1000

Step = Callable[[], object]


class Work(NamedTuple):
    """The batch and the settings that all variants share. Each copies its input, which so counts in its memory."""

    config: PretrainConfig
    accelerator: Accelerator
    batch: ViewBatch  # on the device
    views: Tensor  # (2 N, 3, H, W) in the dtype of the weights on the device, channels last in memory

    def schedule(self, step: int) -> Schedule:
        """Return the scheduled values of a step in the middle of a run, where no momentum is 0 or 1."""
        return self.config.schedule(self.config.epochs * STEPS_PER_EPOCH // 2 + step, STEPS_PER_EPOCH)


def create_work(config: PretrainConfig, accelerator: Accelerator) -> Work:
    """Return a batch of random pixels, with photometric parameters of the recipe."""
    maker, samples = TwoViews([], config), np.arange(config.device_batch_size)
    generator = torch.Generator().manual_seed(config.seed)
    crops = torch.randint(256, maker.crops_shape(len(samples)), dtype=torch.uint8, generator=generator)
    parameters = maker.parameters(np.stack([draw_uniforms(config.seed, 0, samples, view) for view in range(2)]))
    device = accelerator.device
    batch = ViewBatch(
        crops.to(device), type(parameters)(*(each.to(device) for each in parameters)), torch.from_numpy(samples)
    )
    views = photometry(batch.crops, batch.photometry, config).to(torch.get_default_dtype())
    return Work(config, accelerator, batch, views)


def create_eager(work: Work) -> Step:
    """Return the step of pretraining, from the crops to the moved teacher, operator by operator."""
    return create_ours(work, "no")


def create_compiled(work: Work) -> Step:
    """Return the step of pretraining with both networks compiled by inductor.

    Raises:
        ConfigurationError: there is no C compiler, which inductor needs.
    """
    if work.accelerator.device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ConfigurationError("needs a C++ compiler: type `apt install g++`")
    return create_ours(work, "inductor")


def create_monitored(work: Work) -> Step:
    """Return the step of pretraining with a measurement of its health, as about 100 steps of a run have it."""
    return create_ours(work, "no", is_monitored=True)


def create_ours(work: Work, backend: str, is_monitored: bool = False) -> Step:
    """Return the step of pretraining, with the networks compiled by a backend of torch.compile ("no": not compiled)."""
    state = work.accelerator.state
    given, state.dynamo_plugin = state.dynamo_plugin, TorchDynamoPlugin(backend=backend)
    try:
        training = create_step(work.config, work.accelerator)
    finally:
        state.dynamo_plugin = given
    return our_step(training, work, is_monitored)


def our_step(training: TrainingStep, work: Work, is_monitored: bool = False) -> Step:
    """Return the step of pretraining by these networks: one sub-batch, from its crops to the moved teacher."""
    annotate(training)
    own_batch = work.batch._replace(crops=work.batch.crops.clone())
    monitor = Monitor(work.config, work.accelerator, training, Progress(), STEPS_PER_EPOCH)
    number = 0

    def step(batch: ViewBatch = own_batch) -> TrainingStep:
        nonlocal number
        now, number = work.schedule(number), number + 1
        training.begin(now, measures_health=is_monitored)
        with record_function("photometry"):
            views = photometry(batch.crops, batch.photometry, work.config).to(training.view_dtype)
        result = training.forward_backward(*views.chunk(2))
        result.loss_on_host.item()
        reach_agreement(collective_timeout(work.config))
        training.update(now)
        if is_monitored:
            with record_function("monitor"):
                monitor.collect(now)
        return training

    return step


def annotate(training: TrainingStep) -> None:
    """Name the parts of a step that the profiler cannot tell from their operators."""
    for name, label in (
        ("follow", "teacher's weights"),
        ("commit_statistics", "teacher's statistics"),
        ("collect_statistics", "teacher's statistics"),
    ):
        setattr(training.teacher, name, record_function(label)(getattr(training.teacher, name)))


def create_plain(work: Work) -> Step:
    """Return the method as the paper writes it: float32, contiguous tensors, and loops over layers and parameters.

    Source: arXiv 2101.07525, section 3 and algorithm 1.
    """
    config, device = work.config, work.accelerator.device
    set_seed(config.seed)  # the weights of `create_step`
    student = create_student(
        create_encoder(config.encoder), config.image_size, config.hidden_size, config.projection_size
    ).to(device)
    encoder, projector = copy.deepcopy(student.encoder), copy.deepcopy(student.projector)
    teacher = nn.ModuleList([encoder, projector]).requires_grad_(False)
    for module in list(teacher.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, PaperBatchNorm(child))
    layers = [module for module in teacher.modules() if isinstance(module, PaperBatchNorm)]
    optimizer = create_optimizer(
        student, config.optimizer, config.learning_rate, config.optimizer_momentum, config.weight_decay, fused=False
    )
    view_1, view_2 = work.views.clone(memory_format=torch.contiguous_format).chunk(2)
    number = 0

    def step() -> Student:
        nonlocal number
        now, number = work.schedule(number), number + 1
        set_learning_rate(optimizer, now.learning_rate)
        for layer in layers:
            layer.statistics_momentum = now.statistics_momentum
        predictions = student(view_1, view_2)
        with torch.no_grad():
            targets = [nn.functional.normalize(projector(embed(encoder, view))) for view in (view_2, view_1)]
        loss = momentum_teacher_loss(predictions, targets)
        loss.backward()
        loss.item()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad(), record_function("teacher's statistics"):
            for layer in layers:
                layer.commit()
        with torch.no_grad(), record_function("teacher's weights"):
            students = [*student.encoder.parameters(), *student.projector.parameters()]
            for mine, theirs in zip(teacher.parameters(), students, strict=True):
                mine.mul_(now.weight_momentum).add_(theirs, alpha=1 - now.weight_momentum)
        return student

    return step


class PaperBatchNorm(nn.Module):
    """The paper's BatchNorm with momentum statistics, in the plainest operators. The history moves at `commit`."""

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.mean, self.var = layer.running_mean.clone(), layer.running_var.clone()
        self.statistics_momentum = 1.0
        self.collected: list[tuple[Tensor, Tensor]] = []

    def forward(self, input: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (input.dim() - 2))
        others = [dimension for dimension in range(input.dim()) if dimension != 1]
        batch = input.mean(others), input.var(others)
        self.collected.append(batch)
        share = self.statistics_momentum
        mean, var = (share * new + (1 - share) * old for new, old in zip(batch, (self.mean, self.var), strict=True))
        output = (input - mean.view(shape)) / torch.sqrt(var.view(shape) + self.eps)
        return output * self.weight.view(shape) + self.bias.view(shape)

    def commit(self) -> None:
        """Move the history towards the average of the forwards of this step."""
        mean, var = (sum(values) / len(values) for values in zip(*self.collected, strict=True))
        share = self.statistics_momentum
        self.mean = share * mean + (1 - share) * self.mean
        self.var = share * var + (1 - share) * self.var
        self.collected.clear()


def create_peer(work: Work) -> Step:
    """Return lightly's BYOL step with torchvision's encoder, channels last in memory.

    Source: lightly's examples/pytorch/byol.py. Deviations: channels last; the sizes of projector and predictor, the
    optimizer and the precision are those of our configuration; the momentum is constant.

    Raises:
        ConfigurationError: lightly is not installed.
    """
    try:
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum
    except ImportError:
        raise ConfigurationError("needs lightly: type `pip install lightly`") from None
    config = work.config
    encoder, size = usual_encoder(config)

    class BYOL(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = encoder
            self.projection_head = BYOLProjectionHead(size, config.hidden_size, config.projection_size)
            self.prediction_head = BYOLPredictionHead(
                config.projection_size, config.hidden_size, config.projection_size
            )
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)

        def forward(self, x0: Tensor, x1: Tensor) -> list[Tensor]:
            p0, p1 = (self.prediction_head(self.projection_head(embed(self.backbone, x))) for x in (x0, x1))
            z0, z1 = (self.projection_head_momentum(embed(self.backbone_momentum, x)).detach() for x in (x0, x1))
            return p0, z0, p1, z1

    byol = BYOL().to(work.accelerator.device, memory_format=torch.channels_last)
    optimizer = create_optimizer(
        byol, config.optimizer, config.learning_rate, config.optimizer_momentum, config.weight_decay, fused=None
    )
    forward, optimizer = work.accelerator.prepare(byol, optimizer)
    criterion = NegativeCosineSimilarity()
    view_1, view_2 = work.views.clone().chunk(2)

    def step() -> None:
        with record_function("teacher's weights"):
            update_momentum(byol.backbone, byol.backbone_momentum, m=0.99)
            update_momentum(byol.projection_head, byol.projection_head_momentum, m=0.99)
        p0, z0, p1, z1 = forward(view_1, view_2)
        loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
        loss.item()
        work.accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def create_floor(work: Work) -> Step:
    """Return the work that no step of this method can avoid, without compiling.

    Student forward and backward, and the teacher's forward in evaluation mode, for two views. There is no photometry,
    no momentum statistics, no optimizer, no update of the teacher and no communication.
    """
    config, device = work.config, work.accelerator.device
    encoder, size = usual_encoder(config)
    student = Student(encoder, size, config.hidden_size, config.projection_size)
    student.to(device, memory_format=torch.channels_last)
    encoder, projector = copy.deepcopy(student.encoder).eval(), copy.deepcopy(student.projector).eval()
    view_1, view_2 = work.views.clone().chunk(2)

    def step() -> None:
        student.zero_grad()
        with work.accelerator.autocast():
            q1, q2 = student(view_1, view_2)
            with torch.no_grad():
                k2, k1 = (nn.functional.normalize(projector(embed(encoder, view))) for view in (view_2, view_1))
        loss = momentum_teacher_loss((q1.float(), q2.float()), (k2.float(), k1.float()))
        loss.item()
        loss.backward()

    return step


def usual_encoder(config: PretrainConfig) -> tuple[nn.Module, int]:
    """Return torchvision's encoder of this name and its number of features, or else the encoder of pretraining."""
    if config.encoder in list_models():
        encoder = get_model(config.encoder)  # its ReLU works in place
        size, encoder.fc = encoder.fc.in_features, nn.Identity()
        return encoder, size
    student = create_student(
        create_encoder(config.encoder), config.image_size, config.hidden_size, config.projection_size
    )
    return student.encoder, student.projector[0].in_features


VARIANTS: dict[str, Callable[[Work], Step]] = {
    "plain": create_plain,
    "peer": create_peer,
    "eager": create_eager,
    "compiled": create_compiled,
    "monitored": create_monitored,
    "floor": create_floor,
}

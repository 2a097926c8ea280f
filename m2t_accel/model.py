"""Student, teacher and the loss of Momentum² Teacher (arXiv 2101.07525)."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    RegNetModel,
    ResNetConfig,
    ResNetModel,
)

from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.config.pretrain import ENCODERS
from m2t_accel.momentum_norm import (
    Commit,
    collect_statistics,
    commit_statistics,
    convert_batch_norm,
    copy_histories,
    discard_statistics,
    momentum_layers,
    set_statistics_momentum,
)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and key reports of transformers; callers check the keys themselves."""
    verbosity, has_bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bar:
            transformers.logging.enable_progress_bar()


def create_encoder(name: str, architecture: PretrainedConfig | None = None) -> PreTrainedModel:
    """Create an encoder with random weights.

    Args:
        name: a name in ENCODERS, a folder with a transformers config.json, or a Hub id.
        architecture: the configuration, if it is known already; `name` is then for messages.

    Raises:
        ConfigurationError: the configuration cannot be read, or its model has no BatchNorm.
    """
    if name in ENCODERS and architecture is None:
        return ResNetModel(ResNetConfig(**ENCODERS[name]))
    if architecture is None and Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ConfigurationError(f"--encoder {name}: the folder has no config.json of a transformers model")
    try:
        # Never run remote code: a configuration from the Hub is data.
        config = architecture or AutoConfig.from_pretrained(name, trust_remote_code=False)
        config.dtype = torch.get_default_dtype()  # many published configurations say float16, for inference
        encoder = AutoModel.from_config(config)
    except Exception as error:  # a wrong configuration can raise anything in the model's code
        raise ConfigurationError(
            f"--encoder {name}: no transformers model ({one_line(error)}); give one of {', '.join(ENCODERS)}, "
            "a folder with a transformers config.json, or a Hub id"
        ) from error
    try:
        convert_batch_norm(copy.deepcopy(encoder))
    except ValueError as error:
        raise ConfigurationError(
            f"--encoder {name}: {error}; give a model with plain BatchNorm, such as resnet50"
        ) from None
    return encoder


def embed(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the features (N, C) of images (N, 3, H, W).

    They are the pooled output of a transformers model, or the output of any other module.
    """
    if isinstance(encoder, PreTrainedModel):
        return encoder(pixel_values=images).pooler_output.flatten(1)
    return encoder(images).flatten(1)


def activate_in_place(encoder: nn.Module) -> None:
    """Let each ReLU of a transformers ResNet or RegNet overwrite its input, which saves time and memory.

    Outputs and gradients stay the same to the last bit: these ReLUs follow a BatchNorm, a convolution or a sum, whose
    backward passes do not read their outputs. Other encoders are not changed, because theirs may.
    """
    if type(encoder) in (ResNetModel, RegNetModel):
        for layer in encoder.modules():
            if type(layer) is nn.ReLU:
                layer.inplace = True


def mlp(input_size: int, hidden_size: int, output_size: int) -> nn.Sequential:
    """Create a projector or predictor: Linear, BatchNorm, ReLU, Linear.

    Source: BYOL (arXiv 2006.07733), section 3.3.
    """
    return nn.Sequential(
        nn.Linear(input_size, hidden_size),
        nn.BatchNorm1d(hidden_size),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_size, output_size),
    )


class Student(nn.Module):
    """Encoder, projector and predictor, trained by gradient.

    One forward of this module takes both views, one after the other: BatchNorm sees one view at a time, and
    DistributedDataParallel sees one forward for one backward.
    """

    def __init__(self, encoder: nn.Module, feature_size: int, hidden_size: int, projection_size: int) -> None:
        super().__init__()
        activate_in_place(encoder)
        self.encoder = encoder
        self.projector = mlp(feature_size, hidden_size, projection_size)
        self.predictor = mlp(projection_size, hidden_size, projection_size)

    def forward(self, view_1: Tensor, view_2: Tensor) -> tuple[Tensor, Tensor]:
        """Return q1, q2, the predictions from views 1 and 2: (N, 3, H, W) in, (N, projection_size) unit-norm out."""
        q1, q2 = (self.predictor(self.projector(embed(self.encoder, view))) for view in (view_1, view_2))
        return functional.normalize(q1, dim=1), functional.normalize(q2, dim=1)


class Teacher(nn.Module):
    """A copy of the student's encoder and projector that follows the student, with momentum statistics.

    Args:
        student: the student.
        statistics: what its BatchNorm normalises with in training: `momentum`, or to compare `batch` or `running`.
    """

    def __init__(self, student: Student, statistics: str = "momentum") -> None:
        super().__init__()
        self.encoder = convert_batch_norm(copy.deepcopy(student.encoder), statistics)
        self.projector = convert_batch_norm(copy.deepcopy(student.projector), statistics)
        self.requires_grad_(False)
        self.layers = momentum_layers(self)  # a plain list: a search in each step would take longer than a small commit

    def forward(self, view_1: Tensor, view_2: Tensor) -> tuple[Tensor, Tensor]:
        """Return k1, k2, the targets from views 1 and 2: (N, 3, H, W) in, (N, projection_size) unit-norm out."""
        # View 2 first, the order that runs so far had: an encoder with dropout draws its random numbers in this order.
        k2, k1 = (self.embed_view(view) for view in (view_2, view_1))
        return functional.normalize(k1, dim=1), functional.normalize(k2, dim=1)

    def embed_view(self, view: Tensor) -> Tensor:
        """Return the projections (N, projection_size) of one view (N, 3, H, W)."""
        if self.training:
            copy_histories(self.layers)
        return self.projector(embed(self.encoder, view))

    def set_statistics_momentum(self, statistics_momentum: float) -> None:
        """Set α, the batch's share in the statistics, for the forwards of a step."""
        set_statistics_momentum(self.layers, statistics_momentum)

    def collect_statistics(self) -> None:
        """Collect the statistics of the sub-batch that has just passed."""
        collect_statistics(self.layers)

    def commit_statistics(self) -> Commit:
        """Move the history of the statistics; once per optimizer step. A collective call."""
        return commit_statistics(self.layers)

    def discard_statistics(self) -> None:
        """Forget the statistics of the sub-batches of a step that moves nothing."""
        discard_statistics(self.layers)

    @torch.no_grad()
    def follow(self, student: Student, weight_momentum: float) -> None:
        """Update the weights: teacher ← m · teacher + (1 - m) · student, over encoder and projector."""
        mine = [*self.encoder.parameters(), *self.projector.parameters()]
        students = [*student.encoder.parameters(), *student.projector.parameters()]
        torch._foreach_lerp_(mine, students, 1 - weight_momentum)


def momentum_teacher_loss(predictions: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean over the batch of 4 - 2 (q·k + q'·k'): 0 if predictions and targets agree, 8 if opposite.

    The losses of the two views are summed, not averaged.

    Args:
        predictions: q, q' of the student, each (N, C) and unit-norm.
        targets: k, k' of the teacher, of the same shapes; k and q come from different views.

    Source: arXiv 2101.07525, equation 2; BYOL (arXiv 2006.07733), equation 2.
    """
    (q, other_q), (k, other_k) = predictions, targets
    return (4 - 2 * ((q * k).sum(dim=1) + (other_q * other_k).sum(dim=1))).mean()


def create_student(
    encoder: PreTrainedModel, image_size: int, hidden_size: int, projection_size: int, name: str = "encoder"
) -> Student:
    """Create the student of an encoder. One forward of a black image gives the size of its features.

    Args:
        image_size: width and height of a view, in pixels.
        hidden_size, projection_size: hidden width and output width of projector and predictor.
        name: name of the encoder, for messages.

    Raises:
        ConfigurationError: the encoder does not take images of this size, or returns no features (N, C).
    """
    encoder.eval()
    try:
        with torch.no_grad():
            feature_size = embed(encoder, torch.zeros(1, 3, image_size, image_size)).shape[1]
    except Exception as error:  # the code of the model may raise any exception
        raise ConfigurationError(
            f"--encoder {name}: no pooled features from images of {image_size} pixels ({one_line(error)})"
        ) from error
    encoder.train()
    return Student(encoder, feature_size, hidden_size, projection_size)


def is_stock(encoder: PreTrainedModel, image_size: int) -> bool:
    """Return whether the configuration of a transformers model describes it: a new one computes the same features."""
    was_training = encoder.training
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # a new model draws random weights
            expected, features = embed(encoder.eval(), images), embed(plain_encoder(encoder), images)
    except RuntimeError:  # other tensors
        return False
    finally:
        encoder.train(was_training)
    return expected.shape == features.shape and torch.allclose(features, expected, rtol=1e-4, atol=1e-5)


def plain_encoder(encoder: nn.Module, student_encoder: nn.Module | None = None) -> nn.Module:
    """Return a teacher's encoder with plain BatchNorm, in evaluation mode; the history is its running statistics.

    Args:
        encoder: the teacher's encoder. If it is a transformers model, the configuration of the result says that the
            network is a teacher.
        student_encoder: the student's encoder, with plain BatchNorm; needed if `encoder` is no transformers model.
    """
    if isinstance(encoder, PreTrainedModel):
        config: PretrainedConfig = copy.deepcopy(encoder.config)
        config.momentum2_teacher = {"network": "teacher"}
        plain = type(encoder)(config)
    else:
        plain = copy.deepcopy(student_encoder)
    plain.load_state_dict(encoder.state_dict(), strict=True)
    return plain.eval()


def embedding_std(embeddings: Tensor) -> Tensor:
    """Return the spread of unit-norm embeddings (N, C): 1 if spread evenly over the sphere, 0 if all are one point.

    It is the standard deviation over the batch, averaged over the dimensions, times √C; 0 means collapse.

    Source: SimSiam (arXiv 2011.10566), section 4.1, without the factor.
    """
    return embeddings.std(dim=0).mean() * math.sqrt(embeddings.shape[1])

"""Health of one optimizer step: the spread of its embeddings, and how far weights and statistics have moved.

All figures stay on the device as tensors, so that no step waits for them. m2t_accel.run.monitor reads and judges them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from m2t_accel.model import Student, Teacher
from m2t_accel.momentum_norm import Commit
from m2t_accel.optim import total_norm, update_norm

RANK_EPSILON = 1e-7  # of the paper, for float32
GREY_LEVEL = 1 / 255  # less than one of 256 levels in a normalised image, whose standard deviation is below 1
COMPARED_IMAGES = 8  # of each sub-batch, whose two views are compared


class StepHealth:
    """Health of one optimizer step. Create it before the step; it keeps a small part of the teacher's weights."""

    def __init__(self, teacher: Teacher) -> None:
        self.vectors_before = join_vectors(weights_of(teacher))
        self.embeddings: list[Tensor] = []  # (N, C) of each sub-batch of this process: the teacher's of view 2
        self.same_views: list[Tensor] = []  # of each sub-batch: share of the images whose two views are equal
        self.figures: dict[str, Tensor] = {}  # scalars; the same on every process
        self.layers = torch.empty(0)  # (number of layers,): see `statistics_distance`

    def add_sub_batch(self, view_1: Tensor, view_2: Tensor, embeddings: Tensor) -> None:
        """Add the views (N, 3, H, W), normalised, and the teacher's embeddings (N, C) of view 2."""
        difference = (view_1[:COMPARED_IMAGES] - view_2[:COMPARED_IMAGES]).abs().flatten(1).amax(dim=1)
        self.same_views.append((difference < GREY_LEVEL).float().mean())
        self.embeddings.append(embeddings.detach())

    @torch.no_grad()
    def measure(self, student: Student, teacher: Teacher, optimizer: Optimizer, commit: Commit) -> None:
        """Measure the step, after all updates and before its gradients are reset.

        Args:
            commit: what `commit_statistics` of this step returned.
        """
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        update, students, followers = update_norm(optimizer), weights_of(student), weights_of(teacher)
        self.layers, moved = statistics_moves(teacher, commit)
        self.figures = {
            "gradient_norm": total_norm([p.grad for p in parameters if p.grad is not None]),
            "update_norm": update,
            "update_ratio": update / total_norm(parameters),
            "teacher_distance": total_norm(torch._foreach_sub(followers, students)) / total_norm(students),
            "teacher_moved": share_of_way(self.vectors_before, join_vectors(followers), join_vectors(students)),
            "statistics_moved": moved,
        }


def weights_of(network: Student | Teacher) -> list[Tensor]:
    """Return the weights of encoder and projector, which the teacher takes over from the student."""
    return [*network.encoder.parameters(), *network.projector.parameters()]


@torch.no_grad()
def join_vectors(weights: list[Tensor]) -> Tensor:
    """Return the one-dimensional weights (BatchNorm, biases) as one vector: a part that is cheap to copy."""
    return torch.cat([weight for weight in weights if weight.dim() == 1])


def share_of_way(start: Tensor, end: Tensor, goal: Tensor) -> Tensor:
    """Return which share of the way from `start` to `goal` a move to `end` has made; NaN if there was no way to go.

    A lerp by a weight w gives w: 0 is no move, 1 is a move to the goal.
    """
    way = goal - start
    return ((end - start) * way).sum() / (way * way).sum()


def statistics_distance(batch: Tensor, history: Tensor, eps: float) -> Tensor:
    """Return the distance between a batch's statistics and the history (C,) of each channel: 0 if they are equal.

    It is |mean - history mean| / s_h + |ln(s / s_h)|, where s and s_h are the standard deviations of batch and history:
    s² = variance + eps. So it has no unit: 1 means that the means differ by one standard deviation, or that the
    standard deviations differ by a factor of e.

    Args:
        batch, history: (2, C) means and variances.
        eps: the constant that a layer adds to a variance.
    """
    variance, history_variance = batch[1] + eps, history[1] + eps
    return (batch[0] - history[0]).abs() / history_variance.sqrt() + (variance / history_variance).log().abs() / 2


def statistics_moves(teacher: Teacher, commit: Commit) -> tuple[Tensor, Tensor]:
    """Return the distance of batch and history, and which share of the way to the batch the history has made.

    The distance (number of layers,) is the mean of `statistics_distance` over the channels of each layer. The share is
    over all layers together, in units of the standard deviation and the variance of each channel.
    """
    layers, eps = teacher.layers, teacher.layers[0].eps
    distances = statistics_distance(commit.average, commit.history, eps).split([layer.num_features for layer in layers])
    now = torch.stack(
        [torch.cat([getattr(layer, name) for layer in layers]) for name in ("running_mean", "running_var")]
    )
    variances = commit.history[1] + eps
    unit = torch.stack([variances.sqrt(), variances])
    moved = share_of_way(commit.history / unit, now / unit, commit.average / unit)
    return torch.stack([distance.mean() for distance in distances]), moved


def effective_rank(embeddings: Tensor) -> float:
    """Return RankMe of embeddings (N, C): about the number of dimensions that they use, from 1 to min(N, C).

    It is exp(-Σ p_k ln p_k) over the min(N, C) singular values s_k of the matrix, with p_k = s_k / Σ s + 1e-7. The
    matrix is not centred. The singular values are the roots of the eigenvalues of the smaller Gram matrix, in float64.

    Source: RankMe (arXiv 2210.02885), equations 1 and 2. Deviation: our embeddings have unit norm.
    """
    rows = embeddings.double()
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum() + RANK_EPSILON
    return (-shares * shares.log()).sum().exp().item()

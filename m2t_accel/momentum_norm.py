"""BatchNorm with momentum statistics: the teacher's normalisation, which makes small batches work.

In training a forward normalises with `α·batch + (1 - α)·history`. The history is the layer's running mean and
(unbiased) variance. It moves once per optimizer step, when `commit_statistics` is called:
`history ← α·average + (1 - α)·history`, where the average is over the batch statistics of all forwards since the last
commit, on all processes. In evaluation the layer is plain BatchNorm with the history as running statistics, so its
state dict is that of plain BatchNorm.

Two other kinds of statistics are there to compare with (`--teacher_statistics`):

| kind       | a training forward normalises with     | share of the batch in a commit |
| ---------- | -------------------------------------- | ------------------------------ |
| `momentum` | α·batch + (1 - α)·history: this method | α                              |
| `batch`    | the batch alone: BYOL                  | 0.1                            |
| `running`  | the history alone                      | 0.1                            |

Source: arXiv 2101.07525, section 3.2; the "lazy" update of its code, `momentum_teacher/models`. Deviations: the
variance is corrected for bias once (the published code multiplies by n / (n - 1) twice); the average is taken over the
processes (the published code keeps the history of process 0). `batch` is torch's BatchNorm in training, but for the
commit: once for each step, of the average, where torch's moves with each forward of each process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from m2t_accel.schedules import KINDS_OF_STATISTICS


class MomentumBatchNorm(_BatchNorm):
    """BatchNorm with momentum statistics, over (N, C) or (N, C, ...) with any number of spatial dimensions.

    Set α, the share of the batch, with `set_statistics_momentum`. Eager code reads it as a number, compiled code as a
    tensor: torch.compile would compile again for each new number.

    Args:
        statistics: `momentum`, `batch` or `running`: what a training forward normalises with.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        statistics: str = "momentum",
    ) -> None:
        super().__init__(num_features, eps, momentum=None, affine=affine, device=device, dtype=dtype)
        self.statistics = statistics
        self.alpha = 1.0
        # A copy of the history, for the next eager forward to mix the batch into: see `copy_histories`.
        self.spare_history: tuple[Tensor, Tensor] | None = None
        # Batch statistics of the eager forwards that are not yet in `pending`: mean, biased variance, number of values.
        self.forwards: list[tuple[Tensor, Tensor, int]] = []
        # These are not persistent, so that the state dict stays that of plain BatchNorm. Between steps all but α are 0.
        self.register_buffer("statistics_momentum", torch.ones_like(self.running_mean[0]), persistent=False)
        # Sums of mean, unbiased variance and 1 over the forwards of this sub-batch, and over the sub-batches since the
        # last commit. The count has C equal entries, so that the average is one division for all layers.
        self.register_buffer("pending", self.running_mean.new_zeros(3, num_features), persistent=False)
        self.register_buffer("collected", self.running_mean.new_zeros(3, num_features), persistent=False)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C) or (N, C, ...), got {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...). In training, also keep the batch statistics for the commit.

        Raises:
            ValueError: in training, the batch has only one value per channel, and so no variance.
        """
        self._check_input_dim(input)
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self.training_statistics(input)
        return nn.functional.batch_norm(input, mean, var, self.weight, self.bias, training=False, eps=self.eps)

    @torch.no_grad()
    def training_statistics(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and variance (C,) that this forward normalises with. Keep the batch's for the commit."""
        batch_mean, batch_biased_var, mixed_mean, mixed_var = self.measure(input)
        if self.statistics == "batch":
            return batch_mean, batch_biased_var  # biased, as torch's BatchNorm in training
        if self.statistics == "running":
            return self.running_mean, self.running_var
        return mixed_mean, mixed_var

    def measure(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mean and biased variance (C,) of the batch, then mean and variance mixed by α with the history."""
        num_values = input.numel() // input.shape[1]
        if num_values < 2:
            raise ValueError(f"expected more than one value per channel in training, got shape {tuple(input.shape)}")
        if torch.compiler.is_compiling() or input.device.type not in ("cpu", "cuda"):
            # The compiler fuses all of this, and the cast into the sums.
            history = torch.stack([self.running_mean, self.running_var])
            var, mean = torch.var_mean(input.to(history.dtype), dim=[d for d in range(input.dim()) if d != 1])
            self.pending.add_(torch.stack([mean, var, torch.ones_like(mean)]))
            mixed_mean, mixed_var = torch.lerp(history, torch.stack([mean, var]), self.statistics_momentum).unbind()
            return mean, var * ((num_values - 1) / num_values), mixed_mean, mixed_var
        # One operator mixes, with the unbiased variance, into its second and third argument: copies of the history. It
        # also sums a bfloat16 input in the dtype of the history, without a float32 copy of the input.
        mixed, self.spare_history = self.spare_history, None
        mixed_mean, mixed_var = mixed or torch.stack([self.running_mean, self.running_var]).unbind()
        mean, biased_var = torch.ops.aten.batch_norm_update_stats(input, mixed_mean, mixed_var, self.alpha)
        self.forwards.append((mean, biased_var, num_values))
        return mean, biased_var, mixed_mean, mixed_var


def convert_batch_norm(module: nn.Module, statistics: str = "momentum") -> nn.Module:
    """Replace every BatchNorm of a module by a MomentumBatchNorm with the same weights and running statistics.

    Args:
        statistics: `momentum`, `batch` or `running`: what their training forwards normalise with.

    Returns:
        The module, changed in place. For a module that is itself a BatchNorm, the new layer.

    Raises:
        ValueError: the kind of statistics is unknown; or the module has no BatchNorm; or a BatchNorm cannot be
            replaced, because its class defines its own forward or because it has no running statistics.
    """
    if statistics not in KINDS_OF_STATISTICS:
        raise ValueError(f"statistics {statistics!r}: give one of {', '.join(KINDS_OF_STATISTICS)}")
    converted = _convert(module, type(module).__name__, {}, statistics)
    if not momentum_layers(converted):
        raise ValueError(f"{type(module).__name__} has no BatchNorm, which this method needs")
    return converted


def _convert(module: nn.Module, name: str, done: dict[nn.Module, nn.Module], statistics: str) -> nn.Module:
    if isinstance(module, MomentumBatchNorm):
        return module
    if isinstance(module, _BatchNorm):
        if module not in done:  # a layer that is used in two places stays one layer
            done[module] = _momentum_batch_norm(module, name, statistics)
        return done[module]
    for child_name, child in list(module._modules.items()):  # named_children() names a repeated child once
        if child is not None:
            setattr(module, child_name, _convert(child, f"{name}.{child_name}", done, statistics))
    return module


def _momentum_batch_norm(layer: _BatchNorm, name: str, statistics: str) -> MomentumBatchNorm:
    if type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        raise ValueError(f"{name} is a {type(layer).__name__}, which does more than BatchNorm: not supported")
    if layer.running_mean is None:
        raise ValueError(f"{name} keeps no running statistics (track_running_stats=False): not supported")
    device, dtype = layer.running_mean.device, layer.running_mean.dtype
    converted = MomentumBatchNorm(layer.num_features, layer.eps, layer.affine, device, dtype, statistics)
    converted.load_state_dict(layer.state_dict())
    converted.train(layer.training)
    for mine, theirs in zip(converted.parameters(), layer.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return converted


def momentum_layers(module: nn.Module) -> list[MomentumBatchNorm]:
    """Return the MomentumBatchNorm layers of a module, each once, in the order of `module.modules()`."""
    return [layer for layer in module.modules() if isinstance(layer, MomentumBatchNorm)]


def set_statistics_momentum(layers: list[MomentumBatchNorm], statistics_momentum: float) -> None:
    """Set α of all layers, from 0 (history alone) to 1 (batch alone). Call it before the forwards of a step."""
    tensors = [layer.statistics_momentum for layer in layers]
    torch._foreach_zero_(tensors)
    torch._foreach_add_(tensors, statistics_momentum)
    for layer in layers:
        layer.alpha = statistics_momentum


# The functions below use operators over lists: a loop over the layers would launch a thousand small GPU kernels.


def copy_histories(layers: list[MomentumBatchNorm]) -> None:
    """Copy the histories of all layers for their next forward, which otherwise copies its own."""
    if torch.compiler.is_compiling():
        return
    means, variances = [layer.running_mean for layer in layers], [layer.running_var for layer in layers]
    copies = torch.cat([*means, *variances]).split([len(history) for history in (*means, *variances)])
    for layer, mean, variance in zip(layers, copies[: len(layers)], copies[len(layers) :], strict=True):
        layer.spare_history = mean, variance


@torch.no_grad()
def collect_statistics(layers: list[MomentumBatchNorm]) -> None:
    """Add the statistics of the forwards of one sub-batch to those collected since the last commit.

    Call it after each sub-batch. The rounding then does not depend on the number of sub-batches of a process: two
    sub-batches give the same bits on one process as on two.
    """
    while used := [layer for layer in layers if layer.forwards]:  # once for each forward of the sub-batch
        means, biased_vars, numbers = zip(*(layer.forwards.pop(0) for layer in used), strict=True)
        sums_of_means, sums_of_vars, counts = zip(*(layer.pending.unbind() for layer in used), strict=True)
        torch._foreach_add_(sums_of_means, means)
        torch._foreach_add_(sums_of_vars, torch._foreach_mul(biased_vars, [n / (n - 1) for n in numbers]))
        torch._foreach_add_(counts, 1)
    pending = [layer.pending for layer in layers]
    torch._foreach_add_([layer.collected for layer in layers], pending)
    torch._foreach_zero_(pending)


@torch.no_grad()
def discard_statistics(layers: list[MomentumBatchNorm]) -> None:
    """Reset the collected statistics of a step that moves nothing."""
    torch._foreach_zero_([layer.collected for layer in layers])


class Commit(NamedTuple):
    """The statistics of one commit: means and variances (2, channels of all layers), the same on every process."""

    history: Tensor  # before the commit
    average: Tensor  # of the forwards


@torch.no_grad()
def commit_statistics(layers: list[MomentumBatchNorm]) -> Commit:
    """Move the history of all layers by the α of this step, and reset the collected statistics.

    A collective call: one all-reduce of 3 C numbers per layer (ResNet-50: 0.3 MB) averages over the forwards of all
    processes, so every process holds the same history.
    """
    collect_statistics(layers)
    collected = [layer.collected for layer in layers]
    sums = torch.cat(collected, dim=1)  # (3, channels of all layers)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    average = sums[:2] / sums[2]
    means, variances = [layer.running_mean for layer in layers], [layer.running_var for layer in layers]
    # A value that is not finite would stay in the history for good. It occurs as 0 / 0 in a layer that no forward used.
    history = torch.stack([torch.cat(means), torch.cat(variances)])
    average = torch.where(average.isfinite().all(dim=0), average, history)
    average_means, average_variances = (row.split([len(mean) for mean in means]) for row in average)
    alphas = [layer.alpha for layer in layers]
    torch._foreach_lerp_(means, average_means, alphas)
    torch._foreach_lerp_(variances, average_variances, alphas)
    torch._foreach_add_([layer.num_batches_tracked for layer in layers], 1)
    torch._foreach_zero_(collected)
    return Commit(history, average)

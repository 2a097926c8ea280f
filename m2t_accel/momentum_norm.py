"""BatchNorm with momentum statistics: the teacher's normalisation, which makes small batches do.

A forward in training normalises with `α·batch + (1 - α)·history`. The history is the layer's running mean
and (unbiased) variance. It moves once per optimizer step, when `commit_statistics` is called: the batch
statistics of all forwards since the last commit are averaged, over the processes too, and
`history ← α·average + (1 - α)·history`. In evaluation the layer is plain BatchNorm with the history as running
statistics, so its state dict is that of plain BatchNorm.

Source: arXiv 2101.07525, section 3.2 ("lazy" update in its code, `momentum_teacher/models`). Deviations: the
variance is unbiased once (the published code applies n / (n - 1) twice); the average is taken across
processes (the published code keeps rank 0's history).
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class MomentumBatchNorm(_BatchNorm):
    """BatchNorm over (N, C) or (N, C, ...) for any number of spatial dimensions, with momentum statistics.

    `statistics_momentum` (α) is a tensor, set by `set_statistics_momentum`: it changes every step, and a
    number would make torch.compile compile again at every change.

    Raises:
        ValueError: a training forward with one value per channel, which has no variance.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum=None, affine=affine, device=device, dtype=dtype)
        # Not persistent, so that the state dict stays that of plain BatchNorm: all are 0 between steps but α.
        self.register_buffer("statistics_momentum", torch.ones_like(self.running_mean[0]), persistent=False)
        self.register_buffer("pending_mean", torch.zeros_like(self.running_mean), persistent=False)
        self.register_buffer("pending_var", torch.zeros_like(self.running_var), persistent=False)
        # Of one dimension: compiled by torch 2.11, additions to a 0-dimensional buffer were lost, in silence.
        self.register_buffer("num_pending", torch.zeros_like(self.running_mean[:1]), persistent=False)
        # Of the sub-batches that were collected since the last commit; a buffer of all that is pending.
        self.register_buffer("collected", self.running_mean.new_zeros(2 * num_features + 1), persistent=False)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C) or (N, C, ...), got {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) in, the same out. Training: α·batch + (1 - α)·history, and the batch is kept for the commit."""
        self._check_input_dim(input)
        mean, var = self.running_mean, self.running_var
        if self.training:
            batch_mean, batch_var = batch_statistics(input, dtype=mean.dtype)
            self.pending_mean.add_(batch_mean)
            self.pending_var.add_(batch_var)
            self.num_pending.add_(1)
            # lerp is exact at both ends: the batch alone at α = 1, the history alone at α = 0.
            mean = torch.lerp(mean, batch_mean, self.statistics_momentum)
            var = torch.lerp(var, batch_var, self.statistics_momentum)
        return nn.functional.batch_norm(input, mean, var, self.weight, self.bias, training=False, eps=self.eps)


@torch.no_grad()
def batch_statistics(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel of (N, C, ...), each (C,), in `dtype` whatever the input's."""
    num_values = input.numel() // input.shape[1]
    if num_values < 2:
        raise ValueError(f"expected more than one value per channel in training, got shape {tuple(input.shape)}")
    if torch.compiler.is_compiling():  # a compiler fuses the cast into the sums
        var, mean = torch.var_mean(input.to(dtype), dim=[d for d in range(input.dim()) if d != 1])
        return mean, var
    # This operator reads a bfloat16 input once and adds up in float32, without a float32 copy of it: the type of
    # the running statistics says so. What it writes into them is lost to a compiler, so only its results count.
    running = torch.zeros(2, input.shape[1], dtype=dtype, device=input.device)
    mean, biased_var = torch.ops.aten.batch_norm_update_stats(input, running[0], running[1], 0.0)
    return mean, biased_var * (num_values / (num_values - 1))


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm in the module by MomentumBatchNorm with the same weights and running statistics.

    The module is changed in place and returned (a module that is itself a BatchNorm is returned anew).

    Raises:
        ValueError: there is no BatchNorm, or one that cannot be replaced: of a class with a forward of its
            own (it would be lost), or without running statistics.
    """
    converted = _convert(module, type(module).__name__, {})
    if not momentum_layers(converted):
        raise ValueError(f"{type(module).__name__} has no BatchNorm, and the method is about BatchNorm's statistics")
    return converted


def _convert(module: nn.Module, name: str, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if isinstance(module, MomentumBatchNorm):
        return module
    if isinstance(module, _BatchNorm):
        if module not in done:  # a layer used in two places stays one layer
            done[module] = _momentum_batch_norm(module, name)
        return done[module]
    for child_name, child in module.named_children():
        setattr(module, child_name, _convert(child, f"{name}.{child_name}", done))
    return module


def _momentum_batch_norm(layer: _BatchNorm, name: str) -> MomentumBatchNorm:
    if type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        raise ValueError(f"{name} is a {type(layer).__name__}, which does more than BatchNorm: not supported")
    if layer.running_mean is None:
        raise ValueError(f"{name} keeps no running statistics (track_running_stats=False): not supported")
    converted = MomentumBatchNorm(
        layer.num_features, layer.eps, layer.affine, layer.running_mean.device, layer.running_mean.dtype
    )
    converted.load_state_dict(layer.state_dict())
    converted.train(layer.training)
    for mine, theirs in zip(converted.parameters(), layer.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return converted


def momentum_layers(module: nn.Module) -> list[MomentumBatchNorm]:
    """The MomentumBatchNorm layers of the module, each once, in the order of its modules."""
    return [layer for layer in module.modules() if isinstance(layer, MomentumBatchNorm)]


def set_statistics_momentum(layers: list[MomentumBatchNorm], statistics_momentum: float) -> None:
    """Set α of all layers, before the forwards of a step."""
    alphas = [layer.statistics_momentum for layer in layers]
    torch._foreach_zero_(alphas)
    torch._foreach_add_(alphas, statistics_momentum)


@torch.no_grad()
def collect_statistics(layers: list[MomentumBatchNorm]) -> None:
    """Add what is pending, of the forwards of one sub-batch, to what was collected since the last commit.

    Without it the sum is right but for rounding, which then depends on how many sub-batches a process has: with it,
    two sub-batches give the same bits on one process as on two.
    """
    pending = [p for layer in layers for p in (layer.pending_mean, layer.pending_var, layer.num_pending)]
    collected = [c for layer in layers for c in layer.collected.split([layer.num_features, layer.num_features, 1])]
    torch._foreach_add_(collected, pending)
    torch._foreach_zero_(pending)


@torch.no_grad()
def commit_statistics(layers: list[MomentumBatchNorm]) -> None:
    """Move the history of all layers by the α of this step, and forget the pending batch statistics.

    With several processes the average is over all their forwards: one all-reduce of 2 C + 1 numbers per layer
    (ResNet-50: 0.2 MB), so every process holds the same history.
    """
    collect_statistics(layers)
    collected = [layer.collected for layer in layers]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        flat = torch.cat(collected)
        torch.distributed.all_reduce(flat)
        torch._foreach_copy_(collected, flat.split([len(part) for part in collected]))
    for layer in layers:
        mean, var, number = layer.collected.split([layer.num_features, layer.num_features, 1])
        mean, var = mean / number, var / number
        # History is for good: it takes no average that is not finite, such as that of a step which float16
        # overflowed and the gradient scaler skips, or 0 / 0 of a layer that no forward used.
        finite = mean.isfinite() & var.isfinite()
        mean, var = torch.where(finite, mean, layer.running_mean), torch.where(finite, var, layer.running_var)
        layer.running_mean.lerp_(mean, layer.statistics_momentum)
        layer.running_var.lerp_(var, layer.statistics_momentum)
        layer.num_batches_tracked.add_(1)
    torch._foreach_zero_(collected)

"""BatchNorm with momentum statistics: the teacher's normalisation, which makes small batches work.

In training a forward normalises with `α·batch + (1 - α)·history`. The history is the layer's running mean and
(unbiased) variance. It moves once per optimizer step, when `commit_statistics` is called:
`history ← α·average + (1 - α)·history`, where the average is over the batch statistics of all forwards since the last
commit, on all processes. In evaluation the layer is plain BatchNorm with the history as running statistics, so its
state dict is that of plain BatchNorm.

Source: arXiv 2101.07525, section 3.2; the "lazy" update of its code, `momentum_teacher/models`. Deviations: the
variance is corrected for bias once (the published code multiplies by n / (n - 1) twice); the average is taken over the
processes (the published code keeps the history of process 0).
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class MomentumBatchNorm(_BatchNorm):
    """BatchNorm with momentum statistics, over (N, C) or (N, C, ...) with any number of spatial dimensions.

    `statistics_momentum` (α) is a tensor, because it changes every step: torch.compile would compile again for each
    new Python number. Set it with `set_statistics_momentum`.
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
        # These are not persistent, so that the state dict stays that of plain BatchNorm. Between steps all but α are 0.
        self.register_buffer("statistics_momentum", torch.ones_like(self.running_mean[0]), persistent=False)
        self.register_buffer("pending_mean", torch.zeros_like(self.running_mean), persistent=False)
        self.register_buffer("pending_var", torch.zeros_like(self.running_var), persistent=False)
        # This has one dimension, because compiled code of torch 2.11 loses additions to a 0-dimensional buffer.
        self.register_buffer("num_pending", torch.zeros_like(self.running_mean[:1]), persistent=False)
        # Sums of mean, variance and count over the sub-batches since the last commit.
        self.register_buffer("collected", self.running_mean.new_zeros(2 * num_features + 1), persistent=False)

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
    """Return mean and unbiased variance per channel of (N, C, ...), each (C,) in `dtype`."""
    num_values = input.numel() // input.shape[1]
    if num_values < 2:
        raise ValueError(f"expected more than one value per channel in training, got shape {tuple(input.shape)}")
    if torch.compiler.is_compiling():  # the compiler fuses the cast into the sums
        var, mean = torch.var_mean(input.to(dtype), dim=[d for d in range(input.dim()) if d != 1])
        return mean, var
    # This operator reads a bfloat16 input once and sums in the dtype of the running statistics, without a float32 copy
    # of the input. It also writes into its running arguments, which its schema does not say: use only its results.
    running = torch.zeros(2, input.shape[1], dtype=dtype, device=input.device)
    mean, biased_var = torch.ops.aten.batch_norm_update_stats(input, running[0], running[1], 0.0)
    return mean, biased_var * (num_values / (num_values - 1))


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm of a module by a MomentumBatchNorm with the same weights and running statistics.

    Returns:
        The module, changed in place. For a module that is itself a BatchNorm, the new layer.

    Raises:
        ValueError: the module has no BatchNorm; or a BatchNorm cannot be replaced, because its class defines its own
            forward or because it has no running statistics.
    """
    converted = _convert(module, type(module).__name__, {})
    if not momentum_layers(converted):
        raise ValueError(f"{type(module).__name__} has no BatchNorm, which this method needs")
    return converted


def _convert(module: nn.Module, name: str, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if isinstance(module, MomentumBatchNorm):
        return module
    if isinstance(module, _BatchNorm):
        if module not in done:  # a layer that is used in two places stays one layer
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
    """Return the MomentumBatchNorm layers of a module, each once, in the order of `module.modules()`."""
    return [layer for layer in module.modules() if isinstance(layer, MomentumBatchNorm)]


def set_statistics_momentum(layers: list[MomentumBatchNorm], statistics_momentum: float) -> None:
    """Set α of all layers, from 0 (history alone) to 1 (batch alone). Call it before the forwards of a step."""
    alphas = [layer.statistics_momentum for layer in layers]
    torch._foreach_zero_(alphas)
    torch._foreach_add_(alphas, statistics_momentum)


@torch.no_grad()
def collect_statistics(layers: list[MomentumBatchNorm]) -> None:
    """Add the statistics of the forwards of one sub-batch to those collected since the last commit.

    Call it after each sub-batch. The rounding then does not depend on the number of sub-batches of a process: two
    sub-batches give the same bits on one process as on two.
    """
    pending = [p for layer in layers for p in (layer.pending_mean, layer.pending_var, layer.num_pending)]
    collected = [c for layer in layers for c in layer.collected.split([layer.num_features, layer.num_features, 1])]
    torch._foreach_add_(collected, pending)
    torch._foreach_zero_(pending)


@torch.no_grad()
def commit_statistics(layers: list[MomentumBatchNorm]) -> None:
    """Move the history of all layers by the α of this step, and reset the collected statistics.

    A collective call: one all-reduce of 2 C + 1 numbers per layer (ResNet-50: 0.2 MB) averages over the forwards of
    all processes, so every process holds the same history.
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
        # A value that is not finite would stay in the history for good. It occurs when float16 overflows in a step that
        # the gradient scaler skips, and as 0 / 0 in a layer that no forward used.
        finite = mean.isfinite() & var.isfinite()
        mean, var = torch.where(finite, mean, layer.running_mean), torch.where(finite, var, layer.running_var)
        layer.running_mean.lerp_(mean, layer.statistics_momentum)
        layer.running_var.lerp_(var, layer.statistics_momentum)
        layer.num_batches_tracked.add_(1)
    torch._foreach_zero_(collected)

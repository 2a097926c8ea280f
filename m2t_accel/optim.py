"""Optimizers of the recipes: torch's SGD, and LARS."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer


class LARS(Optimizer):
    """SGD with momentum, whose rate is scaled for each tensor by eta ‖w‖ / (‖g‖ + weight_decay ‖w‖).

    With the gradient g: `buf ← momentum · buf + rate · (g + weight_decay · w)`, then `w ← w - buf`. Parameter groups
    with `adapt=False` use the plain learning rate; so do tensors with ‖w‖ ‖g‖ ≤ 1e-8.

    Source: You et al., arXiv 1708.03888, algorithm 1. The rate multiplies the gradient before it enters the buffer, as
    in the published code of arXiv 2101.07525.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        adapt: bool = True,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": adapt}
        )

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters. The gradients are not changed."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            decay = group["weight_decay"]
            updates = torch._foreach_add(gradients, parameters, alpha=decay)
            if group["adapt"]:
                # The norms stay on the device as tensors, so that no step waits for the GPU.
                weight_norms = torch.stack(torch._foreach_norm(parameters))
                gradient_norms = torch.stack(torch._foreach_norm(gradients))
                trust = group["eta"] * weight_norms / (gradient_norms + decay * weight_norms)
                trust = torch.where(weight_norms * gradient_norms > 1e-8, trust, 1.0)
                torch._foreach_mul_(updates, list((group["lr"] * trust).unbind()))
            else:
                torch._foreach_mul_(updates, group["lr"])
            buffers = []
            for parameter in parameters:
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffers.append(state["momentum_buffer"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_sub_(parameters, buffers)
        return loss


def create_optimizer(
    module: nn.Module, name: str, learning_rate: float, momentum: float, weight_decay: float, fused: bool | None = True
) -> Optimizer:
    """Return SGD (`sgd`) or LARS (`lars`) over the module's trainable parameters.

    Weight decay applies to every parameter, as published. LARS adapts the rate of convolution and linear weights, not
    that of one-dimensional parameters (BatchNorm, biases).

    Args:
        fused: whether SGD reads and writes each tensor once, by one operator for all. Not for a gradient scaler: torch
            then calls `step` also for a step that is skipped, and Accelerate does not notice the skip. None: torch's
            default, operators over lists on a GPU. False: operators for each parameter.

    Raises:
        ValueError: the name is neither of them.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if name == "sgd":
        return SGD(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, fused=fused)
    if name == "lars":
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "adapt": True},
            {"params": [p for p in parameters if p.dim() <= 1], "adapt": False},
        ]
        return LARS(groups, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    raise ValueError(f"optimizer {name!r}: unknown; use sgd or lars")


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all parameter groups, before the step that uses it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the norm of all tensors together."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


@torch.no_grad()
def update_norm(optimizer: Optimizer) -> Tensor:
    """Return the norm of the change of all parameters by the last step, before its gradients are reset.

    It is computed from the optimizer's momentum, so no copy of the weights is needed. With the buffer b, LARS moves
    each parameter by b, and SGD by learning rate · b.

    Args:
        optimizer: one of `create_optimizer`, with or without Accelerate's wrapper.
    """
    norms = []
    for group in optimizer.param_groups:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        buffers = [optimizer.state[parameter].get("momentum_buffer") for parameter in parameters]
        scale = 1.0 if "adapt" in group else group["lr"]
        if parameters and buffers[0] is None:
            # SGD without momentum, in terms of the weights after the step: lr / (1 - lr · decay) · (g + decay · w).
            buffers = torch._foreach_add([p.grad for p in parameters], parameters, alpha=group["weight_decay"])
            scale = group["lr"] / (1 - group["lr"] * group["weight_decay"])
        norms.append(scale * total_norm(buffers))
    return torch.linalg.vector_norm(torch.stack(norms))

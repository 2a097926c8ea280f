"""Collective calls on objects and CPU tensors, over gloo groups that never wait for a device."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from m2t_accel.config.fields import ConfigurationError, one_line

# The first process of a machine downloads a dataset while the others wait. A process that dies meanwhile is noticed at
# once.
DOWNLOAD_TIMEOUT = timedelta(days=1)
Result = TypeVar("Result")
Value = TypeVar("Value")


def on_all_processes(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Run the action on the first process of each machine, then on the others, and return its result.

    A collective call. If the action fails on one process, the call fails on all, so that none is left waiting.

    Raises:
        ConfigurationError: the action raised an error on some process. Every process raises the error of the first of
            these, but a process keeps its own error if that is of another type.
    """
    result, message, failure = None, None, None
    if not accelerator.is_local_main_process:
        wait_for_all()
    try:
        result = action()
    except ConfigurationError as error:
        message = str(error)
    except Exception as error:  # the others must hear of it, too
        message, failure = f"another process has failed: {one_line(error)}", error
    if accelerator.is_local_main_process:
        wait_for_all()
    wait_for_all()
    messages = gather_to_all(message)
    if failure is not None:
        raise failure
    for other in messages:
        if other is not None:
            raise ConfigurationError(other)
    return result


def check_same_images(accelerator: Accelerator, note: str, fingerprint: str) -> None:
    """Check that all processes found the same images, because each machine may have its own copy.

    A collective call.

    Args:
        accelerator: the Accelerator of this process.
        note: name and number of the images, for the message.
        fingerprint: the fingerprint of the images.

    Raises:
        ConfigurationError: the images differ; raised on every process.
    """
    found = gather_to_all(f"{note} [{fingerprint}]")
    other = next((other for other in found if other != found[0]), None)
    if other is not None:
        raise ConfigurationError(
            f"the machines have different images ({found[0]}; on another one {other}): copy the same images to all"
        )


class Groups(NamedTuple):
    """Gloo groups of all processes; their calls use main memory, so that they never wait for a GPU."""

    world: ProcessGroup  # the default group at the time of creation
    control: ProcessGroup  # its calls time out after --collective_timeout
    download: ProcessGroup  # its calls may wait for a download


_groups: Groups | None = None


def create_groups(timeout: timedelta) -> None:
    """Create the groups if there are several processes. A collective call."""
    global _groups
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        control, download = (
            torch.distributed.new_group(backend="gloo", timeout=limit) for limit in (timeout, DOWNLOAD_TIMEOUT)
        )
        _groups = Groups(torch.distributed.group.WORLD, control, download)


def destroy_process_group() -> bool:
    """Destroy the process group at the end of a script. Return whether this is the main process.

    gloo's threads release the tensors of a call shortly after it returns, and need the interpreter for that. If the
    interpreter shuts down first, the process aborts ("terminate called without an active exception"). So this function
    ends the threads.
    """
    global _groups
    state = PartialState()
    _groups = None  # otherwise the groups outlive torch's own references
    state.destroy_process_group()
    return state.is_main_process


def order_gradient_buckets(model: nn.Module) -> None:
    """Make DistributedDataParallel order its gradients now, and not after the first backward of the run.

    It packs the gradients into buckets anew after its first backward, in the order in which they arrived. On three or
    more processes, the bits of a sum depend on the place of a gradient in its bucket. So the first step after a resume
    would differ from the same step of a run that was not stopped. This is that first backward: of a sum over the
    parameters, so that it needs no images and changes no buffer and no random generator. The gradients arrive from the
    last parameter to the first, which is about their order in a backward of the network.

    A collective call.

    Args:
        model: a network, as `Accelerator.prepare` returns it. Other wrappers than DistributedDataParallel are ignored.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return
    module = model.module
    forward = vars(module).get("forward")  # Accelerate sets one for mixed precision
    module.forward = lambda total: sum((p.sum() for p in module.parameters() if p.requires_grad), start=total)
    try:
        model(torch.zeros((), device=next(module.parameters()).device)).backward()
    finally:
        del module.forward
        if forward is not None:
            module.forward = forward
    model.zero_grad(set_to_none=True)


def groups() -> Groups | None:
    """Return the groups, or None if there is only one process."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return _groups if initialized and _groups and _groups.world is torch.distributed.group.WORLD else None


def control_group() -> ProcessGroup | None:
    """Return the group for short messages, or None if there is only one process."""
    return None if groups() is None else groups().control


def wait_for_all() -> None:
    """Wait until every process makes this call, up to the time of a long download. A collective call."""
    if groups() is not None:
        torch.distributed.barrier(groups().download)


def gather_to_all(value: Value) -> list[Value]:
    """Return the values of all processes, in their order, on every process. A collective call."""
    group = control_group()
    if group is None:
        return [value]
    values = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def gather_to_main(value: Value) -> list[Value] | None:
    """Return the values of all processes, in their order, on the first process; None on the others.

    A collective call.
    """
    group = control_group()
    if group is None:
        return [value]
    is_main = torch.distributed.get_rank() == 0
    values = [None] * torch.distributed.get_world_size(group) if is_main else None
    torch.distributed.gather_object(value, values, dst=0, group=group)
    return values


def broadcast_object(value: Value) -> Value:
    """Return the value of the first process, on every process. A collective call."""
    group = control_group()
    if group is None:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=group)
    return values[0]


def broadcast_from_main(files: dict[str, dict[str, Tensor]] | None) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the first process, on every process. A collective call.

    Args:
        files: CPU tensors by file and name; None on the other processes.
    """
    group = control_group()
    if group is None:
        return files
    described = {
        file: {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        for file, tensors in (files or {}).items()
    }
    received: dict[str, dict[str, Tensor]] = {}
    for file, names in broadcast_object(described).items():
        received[file] = {}
        for name, (shape, dtype) in names.items():
            tensor = torch.empty(shape, dtype=dtype) if files is None else files[file][name]
            if tensor.numel():
                torch.distributed.broadcast(tensor, src=0, group=group)
            received[file][name] = tensor
    return received

"""Collective calls on objects and CPU tensors, over groups that never wait for a device."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch.distributed import ProcessGroup

from m2t_accel.config.fields import ConfigurationError

# The others wait while the first process of a machine downloads a dataset.
PATIENCE = timedelta(hours=2)
Result = TypeVar("Result")
Value = TypeVar("Value")


def on_all_processes(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """The result of the action, done by the first process of each machine, then by the others.

    A collective call. If it fails on one process, it fails on all: none is left waiting for it.

    Raises:
        ConfigurationError: of the first process on which the action raised it.
    """
    result, message = None, None
    if not accelerator.is_local_main_process:
        wait_patiently()
    try:
        result = action()
    except ConfigurationError as error:
        message = str(error)
    if accelerator.is_local_main_process:
        wait_patiently()
    wait_patiently()
    for other in gather_to_all(message):
        if other is not None:
            raise ConfigurationError(other)
    return result


def check_same_images(accelerator: Accelerator, note: str, fingerprint: str) -> None:
    """Check that all processes found the same images, by their fingerprint: each machine may have a copy of its own.

    A collective call.

    Raises:
        ConfigurationError: they did not; the same on every process.
    """
    found = gather_to_all(f"{note} [{fingerprint}]")
    other = next((other for other in found if other != found[0]), None)
    if other is not None:
        raise ConfigurationError(
            f"the machines have different images ({found[0]}; but elsewhere {other}): give all the same copy"
        )


class Groups(NamedTuple):
    """Groups of all processes over gloo, whatever trains: what is said there waits for no device."""

    world: ProcessGroup  # that they are of
    control: ProcessGroup  # a call waits as long as one of tensors does
    patient: ProcessGroup  # a call may wait for a download


_groups: Groups | None = None


def create_groups(timeout: timedelta) -> None:
    """Make the groups, where there are several processes; a collective call."""
    global _groups
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        control, patient = (torch.distributed.new_group(backend="gloo", timeout=t) for t in (timeout, PATIENCE))
        _groups = Groups(torch.distributed.group.WORLD, control, patient)


def destroy_process_group() -> bool:
    """Part from the other processes, when all that is done together is done; whether this one is the main one.

    gloo's threads hold the tensors of a call a moment longer than it lasts, and need the interpreter to let go of them:
    were it ending just then, the process would abort ("terminate called without an active exception"). They end here.
    """
    global _groups
    state = PartialState()
    _groups = None  # or they would outlive torch's own references
    state.destroy_process_group()
    return state.is_main_process


def groups() -> Groups | None:
    """The groups, or None where there is one process."""
    is_there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return _groups if is_there and _groups is not None and _groups.world is torch.distributed.group.WORLD else None


def control_group() -> ProcessGroup | None:
    """The group for short words, or None where there is one process."""
    return None if groups() is None else groups().control


def wait_patiently() -> None:
    """Wait until every process is here, however long a download takes; a collective call."""
    if groups() is not None:
        torch.distributed.barrier(groups().patient)


def gather_to_all(value: Value) -> list[Value]:
    """The value of every process, on every process, in their order; a collective call."""
    group = control_group()
    if group is None:
        return [value]
    values = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def gather_to_main(value: Value) -> list[Value] | None:
    """The value of every process, in their order, on the first one; None on the others; a collective call."""
    group = control_group()
    if group is None:
        return [value]
    is_main = torch.distributed.get_rank() == 0
    values = [None] * torch.distributed.get_world_size(group) if is_main else None
    torch.distributed.gather_object(value, values, dst=0, group=group)
    return values


def broadcast_object(value: Value) -> Value:
    """The value of the first process, on every process; a collective call."""
    group = control_group()
    if group is None:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=group)
    return values[0]


def broadcast_from_main(files: dict[str, dict[str, Tensor]] | None) -> dict[str, dict[str, Tensor]]:
    """Tensors in the main memory, by file and name, from the first process to every process; a collective call."""
    group = control_group()
    if group is None:
        return files
    described = {
        file: {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        for file, tensors in (files or {}).items()
    }
    there = {}
    for file, names in broadcast_object(described).items():
        there[file] = {}
        for name, (shape, dtype) in names.items():
            tensor = torch.empty(shape, dtype=dtype) if files is None else files[file][name]
            if tensor.numel():
                torch.distributed.broadcast(tensor, src=0, group=group)
            there[file][name] = tensor
    return there

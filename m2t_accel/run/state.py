"""The state of a run between two steps, as named tensors: gathered, put back, on this or another number of processes.

Student, teacher and optimizer are the same on every process. What is not (buffers of the student, random numbers) is
kept of each.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from m2t_accel.distributed.processes import broadcast_from_main, gather_to_main

Files = dict[str, dict[str, Tensor]]  # of each file, its tensors by name


class RunState:
    """What a checkpoint holds of a run.

    student and teacher: as unwrapped; rows: the (loss, spread) of the sub-batches since the last line of metrics.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> None:
        self.student = student
        self.teacher = teacher
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.host: Files = {}  # copies in the main memory, used again for each checkpoint

    def copy(self, rows: Sequence[Tensor]) -> Files | None:
        """The state in the main memory, on the first process; on the others None. A collective call.

        The tensors are overwritten by the next call. `rows`: (2,) for each sub-batch of this process.
        """
        mine = {**self.buffers(), **random_state(), "rows": stacked(rows)}
        # Copies also where this is the main memory: the loop goes on while they are written.
        own = gather_to_main({name: tensor.detach().to("cpu", copy=True) for name, tensor in mine.items()})
        if own is None:
            return None
        devices = {"student": self.parameters(), "teacher": self.teacher.state_dict(), "optimizer": self.momentum()}
        for file, tensors in devices.items():
            self.host[file] = self.copied(tensors, self.host.get(file, {}))
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        processes = {f"{rank}.{name}": tensor for rank, of_one in enumerate(own) for name, tensor in of_one.items()}
        rows_of_all = [processes.pop(f"{rank}.rows") for rank in range(len(own))]
        return {**self.host, "processes": {**processes, "rows": in_device_order(rows_of_all)}}

    def copied(self, tensors: Mapping[str, Tensor], into: dict[str, Tensor]) -> dict[str, Tensor]:
        """Contiguous copies in the main memory, on their way there until the device is synchronised."""
        on_gpu = self.accelerator.device.type == "cuda"
        for name, tensor in tensors.items():
            if name not in into:
                into[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            into[name].copy_(tensor.detach(), non_blocking=True)
        return into

    def restore(self, files: Files | None, manifest: Mapping[str, object]) -> list[Tensor]:
        """Put a checkpoint's state in place, whatever the number of processes that saved it. A collective call.

        files: as they were saved, on the first process; the others get them from there, so that machines need not
        share a disk. The rows of this process come back.

        Raises:
            ValueError: the tensors are not those of this network and optimizer.
        """
        files = broadcast_from_main(files)
        fill(self.teacher.state_dict(), files["teacher"])
        rank, saved = self.accelerator.process_index, manifest["num_processes"]
        prefix = f"{rank % saved}."
        own = {
            name.removeprefix(prefix): tensor for name, tensor in files["processes"].items() if name.startswith(prefix)
        }
        fill(self.parameters(), files["student"])
        fill(self.buffers(), {name: tensor for name, tensor in own.items() if name.startswith("buffer.")})
        inner = inner_optimizer(self.optimizer)
        inner.state.clear()
        parameters = dict(self.student.named_parameters())
        for name, tensor in files["optimizer"].items():
            key, _, parameter_name = name.partition(".")
            parameter = parameters[parameter_name]
            # As the optimizer makes it: on the device, in the memory format of the parameter.
            inner.state[parameter][key] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        scaler = self.accelerator.scaler
        if scaler is not None and manifest.get("gradient_scaler"):
            scaler.load_state_dict(manifest["gradient_scaler"])
        if saved == self.accelerator.num_processes:
            set_random_state(own)
        return list(files["processes"]["rows"][rank :: self.accelerator.num_processes].to(self.accelerator.device))

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.student.named_parameters())

    def buffers(self) -> dict[str, Tensor]:
        """Those of the student: each process's running statistics are its own, and serve nothing."""
        return {f"buffer.{name}": buffer for name, buffer in self.student.named_buffers()}

    def momentum(self) -> dict[str, Tensor]:
        """What the optimizer keeps of each parameter, by `KEY.PARAMETER`."""
        state = inner_optimizer(self.optimizer).state
        return {
            f"{key}.{name}": value
            for name, parameter in self.student.named_parameters()
            for key, value in state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def gradient_scaler(self) -> dict[str, object] | None:
        """The state of float16's gradient scaler, where there is one."""
        return None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that Accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def stacked(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(rows)) if rows else torch.empty(0, 2)


def in_device_order(rows: Sequence[Tensor]) -> Tensor:
    """Of each process (steps · turns, 2), as one, in the order of the steps and their virtual devices.

    Processes take the virtual devices in turn, so every W-th row is of one of W processes, for any W.
    """
    return torch.stack(list(rows), dim=1).flatten(0, 1)


@torch.no_grad()
def fill(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same names.

    Raises:
        ValueError: names or shapes differ.
    """
    other = sorted(places.keys() ^ tensors.keys())
    other += [name for name in places.keys() & tensors.keys() if places[name].shape != tensors[name].shape]
    if other:
        raise ValueError(f"{len(other)} tensors are of another network, the first of them {other[0]}")
    for name, place in places.items():
        place.copy_(tensors[name])


def random_state() -> dict[str, Tensor]:
    """Where the global generators of this process are. Nothing of ours draws from them in training, but an encoder may
    (dropout, stochastic depth).
    """
    _, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    assert kind == "MT19937"
    state = {
        "random.torch": torch.get_rng_state(),
        "random.python": torch.tensor(words, dtype=torch.int64),
        "random.python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "random.numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "random.numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Put the global generators where they were."""
    torch.set_rng_state(state["random.torch"])
    gauss = state["random.python_gauss"].tolist()
    random.setstate((3, tuple(state["random.python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["random.numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, state["random.numpy_gauss"].item()))
    if "random.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random.cuda"])

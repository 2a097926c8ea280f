"""The state of a run between two steps as named tensors: copy it, and restore it on any number of processes.

Student, teacher and optimizer are the same on every process, so they are saved once. The buffers of the student and the
state of the random generators differ, so they are saved for each process.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from m2t_accel.config.fields import count
from m2t_accel.distributed.processes import broadcast_from_main, gather_to_main

Files = dict[str, dict[str, Tensor]]  # tensors by name, for each file


class RunState:
    """The tensors of a run that a checkpoint holds.

    Args:
        student, teacher: the networks, without a wrapper.
        optimizer: the optimizer, with or without Accelerate's wrapper.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> None:
        self.student = student
        self.teacher = teacher
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.host: Files = {}  # copies in main memory, reused by each checkpoint

    def copy(self, rows: Sequence[Tensor], positions: Tensor | None = None) -> Files | None:
        """Return a copy of the state in main memory on process 0, None on the others. A collective call.

        The next call overwrites the tensors.

        Args:
            rows: (2,) loss and spread of each sub-batch of this process since the last line of metrics.
            positions: (turns, 2) where each virtual device of this process resumes in a stream; None without a stream.
        """
        mine = {**self.buffers(), **get_random_state(), "rows": torch.stack(list(rows)) if rows else torch.empty(0, 2)}
        if positions is not None:
            mine["positions"] = positions
        # copy=True also on a CPU: training changes the tensors while the copies are written.
        gathered = gather_to_main({name: tensor.detach().to("cpu", copy=True) for name, tensor in mine.items()})
        if gathered is None:
            return None
        on_gpu = self.accelerator.device.type == "cuda"
        shared = {"student": self.parameters(), "teacher": self.teacher.state_dict(), "optimizer": self.momentum()}
        for file, tensors in shared.items():
            copies = self.host.setdefault(file, {})
            for name, tensor in tensors.items():
                if name not in copies:
                    copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
                copies[name].copy_(tensor.detach(), non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize(self.accelerator.device)
        by_device = {
            name: in_device_order([tensors.pop(name) for tensors in gathered])
            for name in ("rows", "positions")
            if name in gathered[0]
        }
        processes = {f"{rank}.{name}": tensor for rank, own in enumerate(gathered) for name, tensor in own.items()}
        return {**self.host, "processes": {**processes, **by_device}}

    def restore(self, files: Files | None, manifest: Mapping[str, object]) -> tuple[list[Tensor], Tensor | None]:
        """Restore the state of a checkpoint that any number of processes has saved. A collective call.

        Args:
            files: the tensors of the checkpoint on process 0, which sends them to the others, so that machines need
                not share a disk.
            manifest: the manifest of the checkpoint.

        Returns:
            (2,) loss and spread of each sub-batch of this process since the last line of metrics.
            (V, 2) where each virtual device resumes in a stream; None without a stream.

        Raises:
            ValueError: the tensors are those of another network.
        """
        files = broadcast_from_main(files)
        copy_tensors(files["teacher"], self.teacher.state_dict())
        rank, saved = self.accelerator.process_index, manifest["num_processes"]
        prefix = f"{rank % saved}."
        own = {
            name.removeprefix(prefix): tensor for name, tensor in files["processes"].items() if name.startswith(prefix)
        }
        copy_tensors(files["student"], self.parameters())
        copy_tensors({name: tensor for name, tensor in own.items() if name.startswith("buffer.")}, self.buffers())
        inner = inner_optimizer(self.optimizer)
        inner.state.clear()
        parameters = dict(self.student.named_parameters())
        for name, tensor in files["optimizer"].items():
            key, _, parameter_name = name.partition(".")
            parameter = parameters[parameter_name]
            # The optimizer creates it on the device, in the memory format of the parameter.
            inner.state[parameter][key] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        scaler = self.accelerator.scaler
        if scaler is not None and manifest.get("gradient_scaler"):
            scaler.load_state_dict(manifest["gradient_scaler"])
        if saved == self.accelerator.num_processes:
            set_random_state(own)
        rows = files["processes"]["rows"][rank :: self.accelerator.num_processes].to(self.accelerator.device)
        return list(rows), files["processes"].get("positions")

    def parameters(self) -> dict[str, Tensor]:
        """Return the student's parameters."""
        return dict(self.student.named_parameters())

    def buffers(self) -> dict[str, Tensor]:
        """Return the student's buffers: running statistics, which differ between processes and are never used."""
        return {f"buffer.{name}": buffer for name, buffer in self.student.named_buffers()}

    def momentum(self) -> dict[str, Tensor]:
        """Return the tensors that the optimizer keeps for each parameter, by `KEY.PARAMETER`."""
        state = inner_optimizer(self.optimizer).state
        return {
            f"{key}.{name}": value
            for name, parameter in self.student.named_parameters()
            for key, value in state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def architecture(self) -> dict[str, object] | None:
        """Return the configuration of the encoder as JSON types; None if it is no transformers model."""
        encoder = self.teacher.encoder
        return json.loads(encoder.config.to_json_string()) if isinstance(encoder, PreTrainedModel) else None

    def gradient_scaler(self) -> dict[str, object] | None:
        """Return the state of the gradient scaler; None without one, that is, without float16."""
        return None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that Accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def in_device_order(rows: Sequence[Tensor]) -> Tensor:
    """Merge rows or positions of all processes, each (steps · turns, 2), in the order of steps and virtual devices.

    Processes take the virtual devices in turn, so the rows of process r of W are r, r + W, r + 2 W, ..., for any W.
    """
    return torch.stack(list(rows), dim=1).flatten(0, 1)


@torch.no_grad()
def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy each tensor of `source` into the tensor of that name in `target`.

    Raises:
        ValueError: names or shapes differ.
    """
    differing = sorted(target.keys() ^ source.keys())
    differing += [name for name in target.keys() & source.keys() if target[name].shape != source[name].shape]
    if differing:
        raise ValueError(f"{count(len(differing), 'tensor')} of another network, the first of them {differing[0]}")
    for name, tensor in target.items():
        tensor.copy_(source[name])


def get_random_state() -> dict[str, Tensor]:
    """Return the state of this process's global random generators.

    Training itself does not draw from them, but an encoder with dropout or stochastic depth does.
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
    """Restore the state of this process's global random generators."""
    torch.set_rng_state(state["random.torch"])
    gauss = state["random.python_gauss"].tolist()
    random.setstate((3, tuple(state["random.python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["random.numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, state["random.numpy_gauss"].item()))
    if "random.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random.cuda"])

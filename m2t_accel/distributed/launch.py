"""A launch that is what its file promised: every process there, each with a device of its own."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import socket
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

from m2t_accel.config.data import TrainingSettings, check_num_processes
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.distributed.processes import PATIENCE, create_groups

FILES = (
    "use accelerate_configs/cpu.yaml (1 process), cpu2.yaml (2), 1gpu.yaml or 8gpu.yaml, with --num_processes N "
    "for another number of GPUs"
)

# NCCL ends a process at its timeout, without a word of ours: gloo is to find out first that another hangs.
NCCL_GRACE = timedelta(minutes=1)


def start_accelerator(
    config: TrainingSettings | None = None,
    tracker: str = "none",
    project_dir: str | None = None,
    timeout: timedelta = PATIENCE,
) -> Accelerator:
    """The Accelerator of this launch; its gradient accumulation is set for the virtual devices where training has them.

    timeout: how long a process waits for the others in a collective call of tensors.

    Raises:
        ConfigurationError: the launch is not what its file promises, or the processes cannot share the batch.
    """
    num_devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    check_launch(os.environ, num_devices, read_promise(launcher_arguments()))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    num_steps = 1
    if config is not None:
        check_num_processes(config, world_size)
        num_steps = config.num_virtual_devices // world_size
    route_gloo(os.environ)
    accelerator = Accelerator(
        cpu=wants_cpu(os.environ),
        # As a plugin, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS would override a number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=num_steps, sync_with_dataloader=False),
        kwargs_handlers=[
            # The student's running statistics serve nothing; those of the teacher are averaged on commit.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timeout if wants_cpu(os.environ) else timeout + NCCL_GRACE),
        ],
        log_with=None if tracker == "none" else tracker,
        project_dir=project_dir,
    )
    if accelerator.num_processes != world_size:
        raise ConfigurationError(
            f"{world_size} processes were launched but Accelerate joined {accelerator.num_processes}, and each would "
            f"train alone: {FILES}"
        )
    create_groups(timeout)
    return accelerator


@dataclass(frozen=True)
class Promise:
    """What the command `accelerate launch` and its file promise."""

    num_processes: int = 1
    on_gpu: bool = False


def read_promise(words: list[str] | None) -> Promise:
    """What `accelerate launch WORDS` promises; without a launcher, or without a file, one process on any device."""
    if words is None:
        return Promise()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            arguments, _ = launch_command_parser().parse_known_args(words)
        file = load_config_from_file(arguments.config_file) if arguments.config_file else None
    except (SystemExit, OSError, ValueError, KeyError):  # the launcher understood its command; its words may change
        return Promise()
    if file is None:
        return Promise(arguments.num_processes or 1)
    return Promise(arguments.num_processes or file.num_processes or 1, on_gpu=not (file.use_cpu or arguments.cpu))


def check_launch(environment: Mapping[str, str], num_devices: int, promise: Promise) -> None:
    """Check that the launch started the processes that it was asked for, each with a device of its own.

    Accelerate starts in silence: one process for MULTI_CPU or for several processes of a one-process file, and
    eight that know nothing of one another for an 8-GPU file on a machine without GPUs.

    Raises:
        ConfigurationError: it did not; the message says which file to use.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    local_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
    if world_size == 1 and promise.num_processes > 1:
        raise ConfigurationError(
            f"{promise.num_processes} processes were asked for but one was started (distributed_type NO and MULTI_CPU "
            "start one): for two processes without GPUs use accelerate_configs/cpu2.yaml, for GPUs 8gpu.yaml with "
            "--num_processes N"
        )
    if wants_cpu(environment):
        return
    if num_devices == 0 and (local_size > 1 or promise.on_gpu):
        started = "1 process was" if local_size == 1 else f"{local_size} processes were"
        raise ConfigurationError(f"{started} started for GPUs, but this machine has none: {FILES}")
    if local_size > max(num_devices, 1):
        raise ConfigurationError(
            f"{local_size} processes were started on a machine with {num_devices} GPUs: add --num_processes "
            f"{num_devices}, or {FILES}"
        )


def wants_cpu(environment: Mapping[str, str]) -> bool:
    """Whether the launch asks for CPUs: `use_cpu` of one process, or all GPUs hidden (cpu2.yaml's `gpu_ids: -1,-1`)."""
    hidden = set(environment.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")) == {"-1"}
    return hidden or environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def route_gloo(environment: MutableMapping[str, str]) -> None:
    """Between machines, let gloo use the network that leads to the first one, unless GLOO_SOCKET_IFNAME says another.

    By itself it takes the address of the host's name, which on many machines is that of the machine alone.
    """
    several = environment.get("LOCAL_WORLD_SIZE", "1") != environment.get("WORLD_SIZE", "1")
    if not several or "GLOO_SOCKET_IFNAME" in environment or "MASTER_ADDR" not in environment:
        return
    with contextlib.suppress(OSError):  # gloo then says what is wrong
        host, port = environment["MASTER_ADDR"], int(environment.get("MASTER_PORT", "29500"))
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram: nothing is sent
            mine = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if mine in (each.address for each in addresses):
                environment["GLOO_SOCKET_IFNAME"] = name


def launcher_arguments() -> list[str] | None:
    """The words after `accelerate launch` of the process that started this one, or None."""
    parent = psutil.Process().parent()
    words = parent.cmdline() if parent is not None else []
    for i, word in enumerate(words):
        if Path(word).name == "accelerate" and words[i + 1 : i + 2] == ["launch"]:
            return words[i + 2 :]
        if word == "accelerate.commands.launch":
            return words[i + 1 :]
    return None


def command() -> str:
    """The command line that started this run, with its launcher where there is one, as one would type it."""
    words = launcher_arguments()
    return shlex.join(["python", *sys.argv] if words is None else ["accelerate", "launch", *words])


def num_cores() -> int:
    """Cores that this process may use, where the system can say so; macOS cannot."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(accelerator: Accelerator) -> str:
    """The devices in words, such as `8 × NVIDIA H200, bf16`."""
    if accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name(accelerator.device)
    else:
        name = f"{accelerator.device.type} ({torch.get_num_threads()} threads)"
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    return f"{accelerator.num_processes} × {name}, {precision}"

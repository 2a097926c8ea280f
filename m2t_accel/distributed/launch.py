"""Check that the launch started the requested processes on the requested devices, and start the Accelerator."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import math
import os
import shlex
import socket
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from m2t_accel.config.data import TrainingSettings, check_num_processes
from m2t_accel.config.fields import ConfigurationError, count, one_line
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.distributed.device import check_gpu, keep_freed_memory, set_up_computation
from m2t_accel.distributed.processes import create_groups

CONFIG_FILES = (
    "use accelerate_configs/cpu.yaml (1 process), cpu2.yaml (2), 1gpu.yaml or 8gpu.yaml, with --num_processes N "
    "for another number of GPUs"
)

# Ways of Accelerate to divide networks among devices, by the variable that the launcher sets for them.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}

CGROUPS = Path("/sys/fs/cgroup")  # in a container, the files of its limits

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # modes of torch.compile

OUTSIDE = "192.0.2.1"  # an address that no machine has (RFC 5737); only the default route leads to it

MIN_SHARED_SIZE = 64  # pixels of an image whose operators several threads share

# NCCL aborts a process at its timeout, before any message can be printed. With this margin, gloo times out first.
NCCL_GRACE = timedelta(minutes=1)
TIMEOUT = timedelta(hours=2)  # of a collective call where there is no --collective_timeout
COMPILE_TIMEOUT = timedelta(minutes=30)


def start_accelerator(
    config: TrainingSettings | None = None,
    timeout: timedelta = TIMEOUT,
) -> Accelerator:
    """Create the Accelerator of this launch, and the groups for collective calls.

    Args:
        config: settings of a training; its virtual devices are divided among the processes, and the rest is gradient
            accumulation. None: no training.
        timeout: how long a process waits for the others in a collective call of tensors.

    Raises:
        ConfigurationError: the launch did not start the requested processes, or they cannot share the batch, or torch
            cannot use the GPU.
    """
    num_devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    request = read_request(launcher_arguments())
    check_launch(os.environ, num_devices, request)
    check_options(os.environ, num_devices, request, config)
    set_up_computation(config is not None and config.deterministic)
    if not torch.cuda.is_available() or wants_cpu(os.environ):
        keep_freed_memory(True)
    else:
        check_gpu(int(os.environ.get("LOCAL_RANK", "0")), os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower())
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    num_steps = 1
    if config is not None:
        check_num_processes(config, world_size)
        num_steps = config.num_virtual_devices // world_size
    route_gloo(os.environ)
    limit_threads(None if config is None else config.image_size)
    try:
        accelerator = Accelerator(
            cpu=wants_cpu(os.environ),
            # A plugin, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS would override a number.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=num_steps, sync_with_dataloader=False),
            kwargs_handlers=[
                # Nothing reads the student's running statistics; the teacher averages its own when it commits them.
                # Gradients that are views of the buckets are not copied back, and need no memory of their own.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timeout if wants_cpu(os.environ) else timeout + NCCL_GRACE),
            ],
        )
    except (ValueError, ImportError) as error:  # an option that this version or this device cannot do
        raise ConfigurationError(
            f"accelerate cannot start with the options of this launch ({one_line(error)}): {CONFIG_FILES}"
        ) from error
    if accelerator.distributed_type == DistributedType.XLA:
        raise ConfigurationError(f"TPUs are not supported: {CONFIG_FILES}")
    if accelerator.num_processes != world_size:
        raise ConfigurationError(
            f"{world_size} processes were launched but Accelerate joined {accelerator.num_processes}, and each would "
            f"train alone: {CONFIG_FILES}"
        )
    create_groups(timeout)
    return accelerator


class LaunchRequest(NamedTuple):
    """Processes and devices that `accelerate launch` and its configuration file ask for."""

    num_processes: int = 1
    on_gpu: bool = False
    accumulation: int = 1  # --gradient_accumulation_steps, which the launcher passes on for DeepSpeed only


def read_request(arguments: Sequence[str] | None) -> LaunchRequest:
    """Read the arguments of `accelerate launch`; without a launcher or a file, every device is allowed.

    The environment is no substitute: clusters also set the MASTER_ADDR that a launch of several processes sets.
    """
    if arguments is None:
        return LaunchRequest()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            given, _ = launch_command_parser().parse_known_args(arguments)
        file = load_config_from_file(given.config_file) if given.config_file else None
    except (SystemExit, OSError, ValueError, KeyError):  # another version of the launcher may have other arguments
        return LaunchRequest()
    accumulation = given.gradient_accumulation_steps or 1
    if file is None:
        return LaunchRequest(given.num_processes or 1, accumulation=accumulation)
    on_gpu = not (file.use_cpu or given.cpu)
    return LaunchRequest(given.num_processes or file.num_processes or 1, on_gpu, accumulation)


def check_options(
    environment: Mapping[str, str], num_devices: int, request: LaunchRequest, config: TrainingSettings | None
) -> None:
    """Check that the launch asks for nothing that Accelerate would ignore, or that this project cannot do.

    Args:
        environment: environment variables of this process.
        num_devices: GPUs of this machine.
        request: what the launch asked for.
        config: settings of a training, or None.

    Raises:
        ConfigurationError: an option is not supported; the message says what to type.
    """
    for variable, name in SHARDING.items():
        if environment.get(variable, "").lower() in ("1", "true", "yes"):
            raise ConfigurationError(
                f"{name} ({variable}) is not supported, because each device holds whole networks: leave out its flags "
                f"of accelerate launch, and {CONFIG_FILES}"
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    on_gpu = num_devices > 0 and not wants_cpu(environment)
    allowed = ("no", "bf16", "fp16") if on_gpu else ("no", "bf16")
    if precision not in allowed:
        place = "on a GPU" if on_gpu else "on a CPU"
        raise ConfigurationError(f"--mixed_precision {precision} is not supported {place}: one of {', '.join(allowed)}")
    world_size = number_in(environment, "WORLD_SIZE")
    mode = environment.get("ACCELERATE_DYNAMO_MODE", "default").lower()
    is_compiled = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"
    has_sub_batches = config is not None and config.num_virtual_devices > world_size
    if mode in CUDA_GRAPH_MODES and is_compiled and on_gpu and has_sub_batches:
        raise ConfigurationError(
            f"--dynamo_mode {mode} records CUDA graphs, which a step of several sub-batches on a GPU would overwrite: "
            "leave it out"
        )
    steps = max(request.accumulation, number_in(environment, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"))
    if steps > 1 and (config is None or config.num_virtual_devices != steps * world_size):
        advice = "leave it out"
        if config is not None:
            size = config.device_batch_size
            advice = (
                f"type --batch_size {size * steps * world_size} --device_batch_size {size} after the script instead"
            )
        raise ConfigurationError(
            f"--gradient_accumulation_steps {steps} of accelerate launch is not read, because the accumulation follows "
            f"from batch_size / device_batch_size / processes: {advice}"
        )


def number_in(environment: Mapping[str, str], name: str) -> int:
    """Return the number in a variable; 1 if it is missing or no number."""
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 1


def check_launch(environment: Mapping[str, str], num_devices: int, request: LaunchRequest) -> None:
    """Check that the launch started the requested processes, each with its own device.

    Accelerate reports neither of two mistakes: MULTI_CPU, or `--num_processes N` with a one-process file, starts one
    process; an 8-GPU file on a machine without GPUs starts eight processes that each train alone.

    Args:
        environment: environment variables of this process.
        num_devices: GPUs of this machine.
        request: processes and devices that the launch asked for.

    Raises:
        ConfigurationError: the processes or devices are not the requested ones; the message names the file to use.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    local_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
    if world_size == 1 and request.num_processes > 1:
        raise ConfigurationError(
            f"{request.num_processes} processes were requested but one was started (distributed_type NO and MULTI_CPU "
            "start one): for two processes without GPUs use accelerate_configs/cpu2.yaml, for GPUs 8gpu.yaml with "
            "--num_processes N"
        )
    if wants_cpu(environment):
        return
    if num_devices == 0 and (local_size > 1 or request.on_gpu):
        started = "1 process was" if local_size == 1 else f"{local_size} processes were"
        raise ConfigurationError(f"{started} started for GPUs, but this machine has none: {CONFIG_FILES}")
    if local_size > max(num_devices, 1):
        raise ConfigurationError(
            f"{local_size} processes were started on a machine with {count(num_devices, 'GPU')}: add --num_processes "
            f"{num_devices}, or {CONFIG_FILES}"
        )


def wants_cpu(environment: Mapping[str, str]) -> bool:
    """Return whether the launch asks for CPUs: by `use_cpu`, or by hiding all GPUs as cpu2.yaml does."""
    hidden = set(environment.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")) == {"-1"}
    return hidden or environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def compiles_networks() -> bool:
    """Return whether the launch asks for torch.compile: `accelerate launch --dynamo_backend inductor`."""
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"


def collective_timeout(config: PretrainConfig) -> timedelta:
    """Return how long a process waits for the others in a step: at least COMPILE_TIMEOUT where networks are compiled.

    A process that is still compiling in the first step is not lost. A process that has ended is reported at once.
    """
    timeout = timedelta(minutes=config.collective_timeout)
    return max(timeout, COMPILE_TIMEOUT) if compiles_networks() else timeout


def route_gloo(environment: MutableMapping[str, str]) -> None:
    """Make gloo use the network interface that leads to the first machine, unless GLOO_SOCKET_IFNAME is set.

    By default gloo uses the address of the host name, which on many machines is a loopback address. The first machine
    may reach itself by a loopback address, too: Debian writes `127.0.1.1 NAME` into its /etc/hosts. It then takes the
    interface of the default route.
    """
    several_machines = environment.get("LOCAL_WORLD_SIZE", "1") != environment.get("WORLD_SIZE", "1")
    if not several_machines or "GLOO_SOCKET_IFNAME" in environment or "MASTER_ADDR" not in environment:
        return
    with contextlib.suppress(OSError):  # gloo then reports the error itself
        own_address = source_address(environment["MASTER_ADDR"])
        if ipaddress.ip_address(own_address).is_loopback:
            with contextlib.suppress(OSError):  # no default route
                own_address = source_address(OUTSIDE)
        for name, addresses in psutil.net_if_addrs().items():
            if own_address in (each.address for each in addresses):
                environment["GLOO_SOCKET_IFNAME"] = name


def source_address(host: str) -> str:
    """Return the address from which this machine reaches the host."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]  # any port
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # a datagram socket sends nothing
        return probe.getsockname()[0]


def launcher_arguments() -> list[str] | None:
    """Return the arguments of the `accelerate launch` that started this process, or None."""
    words = []
    with contextlib.suppress(psutil.Error):  # the parent has just ended, or belongs to another user
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    for i, word in enumerate(words):
        if Path(word).name == "accelerate" and words[i + 1 : i + 2] == ["launch"]:
            return words[i + 2 :]
        if Path(word).name in ("accelerate-launch", "accelerate.commands.launch"):
            return words[i + 1 :]
    return None


def command() -> str:
    """Return the command that started this run, including its launcher, ready to paste into a shell."""
    arguments = launcher_arguments()
    return shlex.join(["python", *sys.argv] if arguments is None else ["accelerate", "launch", *arguments])


def num_cores() -> int:
    """Return the number of cores that this process may use; on macOS, all cores of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, container_quota(CGROUPS))))


def container_quota(cgroups: Path) -> float:
    """Return the number of cores whose time a container may use, such as 2.0 after `docker run --cpus 2`."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # of cgroups 2 and 1
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word `max`
            quota, period = (int(word) for name in names for word in (cgroups / name).read_text().split())
            if quota > 0:  # -1 is no limit
                return quota / period
    return math.inf


def num_local_processes() -> int:
    """Return the number of processes of this launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


_num_threads = (0, 0)  # of torch before and after the last call of limit_threads


def limit_threads(image_size: int | None) -> None:
    """Use no more threads than there are cores for this process, unless the user has chosen their number.

    accelerate launch and torch count the cores of the machine, also those that a container or SLURM withholds. For
    images below MIN_SHARED_SIZE pixels use one thread: the work of an operator is too small to divide.
    """
    arguments, environment = launcher_arguments(), os.environ
    if arguments is not None:  # it sets OMP_NUM_THREADS itself
        with contextlib.suppress(psutil.Error):
            environment = psutil.Process().parent().environ()
    by_flag = any(word.replace("-", "_").startswith("__num_cpu_threads_per_process") for word in arguments or ())
    if not by_flag and "OMP_NUM_THREADS" not in environment:
        global _num_threads
        before, limited = _num_threads
        if torch.get_num_threads() != limited:  # not the limit of an earlier run in this process
            before = torch.get_num_threads()
        most = num_cores() // num_local_processes()
        if image_size is not None and image_size < MIN_SHARED_SIZE:
            most = 1
        _num_threads = before, min(before, max(1, most))
        torch.set_num_threads(_num_threads[1])


def hardware(accelerator: Accelerator) -> str:
    """Describe the devices and the precision, such as `8 × NVIDIA H200, bf16`."""
    if accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name(accelerator.device)
    else:
        name = f"{accelerator.device.type} ({count(torch.get_num_threads(), 'thread')})"
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    return f"{accelerator.num_processes} × {name}, {precision}"

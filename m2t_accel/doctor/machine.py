"""The machine and the launch: versions, devices, memory, files, disk, and the output folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import psutil
import torch
from accelerate import Accelerator
from transformers import PretrainedConfig

from m2t_accel import __version__
from m2t_accel.config.fields import count
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.hub_datasets import size_of_copy
from m2t_accel.data.loader import PREFETCH, default_num_workers
from m2t_accel.distributed.launch import CGROUPS, hardware, num_cores, num_local_processes, wants_cpu
from m2t_accel.doctor.findings import BAD, DOUBTFUL, GOOD, Finding, gigabytes
from m2t_accel.model import Teacher, create_encoder, create_student
from m2t_accel.run.checkpoint import list_checkpoints
from m2t_accel.run.folder import Start

SHARED_MEMORY = "/dev/shm"
# The files of a container's limit, use and kinds of memory, and the word for inactive files; of cgroups 2 and 1.
MEMORY_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
LOCKS = (32_000, 12_000)  # bytes in SHARED_MEMORY: of a loader, and of each of its workers
NCCL_SHARED = 64 * 2**20  # Docker's default, which NCCL exceeds between several GPUs
FILES, FILES_PER_WORKER = 128, 8  # open files: of a run with its dataset, and of each worker


def check_versions() -> Iterator[Finding]:
    """Yield the versions of the libraries that the results depend on."""
    names = ("torch", "accelerate", "transformers", "datasets")
    found = [f"m2t_accel {__version__}", *(f"{name} {importlib.metadata.version(name)}" for name in names)]
    yield Finding(GOOD, "versions", ", ".join(found))


def check_devices() -> Iterator[Finding]:
    """Yield the devices, and the precisions in which they compute fast."""
    memory = psutil.virtual_memory()
    cpu = f"{count(num_cores(), 'core')} ({torch.backends.cpu.get_cpu_capability()}), {gigabytes(memory.total)}"
    if torch.cuda.is_available() and not wants_cpu(os.environ):
        found = Counter(describe_gpu(index) for index in range(torch.cuda.device_count()))
        for text, number in found.items():
            yield Finding(GOOD, "GPU", f"{number} × {text}")
        yield Finding(GOOD, "CPU", cpu)
        return
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked == "bf16" and not has_bf16:
        yield Finding(
            DOUBTFUL,
            "CPU",
            f"{cpu}; without AVX-512 it emulates bf16, many times slower than float32: leave out --mixed_precision",
        )
    else:
        yield Finding(GOOD, "CPU", f"{cpu}; float32{', bf16' if has_bf16 else ', not bf16'}; no GPU is used")


def describe_gpu(index: int) -> str:
    """Return the name and the memory of a GPU, and the precisions in which it computes fast."""
    properties = torch.cuda.get_device_properties(index)
    precisions = "bf16, fp16" if torch.version.cuda is None or properties.major >= 8 else "fp16, not bf16"
    return f"{properties.name}, {gigabytes(properties.total_memory)}; float32, {precisions}"


def check_memory(config: PretrainConfig) -> Iterator[Finding]:
    """Yield whether the main memory holds the batches of the workers, and shared memory their locks."""
    local, workers = num_local_processes(), workers_of(config)
    pixels = 2 * config.device_batch_size * config.image_size**2 * 3
    batches = local * (workers * PREFETCH + 2) * pixels
    available = available_memory()
    needed = f"{gigabytes(batches)} for the batches of {count(local * workers, 'worker')}"
    if batches > available:
        yield Finding(
            BAD,
            "memory",
            f"{needed}, but {gigabytes(available)} are free: give a smaller --num_workers or --device_batch_size",
        )
    else:
        yield Finding(
            DOUBTFUL if batches > 0.5 * available else GOOD, "memory", f"{needed}; {gigabytes(available)} are free"
        )
    if not workers or not os.path.isdir(SHARED_MEMORY):
        return
    locks, free = local * (LOCKS[0] + LOCKS[1] * workers), free_bytes(SHARED_MEMORY)
    text = f"{SHARED_MEMORY} has {gigabytes(free)} free, the locks of the workers take {gigabytes(locks)}"
    if locks > free:
        text += ": type --num_workers 0, or enlarge it (docker run --shm-size 1g)"
        yield Finding(BAD, "shared memory", text)
    elif local > 1 and torch.cuda.is_available() and free <= NCCL_SHARED:
        text += "; NCCL may need more between GPUs: enlarge it (docker run --shm-size 1g)"
        yield Finding(DOUBTFUL, "shared memory", text)
    else:
        yield Finding(GOOD, "shared memory", text)


def workers_of(config: PretrainConfig) -> int:
    """Return the number of workers of a process."""
    return default_num_workers() if config.num_workers is None else config.num_workers


def available_memory() -> int:
    """Return the bytes of main memory that are free, also within the limit of a container.

    What a container uses includes the files that it has read. The kernel drops those that are inactive when memory is
    needed, so they count as free, as in Kubernetes.
    """
    free = psutil.virtual_memory().available
    for limit, used, statistics, inactive in MEMORY_FILES:
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word `max`
            limit, used = (int((CGROUPS / name).read_text()) for name in (limit, used))
            found = dict(line.split() for line in (CGROUPS / statistics).read_text().splitlines())
            return min(free, limit - used + int(found.get(inactive, 0)))
    return free


def free_bytes(folder: str | Path) -> int:
    """Return the free space of the disk that a folder, which may not exist yet, is on."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def check_open_files(config: PretrainConfig) -> Iterator[Finding]:
    """Yield whether a process may open as many files as it needs."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES + FILES_PER_WORKER * workers_of(config)
    text = f"{limit:,} are allowed, about {needed} are needed"
    if limit < needed:
        more = f"type `ulimit -n {min(4096, most)}`" if most >= needed else "raise the limit in limits.conf"
        yield Finding(BAD, "open files", f"{text}: {more} first, or give a smaller --num_workers")
    else:
        yield Finding(GOOD, "open files", text)


def checkpoint_bytes(config: PretrainConfig, architecture: PretrainedConfig | None = None) -> tuple[int, int]:
    """Return the bytes of a checkpoint of this model, and of the encoder that a run leaves."""
    encoder = create_encoder(config.encoder, architecture)
    student = create_student(encoder, config.image_size, config.hidden_size, config.projection_size, config.encoder)
    teacher = Teacher(student)
    weights = sum(each.numel() * each.element_size() for each in student.parameters())
    followed, encoder = (
        sum(each.numel() * each.element_size() for each in module.state_dict().values())
        for module in (teacher, teacher.encoder)
    )
    buffers = sum(each.numel() * each.element_size() for each in student.buffers())
    return 2 * weights + followed + buffers, encoder  # the weights and the momentum of the optimizer


def check_disk(config: PretrainConfig, architecture: PretrainedConfig | None = None) -> Iterator[Finding]:
    """Yield whether the disk of the output folder holds the checkpoints that --keep asks for, and the encoder.

    A new checkpoint is complete before the oldest one is removed, so there is one more for a moment.
    """
    size, encoder = checkpoint_bytes(config, architecture)
    last, every = config.keep
    written = min(len(list_checkpoints(Path(config.output_dir) / "checkpoints")), last)
    needed, free = (last + 1 - written) * size + encoder, free_bytes(config.output_dir)
    text = (
        f"{gigabytes(needed)} for {count(last + 1 - written, 'checkpoint')} of {gigabytes(size)} and the encoder; "
        f"{gigabytes(free)} are free at {config.output_dir}"
    )
    if every:
        text += f"; --keep {last} {every} keeps one of {every} for ever, {gigabytes(size)} each"
    if needed > free:
        fewer = (free - encoder) // size - 1 + written
        advice = f"type --keep {fewer} {every}" if 1 <= fewer < last else "make room"
        yield Finding(BAD, "disk", f"{text}: {advice}, or give an --output_dir on another disk")
    else:
        yield Finding(DOUBTFUL if needed > 0.8 * free else GOOD, "disk", text)


def missing_copy(config: PretrainConfig) -> bool:
    """Return whether a start would first copy the dataset into the cache."""
    return copies_from_hub(config) and size_of_copy(config) != 0


def copies_from_hub(config: PretrainConfig) -> bool:
    """Return whether the dataset is one on the Hub that is not streamed."""
    return config.dataset != "digits" and not config.streaming and not os.path.exists(config.dataset)


def check_cache(config: PretrainConfig) -> Iterator[Finding]:
    """Yield whether the disk of the cache holds the copy of the dataset, if the run makes one."""
    cache = str(datasets.config.HF_DATASETS_CACHE)
    free = min(free_bytes(cache), free_bytes(huggingface_hub.constants.HF_HUB_CACHE))
    move = "set HF_HOME to a folder on another disk, or read in place with --streaming"
    if copies_from_hub(config):
        needed = size_of_copy(config)
        if needed == 0:
            yield Finding(GOOD, "cache", f"the dataset is already in {cache}")
        elif needed is None:
            yield Finding(
                DOUBTFUL,
                "cache",
                f"the run copies the dataset, whose size the Hub does not say; {gigabytes(free)} are free: else {move}",
            )
        elif needed > free:
            yield Finding(
                BAD, "cache", f"the dataset and its copy take {gigabytes(needed)}, {gigabytes(free)} are free: {move}"
            )
        else:
            yield Finding(
                GOOD, "cache", f"the run first copies {gigabytes(needed)} into {cache}; {gigabytes(free)} are free"
            )
    elif os.path.isdir(config.dataset) and not config.streaming:
        folder = Path(config.dataset)
        needed = sum(path.stat().st_size for pattern in ("*.parquet", "*/*.parquet") for path in folder.glob(pattern))
        if needed > free:
            yield Finding(
                DOUBTFUL,
                "cache",
                f"a copy of the parquet files takes {gigabytes(needed)}, {gigabytes(free)} are free; this fails unless "
                f"an earlier start has made it: {move}",
            )


def describe_start(config: PretrainConfig, start: Start) -> Iterator[Finding]:
    """Yield where the run would start: in a new folder, from a checkpoint, or nowhere because it is complete."""
    if start.complete:
        text = f"{config.output_dir} holds the complete run: the command would train nothing; give another --output_dir"
        yield Finding(DOUBTFUL, "output", text)
    elif start.checkpoint is not None:
        yield Finding(GOOD, "output", f"resumes from {start.checkpoint.path}")
    else:
        yield Finding(GOOD, "output", f"{config.output_dir} is free for a new run")
    for remark in start.remarks:
        yield Finding(DOUBTFUL, "output", remark)


def check_processes(config: PretrainConfig, accelerator: Accelerator) -> Iterator[Finding]:
    """Yield how the batch is divided among the processes, and whether GPUs are left unused."""
    devices, processes = config.num_virtual_devices, accelerator.num_processes
    text = f"{hardware(accelerator)}; {config.batch_size} images a step = {devices} × {config.device_batch_size}"
    if devices > processes:
        text += f", {devices // processes} in turn on each"
    yield Finding(GOOD, "processes", text)
    present, local = torch.cuda.device_count() if torch.cuda.is_available() else 0, num_local_processes()
    if present > local:
        yield Finding(
            DOUBTFUL,
            "processes",
            f"{present} GPUs are here, {local if accelerator.device.type == 'cuda' else 'none'} used: accelerate "
            f"launch --config_file accelerate_configs/8gpu.yaml --num_processes {present}",
        )

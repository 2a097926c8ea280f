"""Benchmark of the optimizer step: this project's beside a plain one, a peer's and the least work, in one run."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib.metadata
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import psutil
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from m2t_accel.benchmark.variants import VARIANTS, Step, Work, create_work
from m2t_accel.config.data import check_enough_images
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.loader import create_loader, dead_workers_in_one_line, read
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.sources import load_images
from m2t_accel.data.views import TwoViews
from m2t_accel.distributed.launch import hardware, limit_threads, start_accelerator
from m2t_accel.distributed.processes import gather_to_all, on_all_processes, wait_for_all
from m2t_accel.run.monitor import DataWait

RANDOM = "random"  # the dataset of random pixels, which is not read from anywhere
ON_SEVERAL_PROCESSES = ("eager", "compiled", "monitored", "floor")
DATA_STEPS = 20  # steps in which the wait for batches is measured

# Groups of a profile: the first one whose words are in the name of an operator, or of a part of the step around it.
PARTS = ("photometry", "teacher's statistics", "teacher's weights", "monitor", "Optimizer.step")
GROUPS: Mapping[str, str] = {
    "compiled kernels": r"fused|triton|Compiled",
    "communication": r"nccl|gloo|c10d|all_?reduce",
    "convolution": r"conv",
    "batch norm": r"batch_?norm",
    "linear": r"\b(addmm|mm|matmul)\b|linear",
    "copies and fills": r"copy|_to\b|contiguous|clone|cat\b|stack|fill|zero|empty|Memcpy|Memset",
    "ReLU, sums and other operators": r"",
}
OUTSIDE = "outside of operators"
LAUNCH = re.compile(r"cu(da)?(LaunchKernel|GraphLaunch)")  # functions of the CUDA runtime and driver


def benchmark_step(
    config: PretrainConfig,
    names: Sequence[str] = (),
    steps: int | None = None,
    repeats: int = 7,
    trace: str | None = None,
) -> dict[str, object]:
    """Measure an optimizer step of each variant, in turns. A collective call.

    A line is printed for each variant that cannot run here. Each process has one sub-batch in a step.

    Args:
        config: settings of the step; if its dataset is not RANDOM, the wait for its images is measured, too.
        names: variants to measure (default: all that fit but `monitored`; on a CPU without `compiled`).
        steps: steps of a variant before the next one has its turn (default: 10 on a GPU, else 1).
        repeats: turns of each variant.
        trace: file for a trace of one step of each variant.

    Returns:
        The figures, and the settings they depend on. Times are those of the slowest process.

    Raises:
        ConfigurationError: the launch, the precision or the images are not usable, or no variant can run.
    """
    accelerator = start_accelerator()
    limit_threads(config.image_size)  # as pretraining does
    check_precision(accelerator.mixed_precision, accelerator.device)
    num_processes, on_gpu = accelerator.num_processes, accelerator.device.type == "cuda"
    config = dataclasses.replace(config, batch_size=config.device_batch_size * num_processes, evaluate_every=0)
    steps = steps or (10 if on_gpu else 1)
    work = create_work(config, accelerator)
    ready, memory = start_variants(names, work)
    seconds = [measure(ready, work, steps, repeats)]
    if num_processes > 1:
        seconds = gather_to_all(seconds[0])
    times = {name: [max(turn) for turn in zip(*(each[name] for each in seconds), strict=True)] for name in ready}
    result = {
        "recipe": config.recipe,
        "encoder": config.encoder,
        "image_size": config.image_size,
        "device_batch_size": config.device_batch_size,
        "processes": num_processes,
        "hardware": hardware(accelerator),
        "software": software(),
        "steps": steps,
        "repeats": repeats,
        "variants": {
            name: {
                "ms": 1000 * statistics.median(times[name]),
                "ms_of_turns": [1000 * each for each in times[name]],
                "images_per_second": config.batch_size / statistics.median(times[name]),
                "megabytes": memory[name],
            }
            for name in ready
        },
        "ratios": ratios(times),
    }
    if on_gpu or trace is not None:
        result["profile"] = profile_variants(ready, work, trace)
    if num_processes > 1 and "eager" in ready:
        result["megabytes_sent"] = megabytes_sent(ready["eager"])
    ours = ready.get("eager", ready.get("compiled"))
    if config.dataset != RANDOM and ours is not None:
        result["data_wait"] = data_wait(ours, work)
    return result


def check_precision(precision: str, device: torch.device) -> None:
    """Check that the device computes fast in this precision.

    Raises:
        ConfigurationError: bf16 on a CPU that has no instructions for it.
    """
    if precision == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ConfigurationError(
            f"--mixed_precision bf16: this CPU ({torch.backends.cpu.get_cpu_capability()}) has no AVX-512 and would "
            "emulate bf16, many times slower than float32: leave the flag out"
        )


def start_variants(names: Sequence[str], work: Work) -> tuple[dict[str, Step], dict[str, float | None]]:
    """Create the variants that can run here, and run two steps of each. Return them, and their megabytes.

    Raises:
        ConfigurationError: none can run here.
    """
    ready, memory, print = {}, {}, work.accelerator.print
    for name in names or [name for name in VARIANTS if name != "monitored"]:
        is_default = not names
        try:
            if work.accelerator.num_processes > 1 and name not in ON_SEVERAL_PROCESSES:
                raise ConfigurationError("is for one process: use cpu.yaml or 1gpu.yaml")
            if name == "compiled":
                if is_default and work.accelerator.device.type != "cuda":
                    raise ConfigurationError("takes minutes to compile: add --variants eager,compiled,floor")
                print("compiled: compiling takes minutes, which are not counted", flush=True)
            ready[name], memory[name] = warm_up(VARIANTS[name], work)
        except ConfigurationError as error:
            print(f"{name} is left out: it {error}", flush=True)
    if not ready:
        raise ConfigurationError("--variants: none of these can run here; type --variants eager,floor")
    return ready, memory


def warm_up(create: Callable[[Work], Step], work: Work) -> tuple[Step, float | None]:
    """Create a step and run it twice. Return it, and the peak of the memory that it takes, in megabytes."""
    device = work.accelerator.device
    before = used_memory(device)
    step = create(work)
    step()  # creates the optimizer's momentum, and compiles
    synchronize(device)
    held = reset_peak(device)
    step()
    synchronize(device)
    return step, None if held is None else (peak_memory(device) - held + max(held - before, 0)) / 1e6


def used_memory(device: torch.device) -> int | None:
    """Return the bytes in use: of torch on a GPU, of the whole process on a CPU; None where it cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory of the variant before would count as in use
    return process_memory("VmRSS")


def reset_peak(device: torch.device) -> int | None:
    """Start a new peak. Return the bytes in use."""
    used = used_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif used is not None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        except OSError:
            return None
    return used


def peak_memory(device: torch.device) -> int:
    """Return the largest number of bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_memory("VmHWM")


def process_memory(name: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure(ready: Mapping[str, Step], work: Work, steps: int, repeats: int) -> dict[str, list[float]]:
    """Run the variants in turns, every second time in reverse. Return the seconds of a step in each turn."""
    device, seconds = work.accelerator.device, {name: [] for name in ready}
    for repeat in range(repeats):
        for name in list(ready)[:: -1 if repeat % 2 else 1]:
            wait_for_all()
            synchronize(device)
            started = time.perf_counter()
            for _ in range(steps):
                ready[name]()
            synchronize(device)
            seconds[name].append((time.perf_counter() - started) / steps)
    return seconds


def ratios(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the speeds of our steps relative to the others, as medians over turns that ran one after the other."""
    return {
        f"{name} / {other}": statistics.median(b / a for a, b in zip(times[name], times[other], strict=True))
        for name in ("eager", "compiled")
        for other in ("plain", "peer", "floor", "monitored")
        if name in times and other in times
    }


def megabytes_sent(step: Step) -> float | None:
    """Return the megabytes that the processes of one machine send over the loopback device in a step, each."""
    wait_for_all()
    before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    wait_for_all()
    step()
    wait_for_all()
    sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
    return sent / 1e6 / torch.distributed.get_world_size()


def profile_variants(ready: Mapping[str, Step], work: Work, trace: str | None) -> dict[str, dict[str, float]]:
    """Profile one step of each variant, and write the trace, which opens in Perfetto.

    Returns:
        For each variant, the milliseconds of each group of operators: of the GPU, else of the CPU; on a GPU also the
        number of `launches`.
    """
    device = work.accelerator.device
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:  # without acc_events torch 2.11 warns
        for name, step in ready.items():
            with record_function(f"variant {name}"):
                step()
                synchronize(device)
    if trace is not None and work.accelerator.is_main_process:
        profiler.export_chrome_trace(trace)
    return group_events(profiler.events(), on_gpu)


def group_events(events: Sequence[FunctionEvent], on_gpu: bool) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each group of operators, and on a GPU the number of `launches`, of each variant."""
    # Kernels, and the ranges that record_function marks on the GPU, are events of their own: the operators that
    # launched the kernels have their times.
    of_host = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = {event.name for event in events if event.is_user_annotation}
    spans = {event.name: event.time_range for event in of_host if event.name.startswith("variant ")}
    found = {name: Counter() for name in spans}
    for event in of_host:
        # By time: the backward of a GPU runs in a thread of its own, in which no operator is below the variant's range.
        start = event.time_range.start
        variant = next((name for name, span in spans.items() if span.start <= start <= span.end), None)
        if variant is None:
            continue
        if LAUNCH.match(event.name):
            found[variant]["launches"] += 1
            continue
        above = [event.name]
        parent = event.cpu_parent
        while parent is not None:
            above.append(parent.name)
            parent = parent.cpu_parent
        microseconds = event.self_cpu_time_total
        if on_gpu:
            microseconds = sum(kernel.duration for kernel in event.kernels if kernel.name not in ranges)
        found[variant][group_of(above)] += microseconds / 1000
    return {name.removeprefix("variant "): dict(groups) for name, groups in found.items()}


def group_of(names: Sequence[str]) -> str:
    """Return the group of an operator, from its name and those of the ranges around it, the innermost first."""
    for part in PARTS:
        if any(name.startswith(part) for name in names):
            return "optimizer" if part == "Optimizer.step" else part
    if names[0].startswith("variant "):
        return OUTSIDE
    return next(group for group, words in GROUPS.items() if re.search(words, names[0]))


def data_wait(step: Step, work: Work) -> dict[str, float]:
    """Return the share of the time in which the device waits for a batch of the dataset, after the first batch."""
    config, accelerator = work.config, work.accelerator
    data = on_all_processes(accelerator, lambda: load_images(config))
    check_enough_images(len(data.train), config)
    requests = DeviceBatches(data.train, config, accelerator.num_processes, accelerator.process_index)
    loader = create_loader(TwoViews(data.train, config), requests, config, accelerator.device)
    wait = DataWait(accelerator.device)
    with dead_workers_in_one_line():
        batches = read(loader, accelerator.device)
        step(next(batches))
        synchronize(accelerator.device)
        started = time.perf_counter()
        for batch in wait.watch(islice(batches, DATA_STEPS)):
            step(batch)
        synchronize(accelerator.device)
        total = time.perf_counter() - started
        wait.add_completed()
        batches.close()
    return {"workers": loader.num_workers, "steps": DATA_STEPS, "share": wait.seconds / total}


def software() -> str:
    """Return the versions, and the vector instructions of the CPU, that the times depend on."""
    versions = [f"torch {torch.__version__}"]
    for name in ("torchvision", "transformers", "lightly"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([*versions, f"CPU with {torch.backends.cpu.get_cpu_capability()}"])


def table(result: Mapping[str, object]) -> str:
    """Format the result as text."""
    variants, profiled = result["variants"], result.get("profile", {})
    lines = [
        f"{result['encoder']}, {result['device_batch_size']} images of {result['image_size']} pixels per device, "
        f"on {result['hardware']}",
        result["software"],
        "",
        f"{'variant':<10}{'ms a step':>11}{'min':>9}{'max':>9}{'images/s':>10}{'memory':>10}"
        + (f"{'launches':>10}" if any("launches" in each for each in profiled.values()) else ""),
    ]
    for name, figures in variants.items():
        turns, memory = figures["ms_of_turns"], figures["megabytes"]
        size = "-" if memory is None else f"{memory:,.0f} MB"
        launches = f"{profiled[name]['launches']:10.0f}" if "launches" in profiled.get(name, {}) else ""
        lines.append(
            f"{name:<10}{figures['ms']:11.1f}{min(turns):9.1f}{max(turns):9.1f}{figures['images_per_second']:10.1f}"
            f"{size:>10}{launches}"
        )
    if profiled:
        groups = sorted({group for each in profiled.values() for group in each} - {"launches"})
        groups.sort(key=lambda group: -max(each.get(group, 0) for each in profiled.values()))
        lines += ["", f"{'ms of one step, profiled':<32}" + "".join(f"{name:>10}" for name in profiled)]
        for group in groups:
            lines.append(f"{group:<32}" + "".join(f"{each.get(group, 0):10.1f}" for each in profiled.values()))
    lines.append("")
    if result["processes"] > 1:
        lines.append(f"images/s are those of all {result['processes']} processes together")
    if "megabytes_sent" in result:
        lines.append(f"sent over the loopback device: {result['megabytes_sent']:.1f} MB a step by each process")
    if "data_wait" in result:
        wait = result["data_wait"]
        lines.append(
            f"data wait: {wait['share']:.2%} of the time of {wait['steps']} steps, with {wait['workers']} workers"
        )
    for name, ratio in result["ratios"].items():
        ours, other = name.split(" / ")
        lines.append(
            f"{ours}: {ratio:.3f} of the {other}" if other == "floor" else f"{ours}: {ratio:.2f} times {other}"
        )
    return "\n".join(lines).rstrip()

"""The speed of the loader, of the steps that it feeds and of an evaluation, measured on this machine."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from transformers import PretrainedConfig

from m2t_accel.benchmark.data import BATCH_SIZE, loader_rate
from m2t_accel.benchmark.step import synchronize, warm_up
from m2t_accel.benchmark.variants import Step, Work, create_work, our_step
from m2t_accel.config.fields import ConfigurationError, count
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.loader import create_loader, dead_workers_in_one_line, read
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.sources import ImageData
from m2t_accel.data.views import TwoViews
from m2t_accel.distributed.device import device_errors_in_one_line
from m2t_accel.distributed.launch import hardware, num_cores, num_local_processes
from m2t_accel.distributed.processes import broadcast_object, gather_to_all
from m2t_accel.doctor.findings import DOUBTFUL, GOOD, Finding, gigabytes, rate
from m2t_accel.doctor.machine import available_memory, workers_of
from m2t_accel.evaluation.knn import measure_knn
from m2t_accel.pretrain import create_step
from m2t_accel.run.report import KNN_NEIGHBOURS, MAX_KNN_BANK, MAX_KNN_QUERIES
from m2t_accel.step import TrainingStep

LOADER_SECONDS = 5.0  # for each number of workers, as in the benchmark of the data path
PROBE = 4  # images of the first step on a CPU, which shows how many can be measured in time
STEP_SECONDS = 6.0  # to measure steps in, if MIN_STEPS take less
MAX_STEP_SECONDS = 60.0  # above it, smaller sub-batches are measured
MIN_STEPS, MAX_STEPS = 5, 100
UNMEASURED = 3  # first steps: those of the warm-up, and one while the workers still fill their buffers
EVALUATION_SECONDS = 5.0
FORWARDS = 8  # forwards of one view that a step costs for an image: six of the student with its backward, two more
POWER = Path("/sys/class/powercap")


class LoaderSpeed(NamedTuple):
    """Images/s that the workers of all processes deliver together, by the number of workers of a process."""

    workers: int
    images_per_second: float
    of_each: float  # of one worker


class StepSpeed(NamedTuple):
    """Time of the sub-batches of a run on its slowest process, with the images that the loader delivers."""

    size: int  # images of a sub-batch
    steps: int
    seconds: float  # of a sub-batch and its update, median
    seconds_with_wait: float  # including the wait for its images, median
    megabytes: float | None  # peak of the memory, None where it cannot be measured
    watts: float | None  # of all devices of this machine that could be read
    training: TrainingStep
    num_processes: int

    @property
    def images_per_second(self) -> float:
        """Return the images/s of all processes together, if their images are always ready."""
        return self.size * self.num_processes / self.seconds


def endless(config: PretrainConfig, batch_size: int, device_batch_size: int) -> PretrainConfig:
    """Return the settings with other batches, and with so many epochs that a measurement never reaches the end."""
    return dataclasses.replace(
        config,
        batch_size=batch_size,
        device_batch_size=device_batch_size,
        epochs=10**6,
        max_steps=None,
        evaluate_every=0,
    )


def measure_loader(config: PretrainConfig, data: ImageData) -> LoaderSpeed:
    """Measure what the workers deliver, as scripts/benchmark.py does; all processes at once. A collective call."""
    size = min(BATCH_SIZE, config.device_batch_size)
    settings = endless(config, size, size)
    views, batches = TwoViews(data.train, settings), DeviceBatches(data.train, settings, 1, 0)
    workers = workers_of(config)
    found, error = {}, None
    try:
        for number in sorted({min(workers, 1), workers}):
            found[number] = loader_rate(views, batches, settings, number, LOADER_SECONDS)
    except ConfigurationError as caught:
        error = str(caught)
    everybody = gather_to_all((found, error))
    for _, message in everybody:
        if message is not None:
            raise ConfigurationError(message)
    each = max(rate / max(number, 1) for found, _ in everybody for number, rate in found.items())
    return LoaderSpeed(workers, sum(found[workers] for found, _ in everybody), each)


@device_errors_in_one_line
def measure_step(
    config: PretrainConfig, data: ImageData, accelerator: Accelerator, architecture: PretrainedConfig | None
) -> StepSpeed:
    """Measure steps with the images that the loader delivers meanwhile, as in training. A collective call.

    A process takes one sub-batch in each step, and all its memory is counted. On a CPU on which that takes too long,
    the sub-batch is smaller than that of the run.

    Raises:
        ConfigurationError: there is not enough memory, or no image of a batch can be decoded.
    """
    accelerator.gradient_accumulation_steps = 1
    device, processes = accelerator.device, accelerator.num_processes
    training = None

    def start(size: int) -> tuple[Step, float | None, float]:
        settings = endless(config, size * processes, size)

        def create(work: Work) -> Step:
            nonlocal training
            training = create_step(settings, accelerator, None, architecture)
            return our_step(training, work)

        step, megabytes = warm_up(create, create_work(settings, accelerator))
        started = time.perf_counter()
        step()
        synchronize(device)
        return step, megabytes, broadcast_object(time.perf_counter() - started)

    size = config.device_batch_size if device.type == "cuda" else min(PROBE, config.device_batch_size)
    step, megabytes, seconds = start(size)
    if size < config.device_batch_size:
        fits = int(size * MAX_STEP_SECONDS / seconds / (MIN_STEPS + UNMEASURED))
        # A power of two, because a batch of another size may be slower.
        smaller = 2 ** max(1, int(math.log2(max(fits, 2))))
        if (larger := config.device_batch_size if fits >= config.device_batch_size else smaller) != size:
            step = training = None
            accelerator.free_memory()  # before the next one is measured
            size = larger
            step, megabytes, seconds = start(size)
    settings = endless(config, size * processes, size)
    group = 10 if device.type == "cuda" else 1  # a wait for the GPU after each step would be counted
    steps = min(MAX_STEPS, max(MIN_STEPS, int(STEP_SECONDS / seconds / group)))
    times, waits, watts = feed(step, settings, data, accelerator, steps, group)
    seconds, with_wait = statistics.median(a - b for a, b in zip(times, waits, strict=True)), statistics.median(times)
    everybody = gather_to_all((seconds, with_wait, megabytes, watts))
    seconds, with_wait, megabytes, watts = zip(*everybody, strict=True)
    return StepSpeed(
        size,
        steps * group,
        max(seconds),
        max(with_wait),
        None if None in megabytes else max(megabytes),
        None if None in watts else sum(watts) if device.type == "cuda" else watts[0],
        training,
        processes,
    )


def feed(
    step: Step, config: PretrainConfig, data: ImageData, accelerator: Accelerator, steps: int, group: int
) -> tuple[list[float], list[float], float | None]:
    """Run steps with the batches of a loader, in groups. Return the seconds of a step, the waits in it, and the power.

    Each figure is the mean of a group. The power in watts is that of the device; None where it cannot be read.
    """
    device = accelerator.device
    requests = DeviceBatches(data.train, config, accelerator.num_processes, accelerator.process_index)
    loader = create_loader(TwoViews(data.train, config), requests, config, device)
    times, waits, watts = [], [], []
    with dead_workers_in_one_line():
        batches = read(loader, device)
        for _ in range(UNMEASURED):
            step(next(batches))
        synchronize(device)
        joules, started = read_energy(), time.perf_counter()
        for _ in range(steps):
            first, waited = time.perf_counter(), 0.0
            for _ in range(group):
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                step(batch)
            watts.append(gpu_power(device))
            synchronize(device)
            times.append((time.perf_counter() - first) / group)
            waits.append(waited / group)
        if joules is not None and device.type == "cpu":
            watts = [(read_energy() - joules) / (time.perf_counter() - started)]
        batches.close()
    return times, waits, None if None in watts else statistics.mean(watts)


def gpu_power(device: torch.device) -> float | None:
    """Return the watts that a GPU takes now; None on a CPU, or if its driver cannot be asked."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.power_draw(device) / 1000
    except Exception:  # nvidia-ml-py is not installed, or the driver refuses
        return None


def read_energy() -> float | None:
    """Return the joules that the CPUs have taken since some moment; None if they cannot be read."""
    try:
        return (
            sum(int((package / "energy_uj").read_text()) for package in sorted(POWER.glob("intel-rapl:?"))) / 1e6
            or None
        )
    except (OSError, ValueError):
        return None


def measure_evaluation(config: PretrainConfig, data: ImageData, step: StepSpeed, accelerator: Accelerator) -> float:
    """Measure a kNN evaluation, on some of its images if all take too long. Return its seconds. A collective call."""
    bank, queries = (
        images.select(range(min(len(images), limit)))
        for images, limit in ((data.bank, MAX_KNN_BANK), (data.validation, MAX_KNN_QUERIES))
    )
    in_time = int(EVALUATION_SECONDS * FORWARDS * step.images_per_second)
    share = broadcast_object(min(1.0, in_time / (len(bank) + len(queries))))
    few_bank, few_queries = (
        images.select(range(max(1, min(len(images), int(share * len(images)))))) for images in (bank, queries)
    )
    started = time.perf_counter()
    measure_knn(
        step.training.teacher.encoder,
        few_bank,
        few_queries,
        len(data.class_names),
        config,
        accelerator,
        (min(KNN_NEIGHBOURS, len(few_bank)),),
    )
    seconds = time.perf_counter() - started
    return seconds * (len(bank) + len(queries)) / (len(few_bank) + len(few_queries))


def describe_step(config: PretrainConfig, step: StepSpeed, accelerator: Accelerator) -> Iterator[Finding]:
    """Yield the speed of the step, and its memory against what there is."""
    text = (
        f"{rate(step.images_per_second)}: {count(step.size, 'image')} in {1000 * step.seconds:,.0f} ms, the "
        f"median of {step.steps}, on {hardware(accelerator)}"
    )
    is_whole = step.size == config.device_batch_size
    if not is_whole:
        text += f"; sub-batches of {config.device_batch_size} would take too long to measure"
    yield Finding(GOOD if is_whole else DOUBTFUL, "step", text)
    if step.megabytes is None:
        yield Finding(DOUBTFUL, "step memory", "not measured, because this system does not tell the peak")
        return
    used = 1e6 * step.megabytes
    text = f"{gigabytes(used)} at {count(step.size, 'image')}"
    if accelerator.device.type == "cuda":
        present = torch.cuda.get_device_properties(accelerator.device).total_memory
        text, is_full = f"{text}; a GPU has {gigabytes(present)}", used > 0.95 * present
    else:
        present = available_memory() + used  # it is taken at this moment
        text = f"{text} for each process; {gigabytes(present)} are free"
        is_full = used * num_local_processes() > present
    if not is_whole:
        text += f"; not measured at {config.device_batch_size} images"
    if is_full:
        text += ": give a smaller --device_batch_size"
    yield Finding(DOUBTFUL if is_full or not is_whole else GOOD, "step memory", text)


def describe_loader(loader: LoaderSpeed, in_place: bool) -> Iterator[Finding]:
    """Yield the speed of the loader; `in_place` if the run will read a copy that does not exist yet."""
    who = f"{count(loader.workers, 'worker')} a process" if loader.workers else "the main process (no workers)"
    text = f"{rate(loader.images_per_second)} by {who}"
    if in_place:
        yield Finding(DOUBTFUL, "loader", f"{text}, read in place; not measured from the copy that the run will make")
    else:
        yield Finding(GOOD, "loader", text)


def describe_limit(loader: LoaderSpeed, step: StepSpeed) -> Iterator[Finding]:
    """Yield which of the two limits the run, by how much, and how many workers it needs."""
    delivered, used = loader.images_per_second, step.images_per_second
    fewest = max(1, math.ceil(used / step.num_processes / loader.of_each))  # each of several may be slower
    if loader.workers == 0:
        share = used / (used + delivered)
        spare = num_cores() // num_local_processes() - 1
        more = f"--num_workers {min(fewest, spare)}" if spare > 0 else "it has no core for a worker"
        yield Finding(DOUBTFUL, "limit", f"the step waits {share:.0%} of the time while its process decodes: {more}")
    elif delivered >= used:
        # The other numbers of workers are not measured.
        enough = "1 worker is" if fewest == 1 else f"{count(loader.workers, 'worker')} are"
        text = f"the step: the loader delivers {delivered / used:,.1f} times as many images; {enough} enough"
        yield Finding(GOOD, "limit", text)
    else:
        cores = num_cores() // num_local_processes()
        needed = max(loader.workers + 1, math.ceil(loader.workers * used / delivered))
        more = f"--num_workers {needed}"
        if needed >= cores:
            more = (
                f"it needs {needed} workers a process, which has {count(cores, 'core')}: smaller images on the disk, "
                "or more cores"
            )
        yield Finding(
            DOUBTFUL, "limit", f"the loader: the step waits {1 - delivered / used:.0%} of the time for images: {more}"
        )

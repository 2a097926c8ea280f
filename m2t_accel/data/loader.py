"""From batches asked for to batches on the device: the workers that make them, and what is told where they fail."""

from __future__ import annotations

import atexit
import contextlib
import copy
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence

import cv2
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.buffers import Buffers
from m2t_accel.data.crops import Photometry
from m2t_accel.data.requests import DeviceBatches, Request
from m2t_accel.data.views import CentralViews, TwoViews, ViewBatch
from m2t_accel.distributed.launch import num_cores

# Batches ahead of each worker: 1, 2, 4 and 8 gave two workers the same images/s to 6 %, whether the loop was slower
# than they are or faster. Each batch takes its shared memory.
PREFETCH = 2


class InBuffers:
    """Requests of equal size, each with a buffer to be filled, if one is free when it is asked for."""

    def __init__(self, requests: DeviceBatches | Sequence[Request], buffers: Buffers) -> None:
        self.requests = requests
        self.buffers = buffers

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        for request in self.requests:
            yield request._replace(buffer=self.buffers.take())


def create_loader(
    dataset: TwoViews | CentralViews, batches, config: ImageSettings, device: torch.device | None = None
) -> DataLoader:
    """A DataLoader of whole batches, in the order of `batches`, an iterable of what the dataset takes; to be read once.

    Of TwoViews they are requests of `device_batch_size` samples each. What is loaded lies where a GPU can fetch it, if
    that is the device that `read` will send it to.

    It is not given to `accelerator.prepare`, which would split the batches a second time: `batches` holds
    this process's own.

    Raises:
        ConfigurationError: there is not enough shared memory for the batches of the workers.
    """
    num_workers = default_num_workers() if config.num_workers is None else config.num_workers
    if isinstance(dataset, TwoViews):
        # Of those on their way, and of two more: the one that the loop has, and the next, which it is given before it
        # lets go of that.
        number = num_workers * PREFETCH + 2
        dataset = copy.copy(dataset)  # another loader of the same has buffers of its own
        dataset.buffers = Buffers(number, dataset.crops_shape(config.device_batch_size), shared=num_workers > 0)
        batches = InBuffers(batches, dataset.buffers)
    cv2.setNumThreads(0)  # the workers are the parallelism; OpenCV's threads would fight over the cores
    with as_many_workers_as_asked_for():
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=as_it_is,
            num_workers=num_workers,
            pin_memory=is_gpu(device),
            prefetch_factor=PREFETCH if num_workers > 0 else None,
            worker_init_fn=settle_worker,
            generator=torch.Generator(),  # its own: the global one must not depend on how often a loader started
        )


@contextlib.contextmanager
def as_many_workers_as_asked_for() -> Iterator[None]:
    """Without a warning if they are more than cores, which torch gives at the making of a loader and at its start."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes")
        yield


def read(loader: DataLoader, device: torch.device | None = None) -> Iterator:
    """The batches of a loader; the crops and photometry of a ViewBatch on the device, if one is given.

    Raises:
        ConfigurationError: no image of a batch can be decoded, or a shard cannot be read.
    """
    batches, workers = None, Workers()
    stream = torch.cuda.Stream(device) if is_gpu(device) else None
    try:
        with as_many_workers_as_asked_for():
            batches = workers.of(loader)
        while (batch := next_of(batches)) is not None:
            yield send(batch, device, stream) if device is not None and isinstance(batch, ViewBatch) else batch
    except (Exception, KeyboardInterrupt) as error:
        # The workers end here. With an error that somebody keeps they would live on, and be ended as garbage is: with
        # their queues, whose threads then still close what the collector closes, or what was opened in its place.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        batches = None
        workers.end()


class Workers:
    """The processes of a loader; those that do not end with it are killed, also at the end of the program.

    They do not hear SIGTERM, so torch could only wait for one that hangs in a read.
    """

    def __init__(self) -> None:
        self.processes: set[multiprocessing.process.BaseProcess] = set()

    def of(self, loader: DataLoader) -> Iterator:
        """Start the loader."""
        others = set(multiprocessing.active_children())
        try:
            return iter(loader)
        finally:
            self.processes = set(multiprocessing.active_children()) - others
            if self.processes:
                atexit.register(self.end_with_program)

    def end(self) -> None:
        if self.processes:  # else the program may have ended, and its modules with it
            atexit.unregister(self.end_with_program)
        while self.processes:
            process = self.processes.pop()
            if process.is_alive():
                process.kill()

    def end_with_program(self) -> None:
        with contextlib.suppress(ValueError):  # signals are of the main thread
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would tell of workers that are killed
        self.end()


def next_of(batches: Iterator) -> object | None:
    """The next batch; None if there is none."""
    try:
        batch = next(batches, None)
    except (ConnectionError, EOFError):
        # A worker died while it handed this over. torch says so by a signal: it shall come now, and not while the
        # loader is taken down, where it could only be printed.
        time.sleep(1)
        raise
    if isinstance(batch, ViewBatch) and len(batch.bad) == len(batch.samples):
        first = batch.bad[0]
        raise ConfigurationError(
            f"none of the {len(batch.bad)} images of a batch can be decoded, the first of them {first.path} "
            f"({first.reason}): has the dataset been moved, or is it not one of images?"
        )
    return batch


def is_gpu(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def send(batch: ViewBatch, device: torch.device, stream: torch.cuda.Stream | None) -> ViewBatch:
    """The batch with its crops and photometry on the device.

    By a stream of their own they go to a GPU while it still computes with the batch before, and only what is asked of
    it from now on waits for them.
    """
    if stream is None:
        crops, photometry = send_to_device((batch.crops, batch.photometry), device)
        return batch._replace(crops=crops, photometry=photometry)
    with torch.cuda.stream(stream):
        crops, photometry = send_to_device((batch.crops, batch.photometry), device, non_blocking=True)
    computing = torch.cuda.current_stream(device)
    computing.wait_stream(stream)
    for tensor in (crops, *(photometry if isinstance(photometry, Photometry) else (photometry,))):
        tensor.record_stream(computing)  # their memory is the other stream's, which must not use it again before
    return batch._replace(crops=crops, photometry=photometry)


@contextlib.contextmanager
def dead_workers_in_one_line() -> Iterator[None]:
    """Around all that is done while workers live: torch raises wherever the main process is when one of them dies.

    Raises:
        ConfigurationError: a worker has died, or there is no shared memory for its batches.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A batch that a dead worker was handing over ends as a broken connection.
        known = r"DataLoader worker .*(exited|killed)|.*(shared memory|unable to write|ancdata|Too many open)"
        if isinstance(error, RuntimeError) and not re.match(known, str(error), re.DOTALL):
            raise
        reason = one_line(error).removeprefix("RuntimeError: ")
        raise ConfigurationError(
            f"a process that decodes images has died or cannot hand over its batch ({reason}); most often the memory "
            "ran out: give a smaller --num_workers, or raise the limits of memory and of /dev/shm"
        ) from error


def as_it_is(batch):
    return batch


def settle_worker(worker: int) -> None:
    """One thread, and no ear for signals: the run's process ends its workers, and may have a step to finish first.

    What libraries in C write of images (libpng of each colour profile, libjpeg of each odd byte, at each decoding,
    and never of which file) is not shown; what Python writes is.
    """
    with contextlib.suppress(OSError):  # stderr is closed
        sys.stderr = open(os.dup(2), "w", buffering=1, errors="backslashreplace")  # noqa: SIM115 (for good)
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def default_num_workers() -> int:
    """Cores that training leaves free, shared by the processes of this machine; at most 8 each."""
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return max(0, min(8, num_cores() // num_local_processes - 1))

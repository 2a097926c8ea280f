"""The DataLoader of a process: its workers, batches on their way to the device, and errors of workers in one line."""

from __future__ import annotations

import atexit
import contextlib
import copy
import copyreg
import errno
import functools
import io
import multiprocessing
import os
import pickle
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import TypeVar

import cv2
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.buffers import Buffers
from m2t_accel.data.crops import Photometry
from m2t_accel.data.requests import DeviceBatches, Request
from m2t_accel.data.views import CentralBatch, CentralViews, TwoViews, ViewBatch
from m2t_accel.distributed.device import keep_freed_memory
from m2t_accel.distributed.interruption import SIGNALS, NoBatchError, end_with_parent, waiting_for_a_batch
from m2t_accel.distributed.launch import num_cores, num_local_processes

# Batches that each worker prepares ahead. With 1, 2, 4 and 8, two workers gave the same images/s within 6 %, with a
# slower and with a faster loop. Each batch takes memory.
PREFETCH = 2

Batch = TypeVar("Batch", ViewBatch, CentralBatch)

_running_workers: set[BaseProcess] = set()  # of all loaders that are being read


class BufferedRequests:
    """Requests, each with a buffer if one is free at that moment."""

    def __init__(self, requests: DeviceBatches | Sequence[Request], buffers: Buffers) -> None:
        self.requests = requests
        self.buffers = buffers

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        for request in self.requests:
            yield request._replace(buffer=self.buffers.take())


class Packed:
    """A batch as a worker sends it: the main process unpickles it as the batch itself.

    It is pickled in the worker's own thread, and its tensors as arrays. In the thread of torch's queue, each tensor
    would get memory in /dev/shm, and after an error the main process would wait for that batch for ever.
    """

    def __init__(self, batch: object) -> None:
        content = io.BytesIO()
        pickler = pickle.Pickler(content, pickle.HIGHEST_PROTOCOL)
        pickler.dispatch_table = copyreg.dispatch_table | {Tensor: as_array}
        pickler.dump(batch)
        self.content = content.getvalue()

    def __reduce__(self) -> tuple:
        return pickle.loads, (self.content,)


def as_array(tensor: Tensor) -> tuple:
    """Return what pickle needs to store a tensor as an array."""
    return torch.from_numpy, (tensor.numpy(),)


def pack(batch: object) -> object:
    """Return the batch as a worker sends it; in the main process, the batch itself."""
    return batch if get_worker_info() is None else Packed(batch)


def create_loader(
    dataset: TwoViews | CentralViews,
    batches: DeviceBatches | Sequence[Request],
    config: ImageSettings,
    device: torch.device | None = None,
) -> DataLoader:
    """Create a DataLoader of whole batches in the order of `batches`; read it once, with `read`.

    Do not pass it to `accelerator.prepare`, which would split the batches a second time: `batches` are already those of
    this process.

    Args:
        device: the device that `read` will send the batches to; for a GPU, they are put into pinned memory.

    Raises:
        ConfigurationError: there is not enough memory for the batches of the workers.
    """
    num_workers = min(default_num_workers() if config.num_workers is None else config.num_workers, len(batches))
    if isinstance(batches, DeviceBatches):
        most_images = config.device_batch_size
    else:
        most_images = max((len(request.samples) for request in batches), default=0)
    # Two more than the workers prepare: the loop receives the next batch while it still holds the current one.
    count = min(num_workers * PREFETCH + 2, len(batches))
    dataset = copy.copy(dataset)  # another loader of the same dataset needs its own buffers
    dataset.buffers = Buffers(count, dataset.crops_shape(most_images), shared=num_workers > 0)
    cv2.setNumThreads(0)  # the workers run in parallel; threads of OpenCV would compete with them for the cores
    with ignore_worker_count_warning():
        return DataLoader(
            dataset,
            batch_sampler=BufferedRequests(batches, dataset.buffers),
            collate_fn=pack,
            num_workers=num_workers,
            # Python 3.14 would start a server that forks the workers: each would load torch and a copy of the dataset,
            # and live on if the training is killed, because its parent is the server.
            multiprocessing_context="fork" if num_workers > 0 else None,
            pin_memory=is_gpu(device),
            prefetch_factor=PREFETCH if num_workers > 0 else None,
            worker_init_fn=set_up_worker,
            generator=torch.Generator(),  # starting a loader must not advance the global generator
        )


@contextlib.contextmanager
def ignore_worker_count_warning() -> Iterator[None]:
    """Ignore torch's warning about more workers than cores, given when a loader is created and when it starts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes")
        yield


def read(loader: DataLoader, device: torch.device | None = None) -> Iterator:
    """Yield the batches of a loader; if a device is given, crops and photometry of each batch are on it.

    Raises:
        ConfigurationError: no image of a batch can be decoded, or a shard cannot be read.
    """
    batches, workers = None, set()
    stream = copy_stream(device) if is_gpu(device) else None
    try:
        others = set(multiprocessing.active_children())
        try:
            with ignore_worker_count_warning():
                batches = iter(loader)
        except Exception as error:
            drop_frames(error)
            if isinstance(error, OSError):
                raise ConfigurationError(describe_failed_start(error)) from None
            raise
        finally:  # some workers may run even if not all could be started
            workers = set(multiprocessing.active_children()) - others
            _running_workers.update(workers)
        while (batch := next_batch(batches)) is not None:
            yield batch if device is None else send(batch, device, stream)
        failed = getattr(getattr(loader.batch_sampler, "requests", None), "failed", None)
        if failed is not None:  # the requests ended before the step that cannot be read
            raise ConfigurationError(failed[1])
    except (Exception, KeyboardInterrupt) as error:
        # The frames of the error refer to the loader. If a caller kept the error, the workers would live on, and their
        # queues would be closed by the garbage collector, whose threads can then close descriptors opened meanwhile.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, NoBatchError):
            kill_at_exit()  # now, because torch would wait 10 s for a worker that hangs
        raise
    finally:
        batches = None
        kill(workers & _running_workers)


def drop_frames(error: Exception) -> None:
    """Clear the frames of an error, which keep a half-started loader alive: torch cannot shut such a loader down."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook


def describe_failed_start(error: OSError) -> str:
    """Return a message about workers that could not be started."""
    advice = "allow more memory, processes (ulimit -u) and open files (ulimit -n)"
    if error.errno == errno.ENOSPC:  # the locks of their queues lie there
        advice = "enlarge /dev/shm (docker run --shm-size)"
    return f"cannot start the workers ({error.strerror}): give a smaller --num_workers, or {advice}"


def kill(workers: set[BaseProcess]) -> None:
    """Kill workers that have outlived their loader.

    The workers ignore SIGTERM, the only signal that torch and multiprocessing send. So a worker that hangs in a read,
    for example from a lost disk, would keep the program from ending.
    """
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    _running_workers.difference_update(workers)


@atexit.register
def kill_at_exit() -> None:
    """Kill the workers of loaders that the program leaves half-read."""
    if _running_workers:
        with contextlib.suppress(ValueError):  # only the main thread may set a signal handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the killed workers
        kill(set(_running_workers))


def next_batch(batches: Iterator) -> object | None:
    """Return the next batch, or None after the last one.

    Raises:
        ConfigurationError: no image of the batch can be decoded.
        NoBatchError: a signal asked the run to end, and the batch still does not come.
    """
    with waiting_for_a_batch():
        batch = next(batches, None)
    if isinstance(batch, ViewBatch) and len(batch.bad) == len(batch.samples):
        first = batch.bad[0]
        raise ConfigurationError(
            f"none of the {len(batch.bad)} images of a batch can be decoded, the first is {first.path} "
            f"({first.reason}): check whether the dataset has been moved, and whether it consists of images"
        )
    return batch


def is_gpu(device: torch.device | None) -> bool:
    """Return whether the device is a CUDA GPU."""
    return device is not None and device.type == "cuda"


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a GPU for copies of batches. torch keeps the freed memory of each stream for that stream."""
    return torch.cuda.Stream(device)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of main memory on the device. A copy to a GPU goes through pinned memory, so nothing waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if is_gpu(device) else tensor.to(device)


def send(batch: Batch, device: torch.device, stream: torch.cuda.Stream | None) -> Batch:
    """Return the batch with its crops and, if it has them, its photometric parameters on the device.

    The copy to a GPU runs on its own stream, beside the computation on the batch before. Only work queued after this
    call waits for it.
    """
    parts = {name: getattr(batch, name) for name in ("crops", "photometry") if name in batch._fields}
    if stream is None:
        return batch._replace(**send_to_device(parts, device))
    with torch.cuda.stream(stream):
        parts = send_to_device(parts, device, non_blocking=True)
    computing = torch.cuda.current_stream(device)
    computing.wait_stream(stream)
    for part in parts.values():
        for tensor in part if isinstance(part, Photometry) else (part,):
            tensor.record_stream(computing)  # the copying stream owns this memory, and must not reuse it too early
    return batch._replace(**parts)


@contextlib.contextmanager
def dead_workers_in_one_line() -> Iterator[None]:
    """Turn the errors of a dead worker into one line. Use it around all code that runs while workers live.

    torch raises these errors from a signal handler, so they can appear anywhere in the main process.

    Raises:
        ConfigurationError: a worker has died, or lacks memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = r"DataLoader worker .*(exited|killed)|can't start new thread"
        if isinstance(error, RuntimeError) and not re.match(known, str(error), re.DOTALL):
            raise
        reason = one_line(error).removeprefix("RuntimeError: ")
        raise ConfigurationError(
            f"a worker process has died or lacks memory ({reason}): give a smaller --num_workers, or allow more memory"
        ) from error


def set_up_worker(worker: int) -> None:
    """Use one thread, ignore signals, end with the main process, and hide what C libraries write to stderr.

    A signal sent to all processes must not end a worker, because the main process may first finish a step; it ends its
    workers itself. libpng and libjpeg write a line for each unusual image at each decoding, without naming the file.
    Output of Python is still shown.
    """
    with contextlib.suppress(OSError):  # stderr is closed
        sys.stderr = open(os.dup(2), "w", buffering=1, errors="backslashreplace")  # noqa: SIM115 (stays open)
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)  # even if the worker hangs in a read
    keep_freed_memory(False)  # a worker would hold the memory of its largest image for good
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def default_num_workers() -> int:
    """Return the number of cores that training leaves free per process of this machine, at most 8."""
    return max(0, min(8, num_cores() // num_local_processes() - 1))

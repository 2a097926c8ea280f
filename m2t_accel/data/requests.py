"""The samples that each process requests from its workers, and reading ahead of streamed images."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from m2t_accel.config.data import TrainingSettings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.order import (
    Pool,
    PooledOrder,
    Segment,
    ShuffledOrder,
    num_pool_batches,
    num_steps_per_epoch,
)
from m2t_accel.data.shards import MAX_HELD_BYTES, Reader, Shards
from m2t_accel.data.streams import HubStream, Position, StreamedOrder, StreamReader

MAX_READERS = 16  # threads of a process that read pieces ahead; each waits for a disk or a network
UNKNOWN = Position(-1, -1)


class Request(NamedTuple):
    """A batch that a worker has to make: the views of some samples in an epoch."""

    epoch: int
    samples: np.ndarray  # (N,) int64
    images: list[Mapping[str, object]] | None  # N undecoded images, if the main process has read them
    buffer: int | None = None  # number of the buffer for the pixels; None: allocate new memory


class DeviceBatches:
    """The requests of one process from an optimizer step to the end of the run, one for each sub-batch.

    Global batch k of an epoch has a sub-batch for each virtual device, and the processes take these in turn. So the
    content of a global batch, and the images that each BatchNorm sees, do not depend on the number of processes. A
    resumed run needs only `first_step`.
    """

    def __init__(
        self,
        images: Dataset | Shards | HubStream,
        config: TrainingSettings,
        num_processes: int,
        process_index: int,
        first_step: int = 0,
        positions: np.ndarray | None = None,
        num_spare_steps: int = 0,
    ) -> None:
        """Prepare the requests; nothing is read yet.

        Args:
            images: the images to train on.
            config: settings of the batches.
            num_processes: processes of the run.
            process_index: this process.
            first_step: global batches used before: optimizer steps done, and those that were skipped.
            positions: result of `positions(first_step)` on all processes, (V, 2) int64; without it, a HubStream is read
                from the start of the epoch.
            num_spare_steps: batches after those of the run, for steps that were skipped or may be.
        """
        self.images = images
        self.config = config
        self.devices = range(process_index, config.num_virtual_devices, num_processes)
        self.steps_per_epoch = num_steps_per_epoch(len(images), config.batch_size)
        self.first_step = first_step
        self.last_step = config.total_steps(self.steps_per_epoch) + num_spare_steps
        self.first_positions = positions
        self.ahead: deque[tuple[int, list[PendingPool]]] = deque()  # pools that are being read, by their first step
        self.failed: tuple[int, str] | None = None  # the first step whose images cannot be read, and why
        self.readers: dict[int, DeviceReader | StreamReader] = {}

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * len(self.devices)

    def __iter__(self) -> Iterator[Request]:
        return self.shuffled() if isinstance(self.images, Dataset) else self.read_ahead()

    def remaining_steps(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, step within the epoch) of each step from `first_step` on."""
        for step in range(self.first_step, self.last_step):
            yield divmod(step, self.steps_per_epoch)

    def shuffled(self) -> Iterator[Request]:
        """Yield requests without images, for sources with random access."""
        order = ShuffledOrder(len(self.images), self.config)
        for epoch, step in self.remaining_steps():
            for device in self.devices:
                yield Request(epoch, order.sub_batch(epoch, step * self.config.num_virtual_devices + device), None)

    def read_ahead(self) -> Iterator[Request]:
        """Yield requests with their images, and read the next pools while the current ones are used.

        End before a step whose images cannot be read; `failure` gives the reason.
        """
        size = self.config.device_batch_size
        if isinstance(self.images, HubStream):
            order = StreamedOrder(self.images, self.config)
        else:
            order = PooledOrder(self.images.piece_sizes, self.config)
        threads = ThreadPoolExecutor(min(MAX_READERS, 2 * len(self.devices) + 2), thread_name_prefix="reader")
        try:
            pools = self.pending_pools(order, threads)
            self.ahead, self.failed, current = deque(islice(pools, 2)), None, None
            for number, (epoch, step) in enumerate(self.remaining_steps(), self.first_step):
                batch = step % order.pool_batches
                if current is None or batch == 0:
                    if self.failure(number) is not None:
                        return
                    current = samples = images = None  # free the old pools before the new ones are assembled
                    current = [pool.result() for pool in self.ahead.popleft()[1]]
                    self.ahead.extend(islice(pools, 1))
                for samples, images in current:
                    chosen = slice(batch * size, (batch + 1) * size)
                    yield Request(epoch, samples[chosen], images[chosen])
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def pending_pools(
        self, order: PooledOrder | StreamedOrder, threads: ThreadPoolExecutor
    ) -> Iterator[tuple[int, list[PendingPool]]]:
        """Yield sets of pools, one pool for each virtual device of this process, and start reading each set.

        Each set comes with the first step that shows it.
        """
        if isinstance(order, StreamedOrder):
            starts = [None] * self.config.num_virtual_devices
            if self.first_positions is not None and len(self.first_positions) == len(starts):
                starts = [Position(*place) if min(place) >= 0 else None for place in self.first_positions.tolist()]
            self.readers = {
                device: StreamReader(self.images, order, device, threads, starts[device]) for device in self.devices
            }
        else:
            max_held_bytes = MAX_HELD_BYTES // len(self.devices)
            self.readers = {device: DeviceReader(self.images, threads, max_held_bytes) for device in self.devices}
        previous = None
        for number, (epoch, step) in enumerate(self.remaining_steps(), self.first_step):
            index = step // order.pool_batches
            if (epoch, index) != previous:
                previous = (epoch, index)
                pools = [
                    PendingPool(order.pool(epoch, device, index), reader) for device, reader in self.readers.items()
                ]
                yield number, pools

    def failure(self, step: int, is_stopping: Callable[[], bool] = lambda: False) -> str | None:
        """Return why the images of a step cannot be read; None if they can. Wait until they are read.

        Args:
            step: the step, as counted from the start of the run. Those before it have been yielded.
            is_stopping: asked every second whether to stop waiting; then the result is None.
        """
        pools = next((pools for first, pools in self.ahead if first == step), ())
        for pool in pools:
            while not is_stopping():
                try:
                    pool.wait(1)
                except TimeoutError:
                    continue
                except ConfigurationError as error:
                    self.failed = self.failed or (step, str(error))
                break
        return self.failed[1] if self.failed is not None and self.failed[0] <= step else None

    def positions(self, step: int) -> np.ndarray | None:
        """Return where a HubStream resumes at a step, for each virtual device of this process: (turns, 2) int64.

        That is the start of the pool that the step is in, or (-1, -1) if it is not known. None for other sources.
        """
        if not isinstance(self.images, HubStream):
            return None
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        place = (epoch, step_of_epoch // num_pool_batches(self.config.batch_size))
        starts = [self.readers[device].starts.get(place, UNKNOWN) for device in self.devices if self.readers]
        return np.array(starts or [UNKNOWN] * len(self.devices), np.int64)


class DeviceReader:
    """Reads the pools of one virtual device, one after the other; a piece that two pools share is opened once."""

    def __init__(self, shards: Shards, threads: ThreadPoolExecutor, max_held_bytes: int) -> None:
        self.shards = shards
        self.threads = threads
        self.max_held_bytes = max_held_bytes  # bytes that the open piece may hold between two pools
        self.read: Reader | None = None
        self.last: Future | None = None  # the last read of the open piece, which only one thread at a time may read
        self.end: tuple[int, int] | None = None  # the open piece, and the row after the last one requested

    def submit(self, segment: Segment) -> Future:
        """Start reading a segment. Return the future of its samples (n,) and their undecoded images."""
        if self.end != (segment.piece, segment.first):
            self.read, self.last = self.shards.open(segment.piece, self.max_held_bytes), None
        self.last = self.threads.submit(read_after, self.last, self.read, segment.first, segment.stop)
        self.end = (segment.piece, segment.stop)
        return self.last


def read_after(previous: Future | None, read: Reader, first: int, stop: int) -> tuple[np.ndarray, list]:
    """Read a segment after the previous one. The previous one was submitted earlier, so the threads cannot deadlock."""
    if previous is not None:
        # Unlike wait(), this returns for a future that is cancelled when a run ends.
        with contextlib.suppress(CancelledError):
            previous.exception()
    return read(first, stop)


class PendingPool:
    """A pool whose segments are being read."""

    def __init__(self, pool: Pool, reader: DeviceReader | StreamReader) -> None:
        self.shuffle = pool.shuffle
        self.parts = [reader.submit(segment) for segment in pool.segments]

    def wait(self, timeout: float) -> None:
        """Wait until the pool is read.

        Raises:
            TimeoutError: it is not read within `timeout` seconds.
            ConfigurationError: it cannot be read.
        """
        for part in self.parts:
            part.result(timeout)

    def result(self) -> tuple[np.ndarray, list[Mapping[str, object]]]:
        """Wait for the segments. Return the samples (n,) and their undecoded images in the order of the pool."""
        parts = [part.result() for part in self.parts]
        samples = np.concatenate([samples for samples, _ in parts])
        images = [image for _, images in parts for image in images]
        return samples[self.shuffle], [images[i] for i in self.shuffle]

"""The samples that each process asks for, and the reading of streamed images ahead of their use."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from m2t_accel.config.data import TrainingSettings
from m2t_accel.data.order import Pool, PooledOrder, Segment, ShuffledOrder, num_steps_per_epoch
from m2t_accel.data.shards import HELD, Reader, Shards

MAX_READERS = 16  # threads of a process that read pieces ahead; each waits for a disk or a network


class Request(NamedTuple):
    """What a worker is asked for: the views of some samples in an epoch."""

    epoch: int
    samples: np.ndarray  # (N,) int64
    images: list[Mapping[str, object]] | None  # N undecoded images, where the main process has read them
    buffer: int | None = None  # the number of a buffer for their pixels; without one, new memory is taken


class DeviceBatches:
    """The requests of one process, from an optimizer step of the run to its end, one for each sub-batch.

    Global batch k of an epoch has a sub-batch for each virtual device; the processes take them in turn. So
    what a global batch holds, and what each BatchNorm sees, does not depend on the number of processes, and
    `first_step` is all that a resumed run needs to know.
    """

    def __init__(
        self,
        images: Dataset | Shards,
        config: TrainingSettings,
        num_processes: int,
        process_index: int,
        first_step: int = 0,
    ) -> None:
        self.images = images
        self.config = config
        self.devices = range(process_index, config.num_virtual_devices, num_processes)
        self.steps_per_epoch = num_steps_per_epoch(len(images), config.batch_size)
        self.first_step = first_step

    def __len__(self) -> int:
        return (self.config.epochs * self.steps_per_epoch - self.first_step) * len(self.devices)

    def __iter__(self) -> Iterator[Request]:
        return self.read_ahead() if isinstance(self.images, Shards) else self.shuffled()

    def places(self) -> Iterator[tuple[int, int]]:
        """(epoch, step of the epoch) of each step to come."""
        for step in range(self.first_step, self.config.epochs * self.steps_per_epoch):
            yield divmod(step, self.steps_per_epoch)

    def shuffled(self) -> Iterator[Request]:
        order = ShuffledOrder(len(self.images), self.config)
        for epoch, step in self.places():
            for device in self.devices:
                yield Request(epoch, order.sub_batch(epoch, step * self.config.num_virtual_devices + device), None)

    def read_ahead(self) -> Iterator[Request]:
        """The requests with their images, read pool by pool; while one is used the next is read."""
        order, size = PooledOrder(self.images.piece_sizes, self.config), self.config.device_batch_size
        readers = ThreadPoolExecutor(min(MAX_READERS, 2 * len(self.devices) + 2), thread_name_prefix="reader")
        coming: deque[list[PoolInReading]] = deque()
        try:
            pools = self.pools(order, readers)
            coming.extend(next(pools, None) for _ in range(2))
            now = None
            for epoch, step in self.places():
                place = step % order.pool_batches
                if now is None or place == 0:
                    now = samples = images = None  # free the old pools before the new ones are put together
                    now = [pool.result() for pool in coming.popleft()]
                    coming.append(next(pools, None))
                for samples, images in now:
                    chosen = slice(place * size, (place + 1) * size)
                    yield Request(epoch, samples[chosen], images[chosen])
        finally:
            readers.shutdown(wait=False, cancel_futures=True)

    def pools(self, order: PooledOrder, readers: ThreadPoolExecutor) -> Iterator[list[PoolInReading]]:
        """For each stretch of steps to come the pools of this process's virtual devices, their reading begun."""
        may_hold = HELD // len(self.devices)
        done, stretches = None, {device: Stretch(self.images, readers, may_hold) for device in self.devices}
        for epoch, step in self.places():
            index = step // order.pool_batches
            if (epoch, index) != done:
                done = (epoch, index)
                yield [
                    PoolInReading(order.pool(epoch, device, index), stretch) for device, stretch in stretches.items()
                ]


class Stretch:
    """What the pools of a virtual device read, one after the other: a piece that two of them share is read once."""

    def __init__(self, shards: Shards, readers: ThreadPoolExecutor, may_hold: int) -> None:
        self.shards = shards
        self.readers = readers
        self.may_hold = may_hold  # bytes, between two pools
        self.read: Reader | None = None
        self.last: Future | None = None  # of this reader, which is asked by one thread at a time
        self.end: tuple[int, int] | None = None  # the piece and the row that it has come to

    def submit(self, segment: Segment) -> Future:
        """Begin to read a segment: its samples (n,) and their undecoded images."""
        if self.end != (segment.piece, segment.first):
            self.read, self.last = self.shards.open(segment.piece, self.may_hold), None
        self.last = self.readers.submit(read_after, self.last, self.read, segment.first, segment.stop)
        self.end = (segment.piece, segment.stop)
        return self.last


def read_after(before: Future | None, read: Reader, first: int, stop: int) -> tuple[np.ndarray, list]:
    """Read a segment when the one before it has been: it was begun earlier, so no thread waits for one to come."""
    if before is not None:
        # Not wait(), which never ends for one that is cancelled at the end of a run while this one begins.
        with contextlib.suppress(CancelledError):
            before.exception()
    return read(first, stop)


class PoolInReading:
    """A pool whose segments are being read."""

    def __init__(self, pool: Pool, stretch: Stretch) -> None:
        self.shuffle = pool.shuffle
        self.parts = [stretch.submit(segment) for segment in pool.segments]

    def result(self) -> tuple[np.ndarray, list[Mapping[str, object]]]:
        """Wait for it: the samples (n,) and their undecoded images, in the pool's order."""
        parts = [part.result() for part in self.parts]
        samples = np.concatenate([samples for samples, _ in parts])
        images = [image for _, images in parts for image in images]
        return samples[self.shuffle], [images[i] for i in self.shuffle]

"""Who reads which sample, and when: pure functions of the seed, the epoch and the place in it.

Nothing here knows of workers, and of processes only which sub-batches are whose; so an epoch's order does not
depend on them, and a run goes on anywhere from (epoch, step) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from m2t_accel.config.data import TrainingSettings
from m2t_accel.data.random_numbers import mixed

# Apart from one another, and from the views of m2t_accel.augment, which is stream 1.
ORDER_STREAM, PIECES_STREAM, POOL_STREAM = 0, 2, 3
HALF = np.uint64(32)  # of a mixed number the upper bits are used
POOL_SIZE = 8192  # samples shuffled together in all pools of a step; ImageNet's files take 0.9 GB
MIN_POOL_BATCHES = 8  # sub-batches that a pool holds at least


def num_steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Optimizer steps of one epoch; the last, partial batch is dropped."""
    return num_samples // batch_size


def permuted(positions: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a permutation of range(size), chosen by the key, takes these positions: int64 of their shape.

    Computed place by place, so that a process of a run over a billion samples need not hold the billion: an
    unbalanced Feistel network of eight rounds over the next power of two, and what falls outside of the range
    is sent through again until it is inside ("cycle walking"; Black and Rogaway, Ciphers with arbitrary finite
    domains, 2002). Its rounds are SplitMix64's output.
    """
    bits = max(2, (size - 1).bit_length())
    low = np.uint64(bits // 2)
    mask_low, mask_high = np.uint64(2 ** (bits // 2) - 1), np.uint64(2 ** (bits - bits // 2) - 1)
    keys = np.random.SeedSequence(key).generate_state(8, np.uint64)
    result = positions.astype(np.uint64)
    outside = np.ones(result.shape, bool)
    while outside.any():
        values = result[outside]
        left, right = values >> low, values & mask_low
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            left ^= mixed(right ^ first) >> HALF & mask_high
            right ^= mixed(left ^ second) >> HALF & mask_low
        result[outside] = left << low | right
        outside = result >= size
    return result.astype(np.int64)


class ShuffledOrder:
    """The order of samples that can be read one by one: global batch k is the k-th slice of one permutation.

    A global batch is cut into sub-batches of `device_batch_size`, one for each virtual device.
    """

    def __init__(self, num_samples: int, config: TrainingSettings) -> None:
        self.num_samples = num_samples
        self.seed = config.seed
        self.size = config.device_batch_size

    def sub_batch(self, epoch: int, index: int) -> np.ndarray:
        """The samples of an epoch's sub-batch: (device_batch_size,) int64."""
        positions = np.arange(index * self.size, (index + 1) * self.size)
        return permuted(positions, self.num_samples, (ORDER_STREAM, self.seed, epoch))


class Segment(NamedTuple):
    """Rows `first` to `stop` of a piece."""

    piece: int
    first: int
    stop: int


class Pool(NamedTuple):
    """Samples that are read together and shuffled: what is read is `segments`, one after the other."""

    segments: list[Segment]
    shuffle: np.ndarray  # (n,) which of the rows read comes at each place


class PooledOrder:
    """The order of samples that are read piece by piece (row groups of parquet files, runs of a tar's files).

    The pieces in a seeded order make one sequence of samples. Each virtual device has an equal stretch of it,
    cut into pools of some sub-batches, and a pool is shuffled. So all virtual devices together show every sample once,
    up to the dropped last batch; a process reads the pools of its virtual devices and nothing else, except that
    of a piece that a stretch or a resumed run begins in, the rows before are read and thrown away; where there are
    fewer pieces than virtual devices, that is a part of a piece for every one of them.
    """

    def __init__(self, piece_sizes: np.ndarray, config: TrainingSettings) -> None:
        self.piece_sizes = piece_sizes
        self.num_samples = int(piece_sizes.sum(dtype=np.int64))
        self.seed = config.seed
        self.size = config.device_batch_size
        self.num_virtual_devices = config.num_virtual_devices
        self.steps = num_steps_per_epoch(self.num_samples, config.batch_size)
        self.pool_batches = max(POOL_SIZE // config.batch_size, MIN_POOL_BATCHES)
        self.epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Lay out the pieces of an epoch."""
        if epoch == self.epoch:
            return
        self.order = self.ends = None  # of ten million pieces, of a billion samples, either takes 40 MB
        self.order = np.arange(len(self.piece_sizes), dtype=np.int32)
        np.random.default_rng((PIECES_STREAM, self.seed, epoch)).shuffle(self.order)
        sizes = np.empty(len(self.order), np.int32 if self.num_samples < 2**31 else np.int64)
        for at in range(0, len(sizes), 2**20):  # numpy makes int64 of the numbers that it looks up
            sizes[at : at + 2**20] = self.piece_sizes[self.order[at : at + 2**20]]
        self.ends = np.cumsum(sizes, dtype=sizes.dtype, out=sizes)
        self.epoch = epoch

    def num_pools(self) -> int:
        """Pools of one virtual device in an epoch."""
        return -(-self.steps // self.pool_batches)

    def pool(self, epoch: int, device: int, index: int) -> Pool:
        """A virtual device's pool of an epoch."""
        self.set_epoch(epoch)
        first_step = index * self.pool_batches
        num_batches = min(self.pool_batches, self.steps - first_step)
        first = (device * self.steps + first_step) * self.size
        stop = first + num_batches * self.size
        shuffle = np.random.default_rng((POOL_STREAM, self.seed, epoch, device, index)).permutation(stop - first)
        return Pool(list(self.segments(first, stop)), shuffle)

    def segments(self, first: int, stop: int) -> Iterator[Segment]:
        """What stands at the positions `first` to `stop` of the epoch's sequence."""
        place = int(np.searchsorted(self.ends, self.ends.dtype.type(first), side="right"))
        while first < stop:
            piece, end = int(self.order[place]), int(self.ends[place])
            begin = end - int(self.piece_sizes[piece])
            if end > first:  # an empty piece has nothing
                yield Segment(piece, first - begin, min(stop, end) - begin)
            first, place = max(first, end), place + 1

"""The order of the samples: pure functions of the seed, the epoch and the position in the epoch.

The order does not depend on workers, and processes only divide its sub-batches among themselves. So a run resumes
anywhere from (epoch, step) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from m2t_accel.config.data import TrainingSettings
from m2t_accel.data.random_numbers import mix

# Streams of random numbers that must differ from one another; the views (m2t_accel.data.crops) use stream 1.
ORDER_STREAM, PIECES_STREAM, POOL_STREAM = 0, 2, 3
UPPER_HALF = np.uint64(32)  # shift that keeps the better-mixed upper bits
POOL_SIZE = 8192  # samples that all pools of a step shuffle together; files of ImageNet take 0.9 GB
MIN_POOL_BATCHES = 8  # sub-batches that a pool holds at least


def num_steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Return the optimizer steps of one epoch; the last, partial batch is dropped."""
    return num_samples // batch_size


def num_pool_batches(batch_size: int) -> int:
    """Return the sub-batches that a pool of one virtual device holds."""
    return max(POOL_SIZE // batch_size, MIN_POOL_BATCHES)


def shuffle_pool(size: int, seed: int, epoch: int, device: int, index: int) -> np.ndarray:
    """Return the order of a pool of `size` samples: place i shows row result[i] of the rows read."""
    return np.random.default_rng((POOL_STREAM, seed, epoch, device, index)).permutation(size)


def permute(positions: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Return the int64 values to which the permutation of range(size) selected by `key` maps `positions`.

    Each position is computed alone, so a process never holds a permutation of a billion samples. The permutation is an
    unbalanced Feistel network of eight rounds of SplitMix64 over the next power of two; a result outside of the range
    is permuted again until it falls inside ("cycle walking").

    Source: Black and Rogaway, Ciphers with arbitrary finite domains (2002).
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
            left ^= mix(right ^ first) >> UPPER_HALF & mask_high
            right ^= mix(left ^ second) >> UPPER_HALF & mask_low
        result[outside] = left << low | right
        outside = result >= size
    return result.astype(np.int64)


class ShuffledOrder:
    """Order of samples with random access: global batch k of an epoch is the k-th slice of one permutation.

    A global batch is cut into sub-batches of `device_batch_size`, one for each virtual device.
    """

    def __init__(self, num_samples: int, config: TrainingSettings) -> None:
        self.num_samples = num_samples
        self.seed = config.seed
        self.size = config.device_batch_size

    def sub_batch(self, epoch: int, index: int) -> np.ndarray:
        """Return the samples of one sub-batch of an epoch: (device_batch_size,) int64."""
        positions = np.arange(index * self.size, (index + 1) * self.size)
        return permute(positions, self.num_samples, (ORDER_STREAM, self.seed, epoch))


class Segment(NamedTuple):
    """Rows `first` to `stop` of a piece."""

    piece: int
    first: int
    stop: int


class Pool(NamedTuple):
    """Samples that are read together, segment after segment, and then shuffled."""

    segments: list[Segment]
    shuffle: np.ndarray  # (n,) int64: place i of the pool shows row shuffle[i] of the rows read


class PooledOrder:
    """Order of samples that are read piece by piece (row groups of parquet files, runs of files in a tar).

    The pieces, in an order drawn from the seed, form one sequence of samples. Each virtual device gets a stretch of it,
    all of equal length. A stretch is cut into pools of several sub-batches, and each pool is shuffled. So all virtual
    devices together show every sample once, up to the dropped last batch. A process reads only the pools of its own
    virtual devices. If a stretch or a resumed run starts inside a piece, the rows before it are read and discarded.
    """

    def __init__(self, piece_sizes: np.ndarray, config: TrainingSettings) -> None:
        self.piece_sizes = piece_sizes
        self.num_samples = int(piece_sizes.sum(dtype=np.int64))
        self.seed = config.seed
        self.size = config.device_batch_size
        self.steps = num_steps_per_epoch(self.num_samples, config.batch_size)
        self.pool_batches = num_pool_batches(config.batch_size)
        self.epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Compute the order of the pieces in an epoch, and where each of them ends."""
        if epoch == self.epoch:
            return
        self.order = self.ends = None  # free them first: for ten million pieces each takes 40 MB
        self.order = np.arange(len(self.piece_sizes), dtype=np.int32)
        np.random.default_rng((PIECES_STREAM, self.seed, epoch)).shuffle(self.order)
        sizes = np.empty(len(self.order), np.int32 if self.num_samples < 2**31 else np.int64)
        for start in range(0, len(sizes), 2**20):  # in parts, because numpy converts the whole index to int64
            sizes[start : start + 2**20] = self.piece_sizes[self.order[start : start + 2**20]]
        self.ends = np.cumsum(sizes, dtype=sizes.dtype, out=sizes)
        self.epoch = epoch

    def pool(self, epoch: int, device: int, index: int) -> Pool:
        """Return one pool of a virtual device in an epoch."""
        self.set_epoch(epoch)
        first_step = index * self.pool_batches
        num_batches = min(self.pool_batches, self.steps - first_step)
        first = (device * self.steps + first_step) * self.size
        stop = first + num_batches * self.size
        return Pool(list(self.segments(first, stop)), shuffle_pool(stop - first, self.seed, epoch, device, index))

    def segments(self, first: int, stop: int) -> Iterator[Segment]:
        """Yield the segments that hold positions `first` to `stop` of the epoch's sequence."""
        place = int(np.searchsorted(self.ends, self.ends.dtype.type(first), side="right"))
        while first < stop:
            piece, end = int(self.order[place]), int(self.ends[place])
            start = end - int(self.piece_sizes[piece])
            if end > first:  # false for an empty piece
                yield Segment(piece, first - start, min(stop, end) - start)
            first, place = max(first, end), place + 1

"""Reusable memory that workers fill with pixels and the training loop reads.

New memory is slow, because the system clears and maps each page when it is first touched. Filling the 300 kB of an
image's two views takes 3 us in memory used before, 60 us in new memory and 190 us in new shared memory.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from m2t_accel.config.fields import ConfigurationError, one_line

# All buffers of this process, by key.
_created: weakref.WeakValueDictionary[int, Buffers] = weakref.WeakValueDictionary()
_keys = itertools.count()


class Buffers:
    """A fixed number of uint8 buffers of one shape, in shared memory if worker processes will fill them.

    The main process takes a free buffer, a worker or the main process fills it, and the main process receives it as a
    tensor. The buffer is free again when no reference to the memory of that tensor is left, not even from a view of
    it. So a batch is never overwritten, however long it is kept; a caller that finds no free buffer takes new memory.
    A buffer that was taken but never handed over stays taken.

    Raises:
        ConfigurationError: there is not enough shared memory.
    """

    def __init__(self, count: int, shape: tuple[int, ...], shared: bool) -> None:
        shape = (count, *shape)
        try:
            self.memory = shared_memory(shape) if shared else torch.empty(shape, dtype=torch.uint8)
        except RuntimeError as error:
            size, reason = torch.Size(shape).numel() / 1e6, one_line(error).removeprefix("RuntimeError: ")
            raise ConfigurationError(
                f"cannot allocate the {size:,.0f} MB of shared memory that the workers need for their batches "
                f"({reason}): give a smaller --num_workers, or enlarge /dev/shm (docker run --shm-size)"
            ) from None
        self.free = deque(range(count))
        self.key = next(_keys)
        _created[self.key] = self

    def __getstate__(self) -> dict[str, object]:
        """Return the state that a worker needs."""
        return {"memory": self.memory, "key": self.key}

    def take(self) -> int | None:
        """Take a free buffer and return its number, or None if no buffer is free."""
        try:
            return self.free.popleft()
        except IndexError:
            return None

    def __getitem__(self, number: int) -> Tensor:
        """Return a buffer to fill."""
        return self.memory[number]

    def hand_over(self, number: int) -> Tensor | BufferReference:
        """Return a filled buffer as a tensor; in a worker, return a reference that unpickles as that tensor."""
        return self.receive(number) if get_worker_info() is None else BufferReference(self.key, number)

    def receive(self, number: int) -> Tensor:
        """Return a filled buffer as a tensor, and free it when the last reference to its memory is gone."""
        # References to the memory of a tensor need not be Python tensors, but all of them keep this array alive.
        array = self.memory[number].numpy()
        weakref.finalize(array, self.free.append, number).atexit = False
        return torch.from_numpy(array)


class BufferReference:
    """A filled buffer as a worker sends it: the main process unpickles it as the tensor itself."""

    def __init__(self, key: int, number: int) -> None:
        self.key = key
        self.number = number

    def __reduce__(self) -> tuple:
        return receive_buffer, (self.key, self.number)


def receive_buffer(key: int, number: int) -> Tensor:
    """Return a filled buffer of the Buffers with this key as a tensor."""
    return _created[key].receive(number)


def new_memory(shape: tuple[int, ...]) -> Tensor:
    """Return an uninitialised uint8 tensor; in a worker, in shared memory, which saves a copy when it is sent."""
    return torch.empty(shape, dtype=torch.uint8) if get_worker_info() is None else shared_memory(shape)


def shared_memory(shape: tuple[int, ...]) -> Tensor:
    """Return an uninitialised uint8 tensor in shared memory."""
    empty = torch.empty(0, dtype=torch.uint8)
    return empty.new(empty.untyped_storage()._new_shared(torch.Size(shape).numel())).view(shape)

"""Memory that workers fill with pixels and the loop reads, used again and again.

New memory is dear: the system clears each page and maps it at its first touch. To fill the 300 kB of an image's two
views takes 3 us in memory that was used before, 60 in new memory and 190 in new memory that processes share.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from m2t_accel.config.fields import ConfigurationError, one_line

_opened: weakref.WeakValueDictionary[int, Buffers] = weakref.WeakValueDictionary()  # of this process
_keys = itertools.count()


class Buffers:
    """A number of equal buffers, uint8; shared if processes that start from now on are to fill them.

    The main process takes a free buffer, somebody fills it, the main process receives it as a tensor, and when nothing
    refers to that tensor's memory any more, a view of it included, the buffer is free again. So nobody's pixels are
    written over, however long a batch is kept: where none is free, take new memory. One that was taken and is never
    handed over is not free again.

    Raises:
        ConfigurationError: there is not so much shared memory.
    """

    def __init__(self, number: int, shape: tuple[int, ...], shared: bool) -> None:
        shape = (number, *shape)
        try:
            self.memory = shared_memory(shape) if shared else torch.empty(shape, dtype=torch.uint8)
        except RuntimeError as error:
            size, reason = torch.Size(shape).numel() / 1e6, one_line(error).removeprefix("RuntimeError: ")
            raise ConfigurationError(
                f"the workers need {size:,.0f} MB of shared memory for their batches, which cannot be had "
                f"({reason}): give a smaller --num_workers, or more to /dev/shm (docker run --shm-size)"
            ) from None
        self.free = deque(range(number))
        self.key = next(_keys)
        _opened[self.key] = self

    def __getstate__(self) -> dict[str, object]:
        """What a worker needs."""
        return {"memory": self.memory, "key": self.key}

    def take(self) -> int | None:
        """The number of a free buffer, no longer free; None if there is none."""
        try:
            return self.free.popleft()
        except IndexError:
            return None

    def __getitem__(self, number: int) -> Tensor:
        """A buffer, to be filled by whom it was taken for."""
        return self.memory[number]

    def hand_over(self, number: int) -> Tensor | OnItsWay:
        """A filled buffer for the main process, and in a worker what becomes that once it is there."""
        return self.receive(number) if get_worker_info() is None else OnItsWay(self.key, number)

    def receive(self, number: int) -> Tensor:
        """A filled buffer; free again when the last reference to its memory has gone."""
        # A tensor's memory can have references that are no tensor's of Python; they all hold this array.
        array = self.memory[number].numpy()
        weakref.finalize(array, self.free.append, number).atexit = False
        return torch.from_numpy(array)


class OnItsWay:
    """What a worker sends in place of a buffer that it has filled: unpickled by the main process it is the tensor."""

    def __init__(self, key: int, number: int) -> None:
        self.key = key
        self.number = number

    def __reduce__(self) -> tuple:
        return arrived, (self.key, self.number)


def arrived(key: int, number: int) -> Tensor:
    return _opened[key].receive(number)


def new_memory(shape: tuple[int, ...]) -> Tensor:
    """An empty uint8 tensor; in a worker in shared memory, which saves a copy on its way to the main process."""
    return torch.empty(shape, dtype=torch.uint8) if get_worker_info() is None else shared_memory(shape)


def shared_memory(shape: tuple[int, ...]) -> Tensor:
    """An empty uint8 tensor in memory that processes share."""
    empty = torch.empty(0, dtype=torch.uint8)
    return empty.new(empty.untyped_storage()._new_shared(torch.Size(shape).numel())).view(shape)

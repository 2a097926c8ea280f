import gc
import os
import pickle
import tempfile

import pytest
import torch
from helpers import FillingDataset, identity
from torch.utils.data import DataLoader

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.buffers import BufferReference, Buffers


def filled(buffers, value):
    number = buffers.take()
    buffers[number].fill_(value)
    return buffers.hand_over(number)


@pytest.mark.parametrize("keep", [lambda t: t, lambda t: t[1], lambda t: t.view(-1), lambda t: t.numpy()[:1]])
def test_a_buffer_is_free_again_when_nothing_refers_to_its_memory(keep):
    buffers = Buffers(2, (3, 4), shared=False)
    kept = keep(filled(buffers, 7))
    assert len(buffers.free) == 1
    other = filled(buffers, 8)
    assert buffers.take() is None
    assert (kept == 7).all()
    del other
    assert len(buffers.free) == 1
    assert (filled(buffers, 9) == 9).all()
    assert (kept == 7).all()
    del kept
    assert sorted(buffers.free) == [0, 1]


def test_a_tensor_outlives_its_buffers():
    kept = filled(Buffers(1, (5,), shared=True), 3)
    gc.collect()
    assert (kept == 3).all()


class RecordedRequests:
    """Forty values, each with a buffer if one is free."""

    def __init__(self, buffers):
        self.buffers = buffers
        self.taken = []

    def __len__(self):
        return 40

    def __iter__(self):
        for value in range(40):
            self.taken.append(self.buffers.take())
            yield value, self.taken[-1]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_reuse_buffers_but_never_one_that_is_kept(context):
    buffers = Buffers(4, (8, 8), shared=True)
    requests = RecordedRequests(buffers)
    loader = DataLoader(
        FillingDataset(buffers),
        batch_sampler=requests,
        collate_fn=identity,
        num_workers=1,
        prefetch_factor=2,
        multiprocessing_context=context,
    )
    kept = []
    for value, batch in enumerate(loader):
        assert batch.tolist() == [[value] * 8] * 8
        if value in (20, 21, 22):
            kept.append(batch[:1])
    assert set(requests.taken[:20]) == {0, 1, 2, 3}
    assert None in requests.taken[25:]  # one free buffer is not enough for the loop and the worker
    assert [part[0, 0].item() for part in kept] == [20, 21, 22]
    assert all((part == part[0, 0]).all() for part in kept)
    del batch
    kept.clear()
    assert sorted(buffers.free) == [0, 1, 2, 3]


def test_a_worker_sends_a_small_reference_that_unpickles_as_the_buffer():
    buffers = Buffers(1, (1000, 1000), shared=True)
    number = buffers.take()
    sent = pickle.dumps(BufferReference(buffers.key, number, 700))
    buffers[number][5] = 1
    assert len(sent) < 100
    received = pickle.loads(sent)
    assert torch.equal(received, buffers[number][:700])
    assert received.data_ptr() == buffers[number].data_ptr()
    del received
    assert buffers.take() == number


def test_memory_is_reserved_at_once_and_not_in_dev_shm():
    buffers = Buffers(3, (2, 1000, 2000), shared=True)
    assert os.fstat(buffers.file).st_blocks * 512 >= 12_000_000
    assert "/dev/shm" not in os.readlink(f"/proc/self/fd/{buffers.file}")


def test_too_little_memory_is_one_line_that_names_num_workers(monkeypatch, small_disk):
    """Without memfd_create the memory is a file in the folder of temporary files."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk(64)))
    assert Buffers(3, (2, 1000, 10), shared=True)[2].shape == (2, 1000, 10)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigurationError, match=r"12 MB.*No space left.*--num_workers"):
        Buffers(3, (2, 1000, 2000), shared=True)
    assert os.listdir("/proc/self/fd") == before
    assert Buffers(3, (2, 1000, 2000), shared=False).take() == 0

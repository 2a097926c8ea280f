import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, pairwise

import numpy as np
import pytest
from helpers import settings, write_parquet, write_tar

from m2t_accel.data import order, parquet
from m2t_accel.data.decode import decode_image
from m2t_accel.data.loader import create_loader, read
from m2t_accel.data.order import permute
from m2t_accel.data.requests import DeviceBatches, read_after
from m2t_accel.data.sources import load_images
from m2t_accel.data.views import TwoViews


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    """Pools of two steps of 8 images."""
    monkeypatch.setattr(order, "POOL_SIZE", 16)
    monkeypatch.setattr(order, "MIN_POOL_BATCHES", 2)


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_a_global_batch_is_a_slice_of_the_permutation_for_any_number_of_processes(num_processes):
    config = settings("digits", batch_size=16, device_batch_size=4)
    images = load_images(config).train.select(range(100))
    shares = [list(DeviceBatches(images, config, num_processes, process)) for process in range(num_processes)]
    sub_batches = 4 // num_processes
    for k in range(3 * 6):
        epoch, step = divmod(k, 6)
        whole = permute(np.arange(100), 100, (order.ORDER_STREAM, config.seed, epoch))
        requests = [shares[p][k * sub_batches + j] for j in range(sub_batches) for p in range(num_processes)]
        assert np.array_equal(np.concatenate([r.samples for r in requests]), whole[step * 16 : (step + 1) * 16])
        assert {request.epoch for request in requests} == {epoch}
    assert {len(share) for share in shares} == {3 * 6 * sub_batches}


@pytest.fixture(params=["random access", "parquet", "tars"])
def config(request, tmp_path):
    """About ten steps per epoch, for each way of reading a source."""
    if request.param == "random access":
        return settings("digits", max_images=170, batch_size=16, device_batch_size=8, epochs=2)
    for shard, number in enumerate((30, 20, 35)):
        if request.param == "parquet":
            write_parquet(tmp_path / f"train-{shard}.parquet", 100 * shard, number, row_group_size=7)
        else:
            write_tar(tmp_path / f"train-{shard}.tar", 100 * shard, number)
    return settings(tmp_path, batch_size=8, device_batch_size=4, validation_fraction=0, streaming=True)


def samples_by_step(config, first_step=0, num_steps=None, num_workers=0, num_processes=1):
    """Return the samples of all processes in each step, as the loader delivers them."""
    images = load_images(config).train
    config = dataclasses.replace(config, num_workers=num_workers)
    per_step = config.num_virtual_devices
    shares = []
    for process in range(num_processes):
        batches = DeviceBatches(images, config, num_processes, process, first_step)
        shown = []
        for batch in read(create_loader(TwoViews(images, config), batches, config)):
            shown.append(batch.samples.tolist())
            if num_steps is not None and len(shown) == num_steps * per_step // num_processes:
                break
        shares.append(shown)
    sub_batches = list(chain(*zip(*shares, strict=True)))
    return [list(chain(*sub_batches[i : i + per_step])) for i in range(0, len(sub_batches), per_step)]


@pytest.mark.parametrize(
    ("num_workers", "num_processes"),
    [(0, 2), (2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 1), (3, 1), (2, 2), (3, 2)])],
)
def test_a_resumed_run_sees_the_samples_of_an_uninterrupted_one(config, num_workers, num_processes):
    """Stopped twice, the second time beyond the end of an epoch; each epoch shows every sample at most once."""
    images = load_images(config).train
    steps = len(images) // config.batch_size
    reference = samples_by_step(config)
    cuts = [0, steps // 2 + 1, steps + 1, config.epochs * steps]
    shown = []
    for first, last in pairwise(cuts):
        shown += samples_by_step(config, first, last - first, num_workers, num_processes)
    assert shown == reference
    for epoch in range(config.epochs):
        samples = list(chain(*shown[epoch * steps : (epoch + 1) * steps]))
        assert len(set(samples)) == len(samples) == steps * config.batch_size
        assert set(samples) <= set(range(len(images)))
    assert shown[:steps] != shown[steps : 2 * steps]


def test_spare_steps_follow_the_last_step_of_a_run():
    config = settings("digits", batch_size=512, device_batch_size=512, epochs=2)
    images = load_images(config).train
    longer = settings("digits", batch_size=512, device_batch_size=512, epochs=3)
    spare, later = DeviceBatches(images, config, 1, 0, 3, num_spare_steps=2), DeviceBatches(images, longer, 1, 0, 3)
    assert len(images) // 512 == 2
    assert len(spare) == len(later) == 3
    for one, other in zip(spare, later, strict=True):
        assert (one.epoch, one.samples.tolist()) == (other.epoch, other.samples.tolist())


def test_a_resume_reads_one_pool_again_and_no_other(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train-0.parquet", 0, 160, row_group_size=4)
    config = settings(tmp_path, streaming=True, batch_size=8, device_batch_size=8, validation_fraction=0, epochs=2)
    images = load_images(config).train
    opened, open_piece = [], type(images).open
    monkeypatch.setattr(
        type(images), "open", lambda self, piece, *limit: opened.append(piece) or open_piece(self, piece, *limit)
    )
    list(DeviceBatches(images, config, 1, 0, first_step=20 + 3))
    pooled = order.PooledOrder(images.piece_sizes, config)
    # In the second epoch, from the pool of its third step on.
    expected = {segment.piece for index in range(1, 10) for segment in pooled.pool(1, 0, index).segments}
    assert len(opened) == len(expected) == 36  # a piece that two pools share is opened once
    assert set(opened) == expected


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_piece_that_many_pools_share_is_read_once_by_each_device(tmp_path, monkeypatch, num_devices):
    write_parquet(tmp_path / "train-0.parquet", 0, 160, row_group_size=160)
    config = settings(
        tmp_path, streaming=True, batch_size=8, device_batch_size=8 // num_devices, validation_fraction=0, epochs=2
    )
    images = load_images(config).train
    opened, decoded, open_shard, undecoded = [], [], parquet.open_shard, parquet.undecoded
    monkeypatch.setattr(parquet, "open_shard", lambda file: opened.append(file) or open_shard(file))
    monkeypatch.setattr(parquet, "undecoded", lambda row, place: decoded.append(place) or undecoded(row, place))
    requests = list(DeviceBatches(images, config, 1, 0))
    assert len(opened) == 2 * num_devices  # in two epochs
    assert len(decoded) == 2 * 160
    assert sorted(np.concatenate([request.samples for request in requests])) == sorted([*range(160)] * 2)
    for request in requests:
        assert [decode_image(image)[0, 0, 0] for image in request.images] == request.samples.tolist()


def test_a_segment_does_not_wait_for_a_cancelled_one():
    """At the end of a run, queued reads are cancelled while a thread may start the read that follows them."""
    previous = Future()
    previous.cancel()
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(read_after, previous, lambda first, stop: (first, stop), 3, 5)
        assert read.result(timeout=10) == (3, 5)

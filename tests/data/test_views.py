import dataclasses
import io
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, pairwise
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from helpers import natural_image, settings, write_image, write_parquet, write_tar
from PIL import Image

from m2t_accel.config.recipes import build_config
from m2t_accel.data import order, parquet, views
from m2t_accel.data import requests as requests_module
from m2t_accel.data.decode import decode_image
from m2t_accel.data.loader import create_loader, read
from m2t_accel.data.order import permuted
from m2t_accel.data.sources import load_images

# --- order


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_a_global_batch_is_a_slice_of_the_permutation_whatever_the_processes(num_processes):
    config = settings("digits", batch_size=16, device_batch_size=4)
    images = load_images(config).train.select(range(100))
    shares = [
        list(requests_module.DeviceBatches(images, config, num_processes, process)) for process in range(num_processes)
    ]
    micro_steps = 4 // num_processes
    for k in range(3 * 6):
        epoch, step = divmod(k, 6)
        whole = permuted(np.arange(100), 100, (order.ORDER_STREAM, config.seed, epoch))
        requests = [shares[p][k * micro_steps + j] for j in range(micro_steps) for p in range(num_processes)]
        assert np.array_equal(np.concatenate([r.samples for r in requests]), whole[step * 16 : (step + 1) * 16])
        assert {request.epoch for request in requests} == {epoch}
    assert {len(share) for share in shares} == {3 * 6 * micro_steps}


@pytest.fixture(params=["read one by one", "parquet", "tars"])
def config(request, tmp_path, monkeypatch):
    """Ten steps an epoch in pools of two, of sources that are read in each of the ways."""
    monkeypatch.setattr(order, "POOL_SIZE", 16)
    monkeypatch.setattr(order, "MIN_POOL_BATCHES", 2)
    common = {"batch_size": 8, "device_batch_size": 4, "validation_fraction": 0, "streaming": True}
    if request.param == "read one by one":
        return settings("digits", **common, epochs=2)
    for shard, number in enumerate((30, 20, 35)):
        if request.param == "parquet":
            write_parquet(tmp_path / f"train-{shard}.parquet", 100 * shard, number, row_group_size=7)
        else:
            write_tar(tmp_path / f"train-{shard}.tar", 100 * shard, number)
    return settings(tmp_path, **common)


def recorded(config, first_step=0, num_steps=None, num_workers=0, num_processes=1):
    """The samples that the processes show in each step, as the loader delivers them: lists of ids, by step."""
    images = load_images(config).train
    config = dataclasses.replace(config, num_workers=num_workers)
    parts = []
    for process in range(num_processes):
        batches = requests_module.DeviceBatches(images, config, num_processes, process, first_step)
        loader, shown = create_loader(views.TwoViews(images, config), batches, config), []
        micro_steps = config.num_virtual_devices // num_processes
        for batch in read(loader):
            shown.append(batch.samples.tolist())
            if num_steps is not None and len(shown) == num_steps * micro_steps:
                break
        parts.append(shown)
    micro_batches = [share for shares in zip(*parts, strict=True) for share in shares]
    per_step = config.num_virtual_devices
    return [list(chain(*micro_batches[i : i + per_step])) for i in range(0, len(micro_batches), per_step)]


def test_every_epoch_shows_every_sample_once_up_to_the_dropped_last_batch(config):
    images = load_images(config).train
    steps = len(images) // 8
    shown = recorded(config, num_workers=2)
    assert len(shown) == config.epochs * steps
    for epoch in range(config.epochs):
        samples = list(chain(*shown[epoch * steps : (epoch + 1) * steps]))
        assert len(set(samples)) == len(samples) == steps * 8
        assert set(samples) <= set(range(len(images)))
    assert shown[:steps] != shown[steps : 2 * steps]


@pytest.mark.parametrize(("num_workers", "num_processes"), [(0, 1), (2, 1), (3, 1), (0, 2), (2, 2), (3, 2)])
def test_a_resumed_run_sees_what_an_uninterrupted_one_would_have(config, num_workers, num_processes):
    """Stopped twice, the second time across an epoch's end: the ids are those of one process that never stopped."""
    steps = len(load_images(config).train) // 8
    reference = recorded(config)
    cuts = [0, steps // 2 + 1, steps + 1, len(reference)]
    shown = []
    for first, last in pairwise(cuts):
        shown += recorded(config, first, last - first, num_workers, num_processes)
    assert shown == reference


@pytest.mark.parametrize("kind", [views.TwoViews, views.FlippedCrops])
def test_views_are_the_same_whether_a_part_or_the_whole_is_decoded(kind, monkeypatch):
    """Photographs of several sizes, one turned, one progressive: bit for bit, and less is decoded than the wholes."""
    rows = []
    for i, (height, width) in enumerate(((96, 130), (257, 64), (40, 41), (90, 90), (300, 200), (33, 500))):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        picture = Image.fromarray(natural_image(height, width, seed=i))
        picture.save(file, "JPEG", quality=90, progressive=i == 2, **({"exif": exif} if i == 3 else {}))
        rows.append({"bytes": file.getvalue(), "path": None})
    config = build_config({"recipe": "8xV100-b1024-100ep", "dataset": "digits", "image_size": 32})
    views, request = kind(range(6), config), requests_module.Request(3, np.arange(6), rows)
    areas, decode_part = [], views.decode_part

    def recording(content, top, left, bottom, right):
        areas.append((bottom - top) * (right - left))
        return decode_part(content, top, left, bottom, right)

    monkeypatch.setattr(views, "decode_part", recording)
    parts = views.__getitems__(request).crops
    assert len(areas) == 4, "all but the turned and the progressive one"
    assert sum(areas) < 0.95 * (96 * 130 + 257 * 64 + 300 * 200 + 33 * 500)
    monkeypatch.setattr(views, "plain_jpeg_size", lambda content: None)
    assert torch.equal(parts, views.__getitems__(request).crops)
    assert len(areas) == 4


def test_a_replacement_that_is_damaged_elsewhere_shows_its_own_crops(monkeypatch):
    """Decoded are parts: an image may serve for its own crops, and not for those of the place it shall fill."""
    config = settings("digits")
    images = load_images(config).train
    expected = (
        views.TwoViews(images, config).__getitems__(requests_module.Request(0, np.arange(4), None)).crops.view(2, 4, -1)
    )
    tried, cut = [], views.TwoViews.cut

    def failing(self, image, uniforms, crops):
        tried.append(image)
        if len(tried) == 1 or len(tried) > 4:
            raise views.DecodeError("damaged")
        cut(self, image, uniforms, crops)

    monkeypatch.setattr(views.TwoViews, "cut", failing)
    batch = views.TwoViews(images, config).__getitems__(requests_module.Request(0, np.arange(4), None))
    assert batch.samples.tolist() == [1, 1, 2, 3]
    assert torch.equal(batch.crops.view(2, 4, -1)[:, 0], expected[:, 1])


def test_a_resume_reads_one_pool_again_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "POOL_SIZE", 16)
    monkeypatch.setattr(order, "MIN_POOL_BATCHES", 2)
    write_parquet(tmp_path / "train-0.parquet", 0, 160, row_group_size=4)
    config = settings(tmp_path, streaming=True, batch_size=8, device_batch_size=8, validation_fraction=0, epochs=2)
    images = load_images(config).train
    read, whole = [], type(images).open
    monkeypatch.setattr(
        type(images), "open", lambda self, piece, *held: read.append(piece) or whole(self, piece, *held)
    )
    list(requests_module.DeviceBatches(images, config, 1, 0, first_step=20 + 3))
    pooled = order.PooledOrder(images.piece_sizes, config)
    wanted = {segment.piece for index in range(1, pooled.num_pools()) for segment in pooled.pool(1, 0, index).segments}
    assert len(read) == len(wanted) == 36  # a piece that two pools share is opened once
    assert set(read) == wanted  # of the second epoch, from the pool of its third step on


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_piece_that_many_pools_share_is_read_once(tmp_path, monkeypatch, num_devices):
    """By each device whose stretch it lies in; and every pool gets the rows that are its own."""
    monkeypatch.setattr(order, "POOL_SIZE", 16)
    monkeypatch.setattr(order, "MIN_POOL_BATCHES", 2)
    write_parquet(tmp_path / "train-0.parquet", 0, 160, row_group_size=160)
    config = settings(
        tmp_path, streaming=True, batch_size=8, device_batch_size=8 // num_devices, validation_fraction=0, epochs=2
    )
    images = load_images(config).train
    opened, decoded, whole = [], [], parquet.open_shard
    monkeypatch.setattr(parquet, "open_shard", lambda file: opened.append(file) or whole(file))
    undecoded = parquet.undecoded
    monkeypatch.setattr(parquet, "undecoded", lambda row, place: decoded.append(place) or undecoded(row, place))
    requests = list(requests_module.DeviceBatches(images, config, 1, 0))
    assert len(opened) == 2 * num_devices  # of each epoch
    assert len(decoded) == 2 * 160
    assert sorted(np.concatenate([request.samples for request in requests])) == sorted([*range(160)] * 2)
    for request in requests:
        assert [decode_image(image)[0, 0, 0] for image in request.images] == request.samples.tolist()


def test_a_segment_does_not_wait_for_one_that_is_cancelled():
    """At a run's end what waits is cancelled, while a thread may begin what follows it."""
    before = Future()
    before.cancel()
    with ThreadPoolExecutor(1) as readers:
        read = readers.submit(requests_module.read_after, before, lambda first, stop: (first, stop), 3, 5)
        assert read.result(timeout=10) == (3, 5)


# --- views


def views_of(config, num_workers=0, num_processes=1):
    images = load_images(config).train
    config = dataclasses.replace(config, num_workers=num_workers)
    found = {}
    for process in range(num_processes):
        batches = requests_module.DeviceBatches(images, config, num_processes, process)
        for number, batch in enumerate(read(create_loader(views.TwoViews(images, config), batches, config))):
            epoch = number * config.epochs // len(batches)
            crops = batch.crops.view(2, -1, *batch.crops.shape[1:])
            for i, sample in enumerate(batch.samples.tolist()):
                parameters = [part.view(2, len(batch.samples), -1)[:, i] for part in batch.photometry]
                found[epoch, sample] = [crops[:, i], *parameters]
    return found


def test_views_are_the_same_for_any_number_of_workers_and_processes():
    config = settings("digits", batch_size=256, device_batch_size=128, epochs=2)
    reference = views_of(config)
    assert len(reference) == 2 * 1280
    for other in (views_of(config, num_workers=2), views_of(config, num_processes=2)):
        assert other.keys() == reference.keys()
        assert all(torch.equal(a, b) for k in reference for a, b in zip(reference[k], other[k], strict=True))
    reseeded = views_of(dataclasses.replace(config, seed=5))
    shared = reference.keys() & reseeded.keys()
    assert not any(torch.equal(reference[k][0], reseeded[k][0]) for k in shared)


def test_streamed_images_have_the_views_of_copied_ones(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 0, 24, row_group_size=5)
    config = settings(tmp_path, validation_fraction=0)
    copied, streamed = views_of(config), views_of(dataclasses.replace(config, streaming=True))
    assert copied.keys() == streamed.keys() == {(epoch, sample) for epoch in range(3) for sample in range(24)}
    assert all(torch.equal(a, b) for k in copied for a, b in zip(copied[k], streamed[k], strict=True))


# --- faults


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_replaced_by_another_of_its_batch(tmp_path, num_workers):
    for i in range(12):
        write_image(tmp_path / f"{i:02}.png", value=10 * i)
    sound = recorded(settings(tmp_path))
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:60])
    (tmp_path / "07.png").write_text("not an image")
    config = settings(tmp_path, num_workers=num_workers)
    images = load_images(config).train
    batches = requests_module.DeviceBatches(images, config, 1, 0)
    bad = {}
    for batch, samples in zip(read(create_loader(views.TwoViews(images, config), batches, config)), sound, strict=True):
        bad |= {image.sample: image for image in batch.bad}
        assert {image.sample for image in batch.bad} == {3, 7} & set(samples)
        shown = batch.samples.tolist()
        assert len(shown) == 4
        assert set(shown) == set(samples) - {3, 7}
        # The views are of what is said to be shown: their colour is the file's.
        crops = batch.crops.view(2, 4, -1)
        for view in range(2):
            for i, sample in enumerate(shown):
                assert (crops[view, i] == 10 * sample).float().mean() > 0.2
    assert bad.keys() == {3, 7}
    assert bad[3].path.endswith("03.png")
    assert "no known image format" in bad[7].reason


def test_a_batch_travels_as_it_is():
    for kind in (views.TwoViews, views.FlippedCrops):
        config = settings("digits", batch_size=3)
        images = load_images(config).train
        batch = kind(images, config).__getitems__(requests_module.Request(0, np.array([4, 2, 9]), None))
        batch = batch._replace(bad=(views.BadImage(2, "two.png", "cut"),))
        received = pickle.loads(ForkingPickler.dumps(batch))
        assert type(received) is views.ViewBatch
        assert received.bad == batch.bad
        assert type(received.photometry) is type(batch.photometry)
        pairs = zip(*(torch.utils._pytree.tree_leaves(parts[:3]) for parts in (received, batch)), strict=True)
        for there, here in pairs:
            assert there.dtype == here.dtype
            assert torch.equal(there, here)

import dataclasses
import io
import multiprocessing
import os
import pickle
import re
from itertools import chain, pairwise
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from conftest import natural_image, write_image, write_parquet, write_tar
from PIL import Image

from m2t_accel import data, order
from m2t_accel.order import permuted
from m2t_accel.recipes import build_config
from m2t_accel.settings import ConfigurationError
from m2t_accel.sources import load_images


def settings(dataset, **others):
    return build_config(
        {"recipe": "digits", "dataset": str(dataset), "batch_size": 4, "epochs": 3, "warmup_epochs": 1, **others}
    )


# --- order


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_a_global_batch_is_a_slice_of_the_permutation_whatever_the_processes(num_processes):
    config = settings("digits", batch_size=16, device_batch_size=4)
    images = load_images(config).train.select(range(100))
    shares = [list(data.DeviceBatches(images, config, num_processes, process)) for process in range(num_processes)]
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
        batches = data.DeviceBatches(images, config, num_processes, process, first_step)
        loader, shown = data.create_loader(data.TwoViews(images, config), batches, config), []
        micro_steps = config.num_virtual_devices // num_processes
        for batch in data.read(loader):
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


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
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


@pytest.mark.parametrize("kind", [data.TwoViews, data.FlippedCrops])
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
    views, request = kind(range(6), config), data.Request(3, np.arange(6), rows)
    areas, decode_part = [], data.decode_part

    def recording(content, top, left, bottom, right):
        areas.append((bottom - top) * (right - left))
        return decode_part(content, top, left, bottom, right)

    monkeypatch.setattr(data, "decode_part", recording)
    parts = views.__getitems__(request).crops
    assert len(areas) == 4, "all but the turned and the progressive one"
    assert sum(areas) < 0.95 * (96 * 130 + 257 * 64 + 300 * 200 + 33 * 500)
    monkeypatch.setattr(data, "plain_jpeg_size", lambda content: None)
    assert torch.equal(parts, views.__getitems__(request).crops)
    assert len(areas) == 4


def test_a_resume_reads_one_pool_again_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "POOL_SIZE", 16)
    monkeypatch.setattr(order, "MIN_POOL_BATCHES", 2)
    write_parquet(tmp_path / "train-0.parquet", 0, 160, row_group_size=4)
    config = settings(tmp_path, streaming=True, batch_size=8, device_batch_size=8, validation_fraction=0, epochs=2)
    images = load_images(config).train
    read, whole = [], type(images).table
    monkeypatch.setattr(
        type(images), "table", lambda self, piece, columns: read.append(piece) or whole(self, piece, columns)
    )
    list(data.DeviceBatches(images, config, 1, 0, first_step=20 + 3))
    pooled = order.PooledOrder(images.piece_sizes, config)
    wanted = [segment.piece for index in range(1, pooled.num_pools()) for segment in pooled.pool(1, 0, index).segments]
    assert sorted(read) == sorted(wanted)  # of the second epoch, from the pool of its third step on


# --- views


def views_of(config, num_workers=0, num_processes=1):
    images = load_images(config).train
    config = dataclasses.replace(config, num_workers=num_workers)
    found = {}
    for process in range(num_processes):
        batches = data.DeviceBatches(images, config, num_processes, process)
        for number, batch in enumerate(data.read(data.create_loader(data.TwoViews(images, config), batches, config))):
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


def test_the_loader_leaves_the_global_random_state_alone():
    config = settings("digits", batch_size=256)
    before = torch.get_rng_state()
    views_of(config, num_workers=1)
    assert torch.equal(before, torch.get_rng_state())


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
    batches = data.DeviceBatches(images, config, 1, 0)
    bad = {}
    for batch, samples in zip(
        data.read(data.create_loader(data.TwoViews(images, config), batches, config)), sound, strict=True
    ):
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


def test_nothing_to_show_ends_the_run(tmp_path):
    for i in range(8):
        write_image(tmp_path / f"{i}.png")
    config = settings(tmp_path)
    images = load_images(config).train
    for path in tmp_path.glob("*.png"):
        path.unlink()
    loader = data.create_loader(data.TwoViews(images, config), data.DeviceBatches(images, config, 1, 0), config)
    with pytest.raises(ConfigurationError, match=r"none of the 4 images of a batch .*No such file.* been moved"):
        list(data.read(loader))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_put_where_others_were_and_never_over_one_that_is_kept(num_workers, monkeypatch):
    config = settings("digits", num_workers=num_workers)
    images = load_images(config).train.select(range(60))
    dataset, requests = data.TwoViews(images, config), list(data.DeviceBatches(images, config, 1, 0))
    expected = [data.TwoViews(images, config).__getitems__(request).crops for request in requests]
    loader = data.create_loader(dataset, requests, config)
    taken = []
    take = loader.dataset.buffers.take
    monkeypatch.setattr(loader.dataset.buffers, "take", lambda: taken.append(take()) or taken[-1])
    for batch, crops in zip(data.read(loader), expected, strict=True):
        assert torch.equal(batch.crops, crops)
    assert set(taken) == set(range(2 * num_workers + 2)), "one was not free when it was needed, or never used"
    taken.clear()
    kept = [batch.crops for batch in data.read(loader)]
    assert None in taken
    assert all(map(torch.equal, kept, expected))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_loaders_of_the_same_images_at_once(num_workers):
    config = settings("digits", num_workers=num_workers)
    images = load_images(config).train.select(range(60))
    dataset, requests = data.TwoViews(images, config), list(data.DeviceBatches(images, config, 1, 0))
    expected = [dataset.__getitems__(request).crops for request in requests]
    loaders = [data.create_loader(dataset, part, config) for part in (requests, requests[::-1])]
    kept = [[batch.crops for batch in pair] for pair in zip(*map(data.read, loaders), strict=True)]
    assert all(map(torch.equal, [first for first, _ in kept], expected))
    assert all(map(torch.equal, [second for _, second in kept], expected[::-1]))


def test_a_batch_travels_as_it_is():
    for kind in (data.TwoViews, data.FlippedCrops):
        config = settings("digits", batch_size=3)
        images = load_images(config).train
        batch = kind(images, config).__getitems__(data.Request(0, np.array([4, 2, 9]), None))
        batch = batch._replace(bad=(data.BadImage(2, "two.png", "cut"),))
        received = pickle.loads(ForkingPickler.dumps(batch))
        assert type(received) is data.ViewBatch
        assert received.bad == batch.bad
        assert type(received.photometry) is type(batch.photometry)
        pairs = zip(*(torch.utils._pytree.tree_leaves(parts[:3]) for parts in (received, batch)), strict=True)
        for there, here in pairs:
            assert there.dtype == here.dtype
            assert torch.equal(there, here)


@pytest.mark.parametrize("kind", [data.TwoViews, data.FlippedCrops])
def test_a_batch_is_sent_beside_what_a_gpu_computes_and_waited_for(kind, monkeypatch):
    """The order of what is asked of a GPU, on a stand-in: the copy on a stream of its own, the waiting, the use."""
    asked = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            asked.append(f"on {self.name}")

        def __exit__(self, *exception):
            asked.append(f"off {self.name}")

        def wait_stream(self, other):
            asked.append(f"{self.name} waits for {other.name}")

    def send_to_device(values, device, non_blocking):
        asked.append(("sent", non_blocking))
        return values

    computing, copying = Stream("computing"), Stream("copying")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: asked.append((id(tensor), stream.name)))
    monkeypatch.setattr(data, "send_to_device", send_to_device)
    config = settings("digits")
    batch = kind(load_images(config).train, config).__getitems__(data.Request(0, np.array([4, 2, 9]), None))
    sent = data.send(batch, torch.device("cuda", 0), copying)
    assert asked[:4] == ["on copying", ("sent", True), "off copying", "computing waits for copying"]
    sent_tensors = [sent.crops, *(sent.photometry if kind is data.TwoViews else [sent.photometry])]
    assert asked[4:] == [(id(tensor), "computing") for tensor in sent_tensors]
    assert sent.samples is batch.samples, "they stay in the main memory"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_arrives_on_a_gpu_is_what_was_sent():
    """Many batches, each used after a long computation was asked for: none is written over, none is read too early."""
    config, device = settings("digits", batch_size=64, num_workers=1), torch.device("cuda", 0)
    images = load_images(config).train
    requests = data.DeviceBatches(images, config, 1, 0)
    long = torch.rand(4096, 4096, device=device)
    arrived = []
    for batch in data.read(data.create_loader(data.TwoViews(images, config), requests, config, device), device):
        long = long @ long / 4096
        arrived.append([batch.crops.clone(), batch.photometry.order.clone()])
    for request, (crops, order_of_jitter) in zip(requests, arrived, strict=True):
        expected = data.TwoViews(images, config).__getitems__(request)
        assert torch.equal(crops.cpu(), expected.crops)
        assert torch.equal(order_of_jitter.cpu(), expected.photometry.order)


def test_a_shard_that_is_cut_while_it_is_read_ends_the_run(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 0, 64, row_group_size=4)
    config = settings(tmp_path, streaming=True, validation_fraction=0, num_workers=1)
    images = load_images(config).train
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1")
    loader = data.create_loader(data.TwoViews(images, config), data.DeviceBatches(images, config, 1, 0), config)
    message = r"the shard .*train-0\.parquet cannot be read .* fetch it again"
    with pytest.raises(ConfigurationError, match=message) as kept:
        list(data.read(loader))
    assert multiprocessing.active_children() == [], f"they live with what {kept} refers to"


KILLED = """
import os, signal, time
import torch
from m2t_accel import data
from m2t_accel.recipes import build_config
from m2t_accel.settings import ConfigurationError
from m2t_accel.sources import load_images
config = build_config({"recipe": "digits", "batch_size": 4, "num_workers": 2})
images = load_images(config).train
for in_the_loop in (True, False):
    loader = data.create_loader(data.TwoViews(images, config), data.DeviceBatches(images, config, 1, 0), config)
    try:
        with data.dead_workers_in_one_line():
            for i, _ in enumerate(data.read(loader)):
                if i == 0:
                    os.kill(torch.multiprocessing.active_children()[0].pid, signal.SIGKILL)
                if in_the_loop:
                    time.sleep(0.2)
    except ConfigurationError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run(run_script):
    """In a process of its own: what threads of the broken queues say later must not reach another test."""
    lines = run_script("-c", KILLED).stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.match(r"a process that decodes images has died .*give a smaller --num_workers", line)


def test_workers_take_the_cores_that_training_leaves(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert data.default_num_workers() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    assert data.default_num_workers() == 5

import dataclasses
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from helpers import natural_image, settings, write_image, write_parquet
from PIL import Image

from m2t_accel.config.recipes import build_config
from m2t_accel.data import crops, views
from m2t_accel.data.loader import Packed, create_loader, read
from m2t_accel.data.requests import DeviceBatches, Request
from m2t_accel.data.sources import load_images


def views_of(config, images=None, num_workers=0, num_processes=1):
    """Return the crops and the parameters of each (epoch, sample)."""
    images = images or load_images(config).train
    config = dataclasses.replace(config, num_workers=num_workers)
    found = {}
    for process in range(num_processes):
        batches = DeviceBatches(images, config, num_processes, process)
        for number, batch in enumerate(read(create_loader(views.TwoViews(images, config), batches, config))):
            epoch = number * config.epochs // len(batches)
            crops = batch.crops.view(2, -1, *batch.crops.shape[1:])
            for i, sample in enumerate(batch.samples.tolist()):
                parameters = [part.view(2, len(batch.samples), -1)[:, i] for part in batch.photometry]
                found[epoch, sample] = [crops[:, i], *parameters]
    return found


def test_views_are_the_same_for_any_number_of_workers_and_processes():
    config = settings("digits", batch_size=32, device_batch_size=16, epochs=2)
    images = load_images(config).train.select(range(150))
    reference = views_of(config, images)
    assert len(reference) == 2 * 128
    for other in (views_of(config, images, num_workers=2), views_of(config, images, num_processes=2)):
        assert other.keys() == reference.keys()
        assert all(torch.equal(a, b) for k in reference for a, b in zip(reference[k], other[k], strict=True))
    reseeded = views_of(dataclasses.replace(config, seed=5), images)
    shared = reference.keys() & reseeded.keys()
    assert not any(torch.equal(reference[k][0], reseeded[k][0]) for k in shared)


def test_each_view_has_the_crop_and_the_colours_of_its_own_random_numbers():
    pictures, rows = [natural_image(40, 50, seed) for seed in range(6)], []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    config = build_config({"recipe": "8xV100-b1024-100ep", "dataset": "digits", "image_size": 32, "seed": 5})
    batch = views.TwoViews(range(6), config).__getitems__(Request(3, np.arange(6), rows))
    for view, shown in enumerate(batch.crops.chunk(2)):
        uniforms = crops.draw_uniforms(5, 3, np.arange(6), view)
        for picture, numbers, crop in zip(pictures, uniforms, shown, strict=True):
            box = crops.draw_crop(numbers, 40, 50, config)
            assert np.array_equal(crop, crops.cut(picture, box, np.empty((32, 32, 3), np.uint8)))
        parameters = crops.photometry_parameters(uniforms, np.full(6, view), config)
        for found, expected in zip(batch.photometry, parameters, strict=True):
            assert found.chunk(2)[view].equal(expected)


def test_streamed_images_have_the_same_views_as_copied_ones(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 0, 24, row_group_size=5)
    config = settings(tmp_path, validation_fraction=0)
    copied, streamed = views_of(config), views_of(dataclasses.replace(config, streaming=True))
    assert copied.keys() == streamed.keys() == {(epoch, sample) for epoch in range(3) for sample in range(24)}
    assert all(torch.equal(a, b) for k in copied for a, b in zip(copied[k], streamed[k], strict=True))


@pytest.mark.parametrize("kind", [views.TwoViews, views.FlippedCrops])
def test_views_are_the_same_whether_a_part_or_the_whole_is_decoded(kind, monkeypatch):
    """Bit for bit, for photographs of several sizes, one of them rotated and one progressive."""
    rows = []
    for i, (height, width) in enumerate(((96, 130), (257, 64), (40, 41), (90, 90), (300, 200), (33, 500))):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        picture = Image.fromarray(natural_image(height, width, seed=i))
        picture.save(file, "JPEG", quality=90, progressive=i == 2, **({"exif": exif} if i == 3 else {}))
        rows.append({"bytes": file.getvalue(), "path": None})
    config = build_config({"recipe": "8xV100-b1024-100ep", "dataset": "digits", "image_size": 32})
    dataset, request = kind(range(6), config), Request(3, np.arange(6), rows)
    areas, decode_part = [], views.decode_part

    def recording(content, top, left, bottom, right, max_pixels):
        areas.append((bottom - top) * (right - left))
        return decode_part(content, top, left, bottom, right, max_pixels)

    monkeypatch.setattr(views, "decode_part", recording)
    parts = dataset.__getitems__(request).crops
    assert len(areas) == 4, "all except the rotated and the progressive one"
    assert sum(areas) < 0.95 * (96 * 130 + 257 * 64 + 300 * 200 + 33 * 500)
    monkeypatch.setattr(views, "plain_jpeg_size", lambda content: None)
    assert torch.equal(parts, dataset.__getitems__(request).crops)
    assert len(areas) == 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_with_too_many_pixels_is_a_bad_one(kind, monkeypatch):
    rows = []
    for height in (40, 41, 40, 40):
        file = io.BytesIO()
        Image.fromarray(natural_image(height, 50)).save(file, kind)
        rows.append({"bytes": file.getvalue(), "path": None})
    config = settings("digits", max_image_pixels=40 * 50, rotation=0, crop_scale=(0.4, 1))
    batch = views.TwoViews(range(4), config).__getitems__(Request(0, np.arange(4), rows))
    reason = "50 × 41 pixels, more than --max_image_pixels 2000 allows"
    assert [(image.sample, image.reason) for image in batch.bad] == [(1, reason)]
    monkeypatch.setattr(views, "read_rows", lambda images, samples: rows)
    batch = views.CentralViews(range(4), config).__getitems__(Request(0, np.arange(4), None))
    assert [(image.sample, image.reason) for image in batch.bad] == [(1, reason)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_replaced_by_another_of_its_batch(tmp_path, num_workers):
    for i in range(12):
        write_image(tmp_path / f"{i:02}.png", value=10 * i)
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:60])
    (tmp_path / "07.png").write_text("not an image")
    config = settings(tmp_path, num_workers=num_workers)
    images = load_images(config).train
    requests = list(DeviceBatches(images, config, 1, 0))
    bad = {}
    loader = create_loader(views.TwoViews(images, config), requests, config)
    for batch, request in zip(read(loader), requests, strict=True):
        bad |= {image.sample: image for image in batch.bad}
        assert {image.sample for image in batch.bad} == {3, 7} & set(request.samples)
        shown = batch.samples.tolist()
        assert len(shown) == 4
        assert set(shown) == set(request.samples) - {3, 7}
        # The views have the colours of the samples that the batch names.
        crops = batch.crops.view(2, 4, -1)
        for view in range(2):
            for i, sample in enumerate(shown):
                assert (crops[view, i] == 10 * sample).float().mean() > 0.2
    assert bad.keys() == {3, 7}
    assert bad[3].path.endswith("03.png")
    assert "no known image format" in bad[7].reason


def test_a_replacement_that_is_damaged_elsewhere_shows_its_own_crops(monkeypatch):
    """Only parts are decoded, so a damaged image may serve its own crops but not those of the place it has to fill."""
    config = settings("digits")
    images = load_images(config).train
    request = Request(0, np.arange(4), None)
    expected = views.TwoViews(images, config).__getitems__(request).crops.view(2, 4, -1)
    tried, cut = [], views.TwoViews.cut

    def failing(self, image, uniforms, crops):
        tried.append(image)
        if len(tried) == 1 or len(tried) > 4:
            raise views.DecodeError("damaged")
        cut(self, image, uniforms, crops)

    monkeypatch.setattr(views.TwoViews, "cut", failing)
    batch = views.TwoViews(images, config).__getitems__(request)
    assert batch.samples.tolist() == [1, 1, 2, 3]
    assert torch.equal(batch.crops.view(2, 4, -1)[:, 0], expected[:, 1])


@pytest.mark.parametrize("kind", [views.TwoViews, views.FlippedCrops, views.CentralViews])
def test_a_batch_is_the_same_after_pickling_and_none_of_its_tensors_is_shared_by_torch(kind, monkeypatch):
    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, lambda tensor: pytest.fail("shared by torch"))
    config = settings("digits", batch_size=3)
    batch = kind(load_images(config).train, config).__getitems__(Request(0, np.array([4, 2, 9]), None))
    batch = batch._replace(bad=[views.BadImage(2, "two.png", "cut")])
    received = pickle.loads(ForkingPickler.dumps(Packed(batch)))
    assert type(received) is type(batch)
    assert received.bad == batch.bad
    assert type(received[1]) is type(batch[1])
    tensors = [
        [leaf for leaf in torch.utils._pytree.tree_leaves(b) if torch.is_tensor(leaf)] for b in (received, batch)
    ]
    for ours, theirs in zip(*tensors, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)

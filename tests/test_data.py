import dataclasses

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from m2t_accel import data
from m2t_accel.recipes import build_config
from m2t_accel.sources import load_images


def settings(dataset, **others):
    return build_config(
        {"recipe": "digits", "dataset": str(dataset), "batch_size": 4, "epochs": 3, "warmup_epochs": 1, **others}
    )


# --- decoding


def test_every_kind_of_image_becomes_rgb(tmp_path):
    color = np.zeros((8, 6, 3), np.uint8)
    color[..., 0] = 200
    picture = Image.fromarray(color)
    kinds = {
        "rgb.png": picture,
        "gray.png": picture.convert("L"),
        "palette.png": picture.convert("P"),
        "alpha.png": picture.convert("RGBA"),
        "cmyk.jpg": picture.convert("CMYK"),
        "animation.gif": picture,
        "png_named.JPEG": picture,
    }
    for name, image in kinds.items():
        path = tmp_path / name
        image.save(path, format="PNG" if name.startswith("png_") else None)
        pixels = data.decode_image({"bytes": None, "path": str(path)})
        assert (pixels.shape, pixels.dtype) == ((8, 6, 3), np.uint8), name
        expected = [60] * 3 if name.startswith("gray") else [200, 0, 0]
        assert np.abs(pixels[4, 3].astype(int) - expected).max() <= 6, name
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((8, 6), 40_000, np.uint16))
    assert data.decode_image({"bytes": None, "path": str(tmp_path / "deep.png")})[0, 0].tolist() == [156] * 3


def test_a_photograph_is_turned_upright(tmp_path):
    picture = Image.fromarray(np.zeros((8, 6, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert data.decode_image({"bytes": None, "path": str(tmp_path / "turned.jpg")}).shape == (6, 8, 3)


# --- order


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_a_global_batch_is_a_slice_of_the_permutation_whatever_the_processes(num_processes):
    config = settings("digits", batch_size=16, device_batch_size=4)
    order = data.epoch_order(100, config.seed, epoch=2)
    assert sorted(order) == list(range(100))
    shares = []
    for process in range(num_processes):
        batches = data.DeviceBatches(100, config, num_processes, process)
        batches.epoch = 2
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches) == 6 * 4 // num_processes
    micro_steps = 4 // num_processes
    for k in range(6):
        sub_batches = [shares[p][k * micro_steps + j] for j in range(micro_steps) for p in range(num_processes)]
        assert [sample for batch in sub_batches for _, sample in batch] == order[k * 16 : (k + 1) * 16].tolist()
        assert {epoch for batch in sub_batches for epoch, _ in batch} == {2}


def test_orders_differ_between_epochs_and_seeds():
    orders = [tuple(data.epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


# --- views


def batches_of(config, num_workers, process=0, num_processes=1):
    images = load_images(config).train
    batches = data.DeviceBatches(len(images), config, num_processes, process)
    batches.epoch = 1
    loader = data.create_loader(
        data.TwoViews(images, config), batches, dataclasses.replace(config, num_workers=num_workers)
    )
    found = {}
    for batch in loader:
        crops = batch.crops.view(2, -1, *batch.crops.shape[1:])
        for i, sample in enumerate(batch.samples.tolist()):
            parameters = [part.view(2, len(batch.samples), -1)[:, i] for part in batch.photometry]
            found[sample] = [crops[:, i], *parameters]
    return found


def test_views_are_the_same_for_any_number_of_workers_and_processes():
    config = settings("digits", batch_size=256, device_batch_size=128)
    reference = batches_of(config, num_workers=0)
    assert len(reference) == 1280
    others = [batches_of(config, num_workers=2)]
    others.append({k: v for p in range(2) for k, v in batches_of(config, 0, process=p, num_processes=2).items()})
    for other in others:
        assert other.keys() == reference.keys()
        assert all(torch.equal(a, b) for k in reference for a, b in zip(reference[k], other[k], strict=True))
    reseeded = batches_of(dataclasses.replace(config, seed=5), num_workers=0)
    shared = reference.keys() & reseeded.keys()
    assert not any(torch.equal(reference[k][0], reseeded[k][0]) for k in shared)


def test_the_loader_leaves_the_global_random_state_alone():
    config = settings("digits", batch_size=256)
    before = torch.get_rng_state()
    batches_of(config, num_workers=1)
    assert torch.equal(before, torch.get_rng_state())

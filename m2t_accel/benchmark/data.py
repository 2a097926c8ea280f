"""Benchmark of the data path: each stage, interleaved with the usual pipeline of PIL and torchvision."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import default_collate
from torchvision import transforms

from m2t_accel.config.data import check_enough_images
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.crops import draw_uniforms
from m2t_accel.data.decode import FORMATS, DecodeError, decode_bytes, read_bytes
from m2t_accel.data.loader import create_loader, dead_workers_in_one_line, default_num_workers, read
from m2t_accel.data.photometry import photometry
from m2t_accel.data.requests import DeviceBatches, Request
from m2t_accel.data.shards import Shards
from m2t_accel.data.sources import load_images
from m2t_accel.data.streams import HubStream
from m2t_accel.data.views import TwoViews, ViewBatch, decode_for_crops, read_rows

BATCH_SIZE = 16  # malloc does not reuse the memory of more float32 views, so every page would be new
TARGETS = (500, 1000, 2000, 4000, 8000)  # images/s; a ResNet-50 in bf16 on an A100 takes 1000 (two views)

WARM_UP = 1.0  # seconds until all workers have started and the batches made before are used up


def benchmark_data(config: PretrainConfig, num_images: int, repeats: int, seconds: float) -> dict[str, object]:
    """Measure the data path of a dataset: medians of interleaved repeats on one core, then several workers together.

    Returns:
        The figures and the settings they depend on. `ms` holds milliseconds per image for each stage and for the usual
        pipeline: PIL and torchvision's transforms, image by image, as in the published code. Streamed images are read
        in pieces, by the main process. `decode` decodes the part of an image that the crops need; `decode alone` in
        `images_per_second` decodes whole images.
    """
    config = dataclasses.replace(
        config, batch_size=BATCH_SIZE, device_batch_size=BATCH_SIZE, epochs=10**6, max_steps=None, evaluate_every=0
    )
    started = time.perf_counter()
    images = load_images(config).train
    check_enough_images(len(images), config)
    loaded = time.perf_counter()
    batches = DeviceBatches(images, config, 1, 0)
    views = TwoViews(images, config)
    views.__getitems__(next(iter(batches)))
    first_batch = time.perf_counter()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    requests = choose_requests(images, num_images)
    loader = create_loader(views, requests, dataclasses.replace(config, num_workers=0))  # works as a worker does
    view_batches = [views.__getitems__(request) for request in requests]
    bad = [image for batch in view_batches for image in batch.bad]
    if len(bad) == len(requests) * BATCH_SIZE:
        first = f"{bad[0].path} ({bad[0].reason})"
        raise ConfigurationError(f"--dataset {config.dataset}: none of the images can be decoded, the first is {first}")
    stages = {
        "read": lambda: [read_all(images, request) for request in requests],
        "whole": lambda: [decode_all(read_all(images, request), config.max_image_pixels) for request in requests],
        "decode": lambda: [decode_parts(images, request, config) for request in requests],
        "crop": lambda: deque(loader, maxlen=0),
        "usual": lambda: [usual_pipeline(read_all(images, request), config) for request in requests],
        "photometry": lambda: [run_photometry(batch, config, device) for batch in view_batches],
    }
    pieces = choose_pieces(images, len(requests) * BATCH_SIZE) if isinstance(images, Shards) else []
    if pieces:  # the requests already hold their images, so reading is a stage of its own
        stages["pieces"] = lambda: read_pieces(images, pieces)
    times = interleaved(stages, repeats)
    per_image = {name: 1000 * value / (len(requests) * BATCH_SIZE) for name, value in times.items()}
    torch.set_num_threads(threads)
    rates = {workers: loader_rate(views, batches, config, workers, seconds) for workers in worker_counts(config)}
    return {
        "dataset": config.dataset,
        "images": len(images),
        "image_size": config.image_size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, one core",
        "software": f"torch {torch.__version__}, OpenCV {cv2.__version__}",
        "seconds_to_load": loaded - started,
        "seconds_to_first_batch": first_batch - started,
        "ms": {
            "read": per_image["pieces" if pieces else "read"],
            "decode": per_image["decode"] - per_image["read"],
            "crop": per_image["crop"] - per_image["decode"],
            "photometry": per_image["photometry"],
            "usual": per_image["usual"],
        },
        "images_per_second": {
            "decode alone": 1000 / per_image["whole"],
            "decode and both crops": 1000 / per_image["crop"],
            "with photometry": 1000 / (per_image["crop"] + per_image["photometry"]),
            "usual": 1000 / per_image["usual"],
        },
        "ratios": {
            "decode and crops / usual": per_image["usual"] / per_image["crop"],
            "decode and crops / decode alone": per_image["whole"] / per_image["crop"],
            "with photometry / usual": per_image["usual"] / (per_image["crop"] + per_image["photometry"]),
        },
        "images_per_second_by_workers": rates,
    }


def choose_pieces(images: Shards, num_images: int) -> list[tuple[int, int]]:
    """Choose random pieces with `num_images` images in all, or every piece: (piece, number of its images) of each."""
    chosen = []
    for piece in np.random.default_rng(0).permutation(len(images.piece_sizes)).tolist():
        number = min(int(images.piece_sizes[piece]), num_images)
        if number:
            chosen.append((piece, number))
            num_images -= number
    return chosen


def read_pieces(images: Shards, pieces: list[tuple[int, int]]) -> tuple[np.ndarray, list]:
    """Return the samples of some pieces and their undecoded images."""
    parts = [images.open(piece)(0, number) for piece, number in pieces]
    return np.concatenate([samples for samples, _ in parts]), [row for _, rows in parts for row in rows]


def choose_requests(images: object, num_images: int) -> list[Request]:
    """Return requests for images spread evenly over the dataset; streamed images are already read."""
    if isinstance(images, HubStream):
        samples, rows = images.first_rows(num_images)
        rows = [row["image"] for row in rows]
    elif isinstance(images, Shards):
        samples, rows = read_pieces(images, choose_pieces(images, num_images))
    else:
        samples, rows = np.linspace(0, len(images) - 1, min(num_images, len(images))).astype(np.int64), None
    starts = range(0, len(samples) - BATCH_SIZE + 1, BATCH_SIZE)
    return [Request(0, samples[i : i + BATCH_SIZE], None if rows is None else rows[i : i + BATCH_SIZE]) for i in starts]


def interleaved(stages: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Run all stages in turn, and return the median seconds of each. The first turn is a warm-up and not counted."""
    seconds = {name: [] for name in stages}
    for repeat in range(repeats + 1):
        for name, stage in stages.items():
            started = time.perf_counter()
            stage()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def undecoded(images: object, request: Request) -> list[dict[str, object]]:
    """Return the undecoded images of a request."""
    return read_rows(images, request.samples) if request.images is None else request.images


def read_all(images: object, request: Request) -> list[bytes]:
    """Return the image files of a request."""
    return [read_bytes(row) for row in undecoded(images, request)]


def decode_all(contents: Sequence[bytes], max_pixels: int) -> None:
    """Decode whole images, and skip broken ones."""
    for content in contents:
        with contextlib.suppress(DecodeError):
            decode_bytes(content, max_pixels)


def decode_parts(images: object, request: Request, config: PretrainConfig) -> None:
    """Decode the part of each image that its crops need, as workers do."""
    uniforms = np.stack([draw_uniforms(config.seed, request.epoch, request.samples, view) for view in range(2)])
    for i, row in enumerate(undecoded(images, request)):
        with contextlib.suppress(DecodeError):
            decode_for_crops(row, uniforms[:, i], config)


def run_photometry(batch: ViewBatch, config: PretrainConfig, device: torch.device) -> None:
    """Compute the photometry of a batch on the device, including the copy to it."""
    parameters = type(batch.photometry)(*(values.to(device) for values in batch.photometry))
    photometry(batch.crops.to(device), parameters, config)
    if device.type == "cuda":
        torch.cuda.synchronize()


def usual_pipeline(contents: Sequence[bytes], config: PretrainConfig) -> None:
    """Run the usual pipeline: PIL, torchvision's transforms for each view of each image, and a collated batch."""
    view_transforms = [usual_transform(config, view) for view in range(2)]
    pairs = []
    for content in contents:
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS).convert("RGB")
        except OSError:
            continue
        pairs.append([transform(image) for transform in view_transforms])
    if pairs:
        default_collate(pairs)


def usual_transform(config: PretrainConfig, view: int) -> Callable:
    """Return the transform of a view as in BYOL and its successors."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*config.blur_sigma)))

    jitter = transforms.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(config.image_size, config.crop_scale, config.crop_ratio),
            transforms.RandomApply([jitter], p=config.jitter_probability),
            transforms.RandomGrayscale(config.grayscale_probability),
            transforms.RandomApply([transforms.Lambda(blur)], p=config.blur_probability[view]),
            transforms.RandomHorizontalFlip(config.flip_probability),
            transforms.RandomApply([transforms.Lambda(ImageOps.solarize)], p=config.solarize_probability[view]),
            transforms.ToTensor(),
            transforms.Normalize(config.image_mean, config.image_std),
        ]
    )


def worker_counts(config: PretrainConfig) -> list[int]:
    """Return the numbers of workers to measure: powers of two up to the configured number, and that number."""
    most = default_num_workers() + 1 if config.num_workers is None else config.num_workers
    return sorted({1, *(2**i for i in range(1, 8) if 2**i < most), most} - {0})


def loader_rate(
    views: TwoViews, batches: DeviceBatches, config: PretrainConfig, num_workers: int, seconds: float
) -> float:
    """Return the images/s that workers deliver to an otherwise idle main process, after a warm-up."""
    loader = create_loader(views, batches, dataclasses.replace(config, num_workers=num_workers))
    count, started = 0, None
    first = time.perf_counter()
    with dead_workers_in_one_line():
        for batch in read(loader):
            now = time.perf_counter()
            if started is not None:
                count += len(batch.samples)
                if now - started > seconds:
                    break
            elif now - first > WARM_UP:
                started = now
    return count / (now - started)


def table(result: dict[str, object]) -> str:
    """Format the result as text."""
    ms, rates, ratios = result["ms"], result["images_per_second"], result["ratios"]
    lines = [
        f"{result['dataset']}: {result['images']:,} images, views of {result['image_size']} pixels",
        result["software"],
        f"loaded in {result['seconds_to_load']:.2f} s, first batch after {result['seconds_to_first_batch']:.2f} s",
        "",
        "one core, ms per image (two views)",
        *(f"  {name:<12}{ms[name]:8.3f}" for name in ("read", "decode", "crop")),
        f"  {'photometry':<12}{ms['photometry']:8.3f}   on {result['device']}",
        f"  {'usual':<12}{ms['usual']:8.3f}   PIL and torchvision transforms, all of it",
        "",
        "images/s of one core",
        *(f"  {name:<24}{rate:8.0f}" for name, rate in rates.items()),
        *(f"  {name:<34}{ratio:6.2f}" for name, ratio in ratios.items()),
        "",
        "workers   images/s   of each",
    ]
    by_workers = result["images_per_second_by_workers"]
    lines += [f"  {n:>5} {rate:>10.0f} {rate / n:>9.0f}" for n, rate in by_workers.items()]
    each = max(rate / n for n, rate in by_workers.items())
    needs = ", ".join(f"{-(-target // each):.0f} for {target:,} images/s" for target in TARGETS)
    return "\n".join([*lines, "", f"workers needed, each on its own core: {needs}"])

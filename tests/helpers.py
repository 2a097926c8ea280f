"""Images, shards and settings for the tests."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow
import torch
from datasets import ClassLabel, Dataset, Features, Image
from pyarrow import parquet

from m2t_accel.config.recipes import build_config
from m2t_accel.data.decode import decode_image
from m2t_accel.data.sources import load_images
from m2t_accel.data.views import read_rows

ROOT = Path(__file__).parents[1]


def run_in_root(*command, environment=None, timeout=240):
    """Run a command of Python in the repository's root. Return its completed process, with text output."""
    # Of the environment, nothing that a launcher around pytest may have set.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_", "LOCAL_", "WORLD_"))}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**clean, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def tiny(output_dir, **settings):
    """Return settings of a run of about half a second: digits, a quarter-width ResNet-10, ten steps of 64 images."""
    return {
        "recipe": "digits",
        "output_dir": str(output_dir),
        **({} if "dataset" in settings else {"max_images": 320}),
        "epochs": 2,
        "warmup_epochs": 1,
        "batch_size": 64,
        "device_batch_size": 32,
        "hidden_size": 32,
        "projection_size": 16,
        "num_workers": 0,
        "log_every": 1,
        **settings,
    }


def stop_in_step(patch, number, received=signal.SIGTERM):
    """Send a signal to this process in step `number` of the next run, counted from 1."""
    from m2t_accel.step import TrainingStep

    begin = TrainingStep.begin
    steps = []

    def begin_and_signal(self, now, *arguments, **options):
        steps.append(now)
        if len(steps) == number:
            os.kill(os.getpid(), received)
        begin(self, now, *arguments, **options)

    patch.setattr(TrainingStep, "begin", begin_and_signal)


def without_reader():
    """Return a text stream to a pipe whose reader has ended, as `| tee` does at Ctrl-C."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


def settings(dataset, **others):
    """Return a configuration of pretraining: three epochs in batches of four."""
    return build_config(
        {"recipe": "digits", "dataset": str(dataset), "batch_size": 4, "epochs": 3, "warmup_epochs": 1, **others}
    )


def load(dataset, **others):
    """Return the images that pretraining with these settings loads."""
    return load_images(settings(dataset, **others))


def documented(header):
    """Return the first cells of the table in docs/data.md whose first column has this header."""
    _, _, table = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition(f"| {header} |")
    return [line.split("|")[1].strip() for line in table.partition("\n\n")[0].splitlines()[2:]]


def natural_image(height, width, seed=0):
    """Return smooth colours, edges and noise in place of a photograph: (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(0, 256, (7, 9, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    cv2.circle(image, (width // 3, height // 2), min(height, width) // 4, (250, 30, 60), -1)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def write_image(path, value=0, size=(12, 10)):
    """Write an image of one value with a square of the opposite value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), value, np.uint8)
    pixels[2:5, 2:5] = 255 - value
    cv2.imwrite(str(path), pixels)


def write_deep_images(folder, largest, number=4):
    """Write gray PNGs of 16 bits with values from 0 to `largest`."""
    folder.mkdir(parents=True)
    for i in range(number):
        cv2.imwrite(str(folder / f"{i}.png"), np.linspace(0, largest, 2500).reshape(50, 50).astype(np.uint16))


def encoded(first, number):
    """Return PNG images as undecoded rows; every pixel of an image is its number, modulo 256."""
    images = [
        cv2.imencode(".png", np.full((12, 10, 3), value % 256, np.uint8))[1] for value in range(first, first + number)
    ]
    return [{"bytes": image.tobytes(), "path": None} for image in images]


def write_parquet(path, first, number, row_group_size, labels=True, names=("even", "odd")):
    """Write a shard like `datasets` does, with images numbered from `first`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image()} | ({"label": ClassLabel(names=list(names))} if labels else {}))
    columns = {"image": encoded(first, number)} | ({"label": [i % 2 for i in range(number)]} if labels else {})
    table = Dataset.from_dict(columns, features=features).with_format("arrow")[:]
    parquet.write_table(table, path, row_group_size=row_group_size)


def write_table(path, row_group_size=None, **columns):
    """Write a parquet file without the metadata of `datasets`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)


def write_tar(path, first, number, labels=True):
    """Write a WebDataset shard of images numbered from `first`."""
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(encoded(first, number)):
            add_member(tar, f"{first + i:06}.png", image["bytes"])
            if labels:
                add_member(tar, f"{first + i:06}.cls", str(i % 2).encode())


def add_member(tar, name, content):
    """Add a file to an open tar: its bytes, or a number that stands for the image of that value."""
    if isinstance(content, int):
        content = encoded(content, 1)[0]["bytes"]
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def pixel(images, sample):
    """Return the first value of one of the images."""
    return decode_image(read_rows(images, [sample])[0])[0, 0, 0]


class FillingDataset:
    """A dataset whose workers fill a buffer for each batch; in this module, because a spawned worker can import it."""

    def __init__(self, buffers):
        self.buffers = buffers

    def __len__(self):
        return 100

    def __getitems__(self, request):
        value, number = request
        if number is None:
            return torch.full((8, 8), value, dtype=torch.uint8)
        self.buffers[number].fill_(value)
        return self.buffers.hand_over(number)


def identity(batch):
    return batch


def write_run(folder, num_steps=40, finished=True, seed=0, log_every=1, layers=3, **others):
    """Write the files of a run of 4 epochs without training it: config.yaml, metrics.jsonl and training.json."""
    folder.mkdir(parents=True)
    config = build_config({"recipe": "digits", "epochs": 4, "warmup_epochs": 1, "seed": seed, **others})
    header = "# m2t_accel 0.1.0, torch 2.14.1, on 1 × cpu (1 thread), float32\n# python scripts/pretrain.py <b>\n"
    (folder / "config.yaml").write_text(header + config.to_yaml())
    rng = np.random.default_rng(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(0, num_steps + 1, log_every):
            row = {"step": step, "epoch": 4 * step / num_steps, "seconds": 0.1 * step}
            if step:
                loss = 4 * np.exp(-3 * step / num_steps) + 0.01 * rng.normal()
                row |= {"loss": loss, "embedding_std": 0.9, "images_per_second": 500 + 10 * rng.normal()}
                row |= {"learning_rate": 0.1, "statistics_momentum": 0.5, "weight_momentum": 0.95}
                row |= {"data_wait": 0.1 * rng.random(), "agreement": 1 - loss / 4}
                if step * 100 // num_steps > (step - log_every) * 100 // num_steps:
                    distances = {f"encoder.layer.{i}.normalization": 0.1 * (i + rng.random()) for i in range(layers)}
                    row |= {"effective_rank": 50.0, "gradient_norm": 1.0, "update_norm": 0.01, "update_ratio": 1e-4}
                    row |= {"teacher_distance": 0.1, "statistics_distance": 0.3, "layers": distances}
            if step in (0, num_steps):
                row["knn_top1"] = round(0.9 + 0.05 * (step > 0) + 0.01 * seed, 4)
            file.write(json.dumps(row) + "\n")
    if finished:
        training = {"seconds": 0.1 * num_steps, "hardware": "1 × cpu", "command": "python scripts/pretrain.py <b>"}
        (folder / "training.json").write_text(json.dumps({**training, "versions": {"torch": "2.14.1"}}))
    return folder

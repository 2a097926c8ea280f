"""What several tests share: the repository's root, a tiny configuration, and launches as a user types them."""

import atexit
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest

os.environ["ACCELERATE_USE_CPU"] = "true"  # the runs of the tests are compared bit for bit, so also where GPUs are
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network; a look-up that fails should fail at once
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# What a scan or `datasets` keeps must not outlive the tests, and what users have must not reach them.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="m2t-accel-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# After the variables above: datasets reads them when it is imported.
import torch  # noqa: E402
from datasets import ClassLabel, Dataset, Features, Image  # noqa: E402
from pyarrow import parquet  # noqa: E402

from m2t_accel.data import read_rows  # noqa: E402
from m2t_accel.data_settings import ImageSettings  # noqa: E402
from m2t_accel.decode import decode_image  # noqa: E402
from m2t_accel.hub import image_processor  # noqa: E402
from m2t_accel.model import create_encoder, plain_encoder  # noqa: E402
from m2t_accel.recipes import build_config  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def root():
    return ROOT


def tiny(output_dir, **settings):
    """Settings of a run that takes a second or two: digits, a quarter-width ResNet-10, few steps."""
    return {
        "recipe": "digits",
        "output_dir": str(output_dir),
        "epochs": 2,
        "warmup_epochs": 1,
        "batch_size": 256,
        "device_batch_size": 128,
        "hidden_size": 32,
        "projection_size": 16,
        "num_workers": 0,
        "log_every": 1,
        **settings,
    }


def settings(dataset, **others):
    """A configuration of pretraining: three epochs in batches of four."""
    return build_config(
        {"recipe": "digits", "dataset": str(dataset), "batch_size": 4, "epochs": 3, "warmup_epochs": 1, **others}
    )


def natural_image(height, width, seed=0):
    """Smooth colours, edges and noise: a stand-in for a photograph, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(0, 256, (7, 9, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    cv2.circle(image, (width // 3, height // 2), min(height, width) // 4, (250, 30, 60), -1)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def write_image(path, value=0, size=(12, 10)):
    """An image of one value, and a square of its opposite."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), value, np.uint8)
    pixels[2:5, 2:5] = 255 - value
    cv2.imwrite(str(path), pixels)


def encoded(first, number):
    """Images as undecoded rows, the first pixel's value their number."""
    images = [
        cv2.imencode(".png", np.full((12, 10, 3), value % 256, np.uint8))[1] for value in range(first, first + number)
    ]
    return [{"bytes": image.tobytes(), "path": None} for image in images]


def write_parquet(path, first, number, row_group_size, labels=True, names=("even", "odd")):
    """A shard as `datasets` writes it, of images numbered from `first`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image()} | ({"label": ClassLabel(names=list(names))} if labels else {}))
    columns = {"image": encoded(first, number)} | ({"label": [i % 2 for i in range(number)]} if labels else {})
    table = Dataset.from_dict(columns, features=features).with_format("arrow")[:]
    parquet.write_table(table, path, row_group_size=row_group_size)


def write_tar(path, first, number, labels=True):
    """A WebDataset shard of images numbered from `first`."""
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(encoded(first, number)):
            files = {"png": image["bytes"]} | ({"cls": str(i % 2).encode()} if labels else {})
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{first + i:06}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def pixel(images, sample):
    """The first value of one of the images."""
    return decode_image(read_rows(images, [sample])[0])[0, 0, 0]


@pytest.fixture
def image_net(tmp_path):
    """ImageNet's layout in small: 2 classes of 6 and 3 images."""
    for split, number in (("train", 6), ("val", 3)):
        for index, name in enumerate(("n01", "n02")):
            for i in range(number):
                write_image(tmp_path / split / name / f"{name}_{i}.JPEG", value=100 * index + i)
    (tmp_path / "train" / "n01" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    write_image(tmp_path / "train" / ".cache" / "hidden.jpg")
    return tmp_path


@pytest.fixture
def small_run(tmp_path):
    """A run's folder as far as its encoder goes, of random weights."""
    torch.manual_seed(0)
    encoder = plain_encoder(create_encoder("resnet10-quarter"))
    encoder.save_pretrained(tmp_path / "run" / "encoder")
    settings = ImageSettings(
        dataset="digits", image_size=16, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.25, 0.3), evaluation_crop=0.8
    )
    image_processor(settings).save_pretrained(tmp_path / "run" / "encoder")
    return tmp_path / "run"


@pytest.fixture
def small_images(tmp_path):
    """Class folders of 42 images to train on and 21 to evaluate with, of three colours and much noise."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 14), ("val", 7)):
        for channel, name in enumerate(("blue", "green", "red")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.normal(100, 40, (20, 24, 3))
                pixels[:, :, channel] += 60
                pixels = np.clip(pixels, 0, 255).astype(np.uint8)
                cv2.imwrite(str(tmp_path / "images" / split / name / f"{i}.png"), pixels)
    return tmp_path / "images"


@pytest.fixture
def run_script():
    """Run a command in the repository's root; its completed process, with text output."""

    def run(*command, environment=None, timeout=240):
        # Of the environment, nothing that a launcher around pytest may have set.
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_", "LOCAL_", "WORLD_"))
        }
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**clean, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of so many kilobytes, and give its folder."""
    mounted = []

    def mount(kilobytes):
        where = tmp_path / f"disk-{len(mounted)}"
        where.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(where)]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("no small disk can be mounted here")
        mounted.append(where)
        return where

    yield mount
    for where in mounted:
        subprocess.run(["umount", "--lazy", str(where)], check=True)

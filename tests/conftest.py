"""Fixtures, and the environment that every test runs in."""

import atexit
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

import cv2
import numpy as np
import pytest

os.environ["ACCELERATE_USE_CPU"] = "true"  # the runs of the tests are compared bit for bit, so also where GPUs are
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network; a look-up that fails should fail at once
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# The caches of the tests must not outlive them, nor must the user's caches reach the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="m2t-accel-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# After the variables above: datasets reads them when it is imported.
import torch  # noqa: E402
from helpers import ROOT, tiny, write_image  # noqa: E402

from m2t_accel import pretrain  # noqa: E402
from m2t_accel.config.data import ImageSettings  # noqa: E402
from m2t_accel.config.recipes import build_config  # noqa: E402
from m2t_accel.hub.folder import image_processor  # noqa: E402
from m2t_accel.model import create_encoder, plain_encoder  # noqa: E402


@pytest.fixture(scope="session")
def root():
    return ROOT


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


class Answer(NamedTuple):
    """Exit status and output of a script."""

    status: int
    out: str
    err: str


@pytest.fixture
def ask(capsys, monkeypatch):
    """Run a script of the repository in this process, as if typed in its root: `ask("scripts/knn.py", "--help")`.

    Takes milliseconds where a process of its own takes seconds to import torch.
    """

    def run(script, *arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit:
            status = exit.code or 0
        captured = capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The folder of a tiny complete run on digits; tests must not change it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    pretrain(build_config(tiny(folder)))
    return folder


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

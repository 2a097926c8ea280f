"""A small encoder and small images to evaluate it on; tests must not change them."""

import json

import cv2
import numpy as np
import pytest
import torch
from helpers import run_in_root

from m2t_accel.config.data import ImageSettings
from m2t_accel.hub.folder import image_processor
from m2t_accel.model import create_encoder, plain_encoder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The folder of a run that has only its encoder, with random weights."""
    folder = tmp_path_factory.mktemp("encoder") / "run"
    torch.manual_seed(0)
    plain_encoder(create_encoder("resnet10-quarter")).save_pretrained(folder / "encoder")
    settings = ImageSettings(
        dataset="digits", image_size=16, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.25, 0.3), evaluation_crop=0.8
    )
    image_processor(settings).save_pretrained(folder / "encoder")
    return folder


@pytest.fixture(scope="session")
def small_images(tmp_path_factory):
    """Class folders of 42 training and 21 validation images, in three noisy colours."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, number in (("train", 14), ("val", 7)):
        for channel, name in enumerate(("blue", "green", "red")):
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.normal(100, 40, (20, 24, 3))
                pixels[:, :, channel] += 60
                cv2.imwrite(str(folder / split / name / f"{i}.png"), np.clip(pixels, 0, 255).astype(np.uint8))
    return folder


@pytest.fixture
def given(small_run, small_images, tmp_path):
    """Settings of an evaluation whose result goes to tmp_path / "result"."""
    return {
        "encoder": str(small_run),
        "dataset": str(small_images),
        "output_dir": str(tmp_path / "result"),
        "num_workers": 0,
    }


TWO_PROCESSES = {
    "knn": {},
    "linear_probe": {"epochs": 2, "batch_size": 16, "device_batch_size": 4, "learning_rates": (0.1, 1)},
    "finetune": {"epochs": 2, "batch_size": 16, "device_batch_size": 8, "labels": 1.0},
    "embed": {},
}


@pytest.fixture(scope="session")
def folder_of_two_processes(small_run, small_images, tmp_path_factory):
    """The folder with the results of TWO_PROCESSES; one launch runs all scripts, because a launch takes seconds."""
    folder, lines = tmp_path_factory.mktemp("two"), []
    for script, others in TWO_PROCESSES.items():
        settings = {"encoder": small_run, "dataset": small_images, "num_workers": 0, **others}
        lines.append([f"scripts/{script}.py", "--output_dir", str(folder / script)])
        for name, value in settings.items():
            lines[-1] += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    launch = ("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu2.yaml")
    done = run_in_root(*launch, "tests/several_scripts.py", json.dumps(lines), environment={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert all((folder / script / "result.json").exists() for script in TWO_PROCESSES), done.stdout
    return folder


@pytest.fixture
def two_processes(folder_of_two_processes):
    """A function that returns the settings and the folder of a script's run on two processes with one thread each.

    This process has one thread too during the test, because rounding depends on their number.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda script: (TWO_PROCESSES[script], folder_of_two_processes / script)
    torch.set_num_threads(num_threads)

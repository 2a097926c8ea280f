"""A small encoder and small images to evaluate it on; tests must not change them."""

import json

import cv2
import numpy as np
import pytest
import torch

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


@pytest.fixture
def evaluate_on_two_processes(run_script):
    """Run a script of an evaluation on two processes and return its result; one thread each, in this process too."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(script, settings, folder):
        words = [word for name, value in settings.items() for word in (f"--{name}", value) if name != "output_dir"]
        words = [",".join(map(str, word)) if isinstance(word, list) else word for word in words]
        done = run_script(
            *("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu2.yaml"),
            *(f"scripts/{script}.py", *words, "--output_dir", folder),
            environment={"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "result.json").read_text())

    yield run
    torch.set_num_threads(num_threads)

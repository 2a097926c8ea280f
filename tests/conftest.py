"""What several tests share: the repository's root, a tiny configuration, and launches as a user types them."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

os.environ["ACCELERATE_USE_CPU"] = "true"  # the runs of the tests are compared bit for bit, so also where GPUs are
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network; a look-up that fails should fail at once
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

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


def natural_image(height, width, seed=0):
    """Smooth colours, edges and noise: a stand-in for a photograph, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(0, 256, (7, 9, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    cv2.circle(image, (width // 3, height // 2), min(height, width) // 4, (250, 30, 60), -1)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


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

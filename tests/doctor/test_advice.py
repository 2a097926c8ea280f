import shlex

import pytest

from m2t_accel.config.command_line import parse_command_line
from m2t_accel.config.recipes import build_config
from m2t_accel.doctor.advice import advise, choose_momentum

IMAGENET = 1_281_167
LAUNCHER = ["python", "scripts/pretrain.py"]


def advice(num_images=IMAGENET, hours=48.0, speed=2000.0, processes=1, recipe="8x2080Ti-b256-100ep", **settings):
    config = build_config({"recipe": recipe, "dataset": "digits", **settings})
    return advise(config, num_images, hours, speed, processes, LAUNCHER)


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        # images, hours, images/s and devices; recipe, batch, sub-batch, rate per 256, weight momentum, epochs
        ((IMAGENET, 48, 1000, 1), ("8xV100-b1024-100ep", 1024, 32, 0.05, 0.99, 134)),
        ((IMAGENET, 48, 9000, 8), ("8xV100-b1024-300ep", 1024, 32, 0.05, 0.99, 300)),
        ((IMAGENET, 20, 40_000, 32), ("32xV100-b4096-300ep", 4096, 32, 0.3, 0.99, 300)),
        ((IMAGENET, 10, 14_000, 128), ("128x2080Ti-b4096-300ep", 4096, 32, 0.3, 0.99, 300)),
        ((50_000, 5, 1000, 1), ("8x2080Ti-b256-300ep", 256, 32, 0.05, 0.99, 300)),
        ((2000, 1, 1000, 1), ("8x2080Ti-b256-300ep", 256, 32, 0.05, 0.979, 300)),
        ((100, 1, 1000, 1), ("8x2080Ti-b256-300ep", 64, 32, 0.05, 0.9, 300)),
    ],
)
def test_the_advice_follows_from_images_hours_and_devices(situation, expected):
    config = advice(*situation).config
    assert (
        config.recipe,
        config.batch_size,
        config.device_batch_size,
        config.learning_rate_per_256,
        config.weight_momentum,
        config.epochs,
    ) == expected


def test_every_setting_has_a_reason_and_the_command_makes_exactly_these_settings():
    given = advice(hours=20, crop_scale=(0.2, 1.0), flip_probability=0.0, num_workers=3)
    assert [name.split()[0] for name, _ in given.reasons] == [
        *("recipe", "batch_size", "device_batch_size", "learning_rate_per_256", "weight_momentum", "epochs"),
        "warmup_epochs",
    ]
    assert all(reason for _, reason in given.reasons)
    words = shlex.split(given.command)
    assert words[:2] == LAUNCHER
    config, _ = parse_command_line("", words[2:])
    assert config == given.config
    assert (config.crop_scale, config.num_workers) == ((0.2, 1.0), 3)


def test_less_than_anybody_has_published_is_warned_of():
    (warning,) = advice(hours=1, speed=400).warnings
    assert "only 1 epoch fits" in warning
    warnings = advice(num_images=100, hours=1).warnings
    assert any("steps are few" in warning for warning in warnings)
    assert any("a batch of 64 is outside of the published 256 to 4096" in warning for warning in warnings)
    assert advice(hours=48, speed=1000).warnings == []


def test_a_recipe_for_these_images_only_changes_its_length():
    """digits: 1 437 images."""
    given = advice(1437, 0.05, 600, recipe="digits")
    assert given.config == build_config({"recipe": "digits", "epochs": 75, "warmup_epochs": 24.38})
    assert (
        given.command == "python scripts/pretrain.py --recipe digits --dataset digits --epochs 75 --warmup_epochs 24.38"
    )


def test_the_weight_momentum_follows_the_batch_by_the_rule_of_thumb():
    """arXiv 2307.13813: momentum to the power of the ratio of the batches; only outside of the published ones."""
    assert choose_momentum(10**6, 1024, 100)[0] == 0.99
    assert choose_momentum(10**7, 8192, 100)[0] == pytest.approx(0.99**2)
    assert choose_momentum(10**6, 64, 100)[0] == pytest.approx(0.99**0.25, abs=1e-4)

import pytest

from m2t_accel.config.recipes import RECIPES, build_config

# Source: arXiv 2101.07525. Columns: name, batch_size, device_batch_size, optimizer, learning_rate_per_256,
# weight_decay, epochs, top-1 in per cent, hours.
PUBLISHED = [
    ("8xV100-b1024-100ep", 1024, 128, "sgd", 0.05, 1e-4, 100, 70.7, 1.8 * 24),
    ("8xV100-b1024-200ep", 1024, 128, "sgd", 0.05, 1e-4, 200, 72.7, 3.6 * 24),
    ("8xV100-b1024-300ep", 1024, 128, "sgd", 0.05, 1e-4, 300, 73.8, 5.5 * 24),
    ("8x2080Ti-b256-100ep", 256, 32, "sgd", 0.05, 1e-4, 100, 70.4, 2.5 * 24),
    ("8x2080Ti-b256-200ep", 256, 32, "sgd", 0.05, 1e-4, 200, 72.3, 5 * 24),
    ("8x2080Ti-b256-300ep", 256, 32, "sgd", 0.05, 1e-4, 300, 72.9, 7.5 * 24),
    ("32xV100-b4096-100ep", 4096, 128, "lars", 0.45, 1e-6, 100, 70.3, 11),
    ("32xV100-b4096-200ep", 4096, 128, "lars", 0.45, 1e-6, 200, 72.5, 22),
    ("32xV100-b4096-300ep", 4096, 128, "lars", 0.3, 1e-6, 300, 73.7, 33),
    ("128x2080Ti-b4096-100ep", 4096, 32, "lars", 0.45, 1e-6, 100, 69.0, 5),
    ("128x2080Ti-b4096-200ep", 4096, 32, "lars", 0.45, 1e-6, 200, 71.5, 10),
    ("128x2080Ti-b4096-300ep", 4096, 32, "lars", 0.3, 1e-6, 300, 72.3, 15),
]


def test_the_recipes_are_the_published_ones_and_three_small_ones():
    assert list(RECIPES) == [row[0] for row in PUBLISHED] + ["digits", "cifar10-small", "cifar10"]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_a_published_recipe_has_the_published_settings_and_figures(row):
    name, batch, per_device, optimizer, rate, decay, epochs, top1, hours = row
    config = build_config({"recipe": name, "dataset": "digits"})
    assert (config.batch_size, config.device_batch_size, config.optimizer) == (batch, per_device, optimizer)
    assert (config.learning_rate_per_256, config.weight_decay, config.epochs) == (rate, decay, epochs)
    assert config.learning_rate == pytest.approx(rate * batch / 256)
    assert config.num_virtual_devices == int(name.split("x")[0])
    assert RECIPES[name].hardware.replace(" ", "x", 1).replace(" ", "") == name.split("-")[0]
    assert (RECIPES[name].top1, RECIPES[name].hours) == (top1, pytest.approx(hours))
    assert (config.encoder, config.image_size) == ("resnet50", 224)
    assert (config.image_mean, config.image_std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert config.evaluation_crop == 0.875
    assert (config.weight_momentum, config.warmup_epochs) == (0.99, 10)
    assert (config.hidden_size, config.projection_size, config.optimizer_momentum) == (4096, 256, 0.9)

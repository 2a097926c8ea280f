import itertools
import math

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from m2t_accel import augment
from m2t_accel.augment import Photometry
from m2t_accel.recipes import build_config


def imagenet(**settings):
    return build_config({"recipe": "8x2080Ti-b256-100ep", "dataset": "digits", **settings})


def natural_image(height, width, seed=0):
    """Smooth colours, edges and noise: a stand-in for a photograph, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(0, 256, (7, 9, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    cv2.circle(image, (width // 3, height // 2), min(height, width) // 4, (250, 30, 60), -1)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def images(number=6, size=32):
    return torch.stack([torch.from_numpy(natural_image(size, size, seed)) for seed in range(number)])


def identity(number):
    return Photometry(
        flip=torch.zeros(number, dtype=torch.bool),
        factors=torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(number, 1),
        order=torch.arange(4).repeat(number, 1),
        grayscale=torch.zeros(number, dtype=torch.bool),
        sigma=torch.zeros(number),
        solarize=torch.zeros(number, dtype=torch.bool),
    )


def as_float(crops):
    return crops.permute(0, 3, 1, 2).float() / 255


# --- photometry: each operation against torchvision's, on the same parameters

OPERATIONS = [
    ("brightness", 0, 1.3, reference.adjust_brightness),
    ("brightness", 0, 0.6, reference.adjust_brightness),
    ("contrast", 1, 1.4, reference.adjust_contrast),
    ("contrast", 1, 0.6, reference.adjust_contrast),
    ("saturation", 2, 1.2, reference.adjust_saturation),
    ("saturation", 2, 0.0, reference.adjust_saturation),
    ("hue", 3, 0.1, reference.adjust_hue),
    ("hue", 3, -0.4, reference.adjust_hue),
]


@pytest.mark.parametrize(("name", "index", "factor", "function"), OPERATIONS)
def test_each_jitter_operation_equals_torchvisions(name, index, factor, function):
    inputs = as_float(images())
    factors = identity(6).factors
    factors[:, index] = factor
    ours = augment.color_jitter(inputs, factors, identity(6).order, with_hue=True)
    torch.testing.assert_close(ours, function(inputs, factor), rtol=0, atol=2e-3)


def test_jitter_in_every_order_equals_torchvision_one_image_at_a_time():
    torch.manual_seed(0)
    functions = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    order = torch.tensor([list(p) for p in itertools.permutations(range(4))])
    inputs = as_float(images(len(order), 16))
    factors = torch.rand(len(order), 4) * torch.tensor([0.8, 0.8, 0.4, 0.2]) + torch.tensor([0.6, 0.6, 0.8, -0.1])
    ours = augment.color_jitter(inputs, factors, order, with_hue=True)
    for i, places in enumerate(order.tolist()):
        expected = inputs[i]
        for operation in places:
            expected = functions[operation](expected, factors[i, operation].item())
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=4e-3)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvisions_and_sigma_0_changes_nothing(sigma):
    inputs = as_float(images())
    sigmas = torch.tensor([sigma, 0.0, sigma, 0.0, sigma, sigma])
    ours = augment.gaussian_blur(inputs, sigmas, radius=6)
    expected = reference.gaussian_blur(inputs, kernel_size=13, sigma=sigma)
    torch.testing.assert_close(ours[sigmas > 0], expected[sigmas > 0], rtol=0, atol=1e-5)
    assert torch.equal(ours[sigmas == 0], inputs[sigmas == 0])


def test_grayscale_flip_solarize_and_normalise_equal_torchvisions():
    crops, config = images(), imagenet()
    inputs = as_float(crops)
    on = torch.tensor([True, False] * 3)
    cases = {
        "grayscale": lambda x: reference.rgb_to_grayscale(x, num_output_channels=3),
        "flip": reference.horizontal_flip,
        "solarize": lambda x: reference.solarize(x, 128 / 255),
    }
    for name, function in cases.items():
        parameters = identity(6)._replace(**{name: on})
        ours = augment.photometry(crops, parameters, config)
        expected = torch.where(on.view(-1, 1, 1, 1), function(inputs), inputs)
        expected = reference.normalize(expected, config.image_mean, config.image_std)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_photometry_does_not_depend_on_the_batch():
    """A view is the same alone and among others: what exact resume and any number of processes rest on."""
    config = imagenet(image_size=32)
    uniforms = np.random.default_rng(0).random((8, augment.NUM_UNIFORMS))
    views = np.array([0, 1] * 4)
    parameters = augment.photometry_parameters(uniforms, views, config)
    crops = images(8)
    together = augment.photometry(crops, parameters, config)
    for i in range(8):
        alone = augment.photometry_parameters(uniforms[i : i + 1], views[i : i + 1], config)
        torch.testing.assert_close(
            augment.photometry(crops[i : i + 1], alone, config)[0], together[i], rtol=0, atol=1e-5
        )


def test_views_are_channels_last_and_operations_that_are_off_change_nothing():
    config = imagenet(
        jitter_probability=0,
        flip_probability=0,
        grayscale_probability=0,
        blur_probability=[0, 0],
        solarize_probability=[0, 0],
    )
    crops = images()
    parameters = augment.photometry_parameters(np.full((6, augment.NUM_UNIFORMS), 0.5), np.zeros(6, int), config)
    views = augment.photometry(crops, parameters, config)
    assert views.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(views, augment.evaluation_view(crops, config), rtol=0, atol=0)


# --- the parameters' distributions


def drawn(number, config, view=0):
    uniforms = np.stack([augment.draw_uniforms(7, 0, sample, view) for sample in range(number)])
    return augment.photometry_parameters(uniforms, np.full(number, view), config)


def test_distributions_are_the_published_ones():
    number, config = 8000, imagenet()
    sides = [drawn(number, config, view) for view in (0, 1)]
    tolerance = 3.5 * 0.5 / math.sqrt(number)  # three and a half standard deviations of a share
    for view, parameters in enumerate(sides):
        blurred, solarized = ((1.0, 0.0), (0.1, 0.2))[view]
        jittered = (parameters.factors[:, 0] != 1).float().mean().item()
        assert jittered == pytest.approx(0.8, abs=tolerance)
        assert parameters.flip.float().mean().item() == pytest.approx(0.5, abs=tolerance)
        assert parameters.grayscale.float().mean().item() == pytest.approx(0.2, abs=tolerance)
        assert (parameters.sigma > 0).float().mean().item() == pytest.approx(blurred, abs=tolerance)
        assert parameters.solarize.float().mean().item() == pytest.approx(solarized, abs=tolerance)
        active = parameters.sigma[parameters.sigma > 0]
        assert 0.1 <= active.min() < 0.15
        assert 1.95 < active.max() <= 2
        for index, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
            values = parameters.factors[parameters.factors[:, 0] != 1][:, index]
            assert low <= values.min() < low + 0.02 * (high - low)
            assert high - 0.02 * (high - low) < values.max() <= high
            assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        for place in range(4):  # each operation is as often at each place
            shares = torch.bincount(parameters.order[:, place], minlength=4) / number
            torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=tolerance)
    assert not torch.equal(sides[0].factors, sides[1].factors)


def test_crops_have_the_distribution_of_torchvisions():
    config, height, width = imagenet(), 375, 500
    torch.manual_seed(0)
    transform, image = v2.RandomResizedCrop(224, (0.08, 1.0), (3 / 4, 4 / 3)), torch.empty(3, height, width)
    theirs = np.array([list(transform.make_params([image]).values()) for _ in range(4000)])  # top, left, height, width
    ours = np.array(
        [augment.draw_crop(augment.draw_uniforms(3, 0, sample, 0), height, width, config)[:4] for sample in range(4000)]
    )
    for column, scale in enumerate((height, width, height, width)):
        for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
            difference = np.quantile(ours[:, column], quantile) - np.quantile(theirs[:, column], quantile)
            assert abs(difference) < 0.035 * scale, (column, quantile)


# --- geometry


def test_a_crop_equals_torchvisions_resize():
    image = natural_image(300, 400)
    for box in ((10, 20, 250, 333), (50, 60, 100, 90), (0, 0, 300, 400)):
        ours = augment.cut(image, augment.Crop(*box, 0.0), 96)
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        theirs = reference.resized_crop(pixels, *box, size=[96, 96], antialias=True).permute(1, 2, 0).numpy()
        assert np.array_equal(ours, theirs), box


def test_a_turned_crop_keeps_its_centre_and_turns():
    image = np.zeros((64, 64, 3), np.uint8)
    image[20:24, 40:44] = 255  # a spot right of and above the centre
    straight = augment.cut_turned(image, augment.Crop(0.0, 0.0, 64.0, 64.0, 0.0), 64)
    assert np.array_equal(straight, image)
    turned = augment.cut_turned(image, augment.Crop(0.0, 0.0, 64.0, 64.0, 90.0), 64)
    assert np.array_equal(turned, np.rot90(image)) or np.array_equal(turned, np.rot90(image, -1))


def test_a_turned_crop_does_not_alias():
    """White noise, shrunk eightfold, is nearly gray; one pixel of four taken as it is stays noise."""
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    straight = augment.cut(image, augment.Crop(0, 0, 512, 512, 0.0), 64).std()
    turned = augment.cut_turned(image, augment.Crop(0.0, 0.0, 512.0, 512.0, 10.0), 64).std()
    assert turned < 1.3 * straight < 12


def test_crops_fit_any_image():
    config = imagenet()
    for height, width in ((1, 1), (1, 500), (500, 1), (3, 4), (4000, 30)):
        image = natural_image(max(height, 2), max(width, 2))[:height, :width]
        for sample in range(20):
            crop = augment.draw_crop(augment.draw_uniforms(0, 0, sample, 0), height, width, config)
            assert crop.top >= 0
            assert crop.left >= 0
            assert crop.top + crop.height <= height
            assert crop.left + crop.width <= width
            assert augment.cut(image, crop, 24).shape == (24, 24, 3)


def test_random_numbers_depend_on_each_of_seed_epoch_sample_and_view():
    first = augment.draw_uniforms(0, 0, 0, 0)
    assert np.array_equal(first, augment.draw_uniforms(0, 0, 0, 0))
    for other in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        assert not np.array_equal(first, augment.draw_uniforms(*other))


def test_digits_are_turned_and_reach_over_the_edge():
    config = build_config({"recipe": "digits"})
    crops = [augment.draw_crop(augment.draw_uniforms(0, 0, n, 0), 8, 8, config) for n in range(2000)]
    angles, areas = np.array([c.angle for c in crops]), np.array([c.height * c.width / 64 for c in crops])
    assert angles.min() < -14 < 14 < angles.max()
    assert 0.4 <= areas.min() < 0.42
    assert 1.18 < areas.max() <= 1.2

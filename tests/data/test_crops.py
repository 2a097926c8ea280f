import math

import numpy as np
import pytest
import torch
from helpers import natural_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from m2t_accel.config.recipes import build_config
from m2t_accel.data import crops


def imagenet(**settings):
    return build_config({"recipe": "8x2080Ti-b256-100ep", "dataset": "digits", **settings})


def drawn(number, config, view=0):
    uniforms = crops.draw_uniforms(7, 0, np.arange(number), view)
    return crops.photometry_parameters(uniforms, np.full(number, view), config)


def test_parameters_have_the_published_distributions():
    number, config = 8000, imagenet()
    sides = [drawn(number, config, view) for view in (0, 1)]
    tolerance = 3.5 * 0.5 / math.sqrt(number)  # 3.5 standard deviations of a share
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
        for place in range(4):  # each operation is equally often at each place
            shares = torch.bincount(parameters.order[:, place], minlength=4) / number
            torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=tolerance)
    assert not torch.equal(sides[0].factors, sides[1].factors)


def test_crops_are_distributed_as_in_torchvision():
    config, height, width = imagenet(), 375, 500
    torch.manual_seed(0)
    transform, image = v2.RandomResizedCrop(224, (0.08, 1.0), (3 / 4, 4 / 3)), torch.empty(3, height, width)
    theirs = np.array([list(transform.make_params([image]).values()) for _ in range(4000)])  # top, left, height, width
    uniforms = crops.draw_uniforms(3, 0, np.arange(4000), 0)
    ours = np.array([crops.draw_crop(row, height, width, config)[:4] for row in uniforms])
    for column, scale in enumerate((height, width, height, width)):
        for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
            difference = np.quantile(ours[:, column], quantile) - np.quantile(theirs[:, column], quantile)
            assert abs(difference) < 0.035 * scale, (column, quantile)


def test_the_parameters_of_a_view_are_uncorrelated():
    """No random number is used twice: crop positions, factors, the order of the jitter and choices are independent."""
    number, config = 4000, imagenet(jitter_probability=1.0, crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))
    columns = []
    for view in range(2):
        uniforms = crops.draw_uniforms(11, 2, np.arange(number), view)
        boxes = np.array([crops.draw_crop(row, 400, 600, config)[:2] for row in uniforms])
        photometry = crops.photometry_parameters(uniforms, np.full(number, view), config)
        columns += [*boxes.T, *photometry.factors.numpy().T, *photometry.order.argsort(dim=1).numpy().T[:3]]
        columns += [photometry.flip.numpy(), photometry.grayscale.numpy(), photometry.sigma.numpy()]
    columns.append(photometry.solarize.numpy())  # of view 2; view 1 is never solarized
    correlations = np.corrcoef(np.array(columns, float))
    names = ["top", "left", *"bcsh", "place b", "place c", "place s", "flip", "gray", "sigma"]
    places = [i for i, name in enumerate(names) if name.startswith("place")]
    for i, j in zip(*np.triu_indices(len(columns), 1), strict=True):
        same_order = i // 12 == j // 12 and {i % 12, j % 12} <= set(places)  # two operations cannot share a place
        assert abs(correlations[i, j] + same_order / 3) < 0.08, (i, j, correlations[i, j])


@pytest.mark.parametrize(("height", "width", "expected"), [(20, 400, (0, 187, 20, 27)), (400, 20, (187, 0, 27, 20))])
def test_a_crop_that_never_fits_is_the_largest_central_box(height, width, expected):
    config = imagenet(crop_scale=(1.0, 1.0))
    uniforms = crops.draw_uniforms(0, 0, np.arange(20), 0)
    for row in uniforms:
        top, left, crop_height, crop_width, _ = crops.draw_crop(row, height, width, config)
        assert abs(top - expected[0]) + abs(left - expected[1]) <= 2
        assert (crop_height, crop_width) == expected[2:]


def test_crops_reach_every_row_and_column():
    config = imagenet(crop_scale=(0.5, 0.5), crop_ratio=(1.0, 1.0))
    boxes = [crops.draw_crop(row, 6, 7, config) for row in crops.draw_uniforms(1, 0, np.arange(300), 0)]
    assert {box.top for box in boxes} == set(range(6 - 5 + 1))
    assert {box.left for box in boxes} == set(range(7 - 5 + 1))


def blank(size):
    return np.empty((size, size, 3), np.uint8)


def test_a_crop_equals_torchvisions_resize():
    image = natural_image(300, 400)
    for box in ((10, 20, 250, 333), (50, 60, 100, 90), (0, 0, 300, 400)):
        ours = crops.cut(image, crops.Crop(*box, 0.0), blank(96))
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        theirs = reference.resized_crop(pixels, *box, size=[96, 96], antialias=True).permute(1, 2, 0).numpy()
        assert np.array_equal(ours, theirs), box


def test_a_rotated_crop_rotates_about_its_centre():
    image = np.zeros((64, 64, 3), np.uint8)
    image[20:24, 40:44] = 255  # a spot above and right of the centre
    straight = crops.cut_rotated(image, crops.Crop(0.0, 0.0, 64.0, 64.0, 0.0), blank(64))
    assert np.array_equal(straight, image)
    rotated = crops.cut_rotated(image, crops.Crop(0.0, 0.0, 64.0, 64.0, 90.0), blank(64))
    assert np.array_equal(rotated, np.rot90(image)) or np.array_equal(rotated, np.rot90(image, -1))


def test_a_rotated_crop_does_not_alias():
    """White noise shrunk eightfold is nearly gray; sampled without averaging, it stays noise."""
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    straight = crops.cut(image, crops.Crop(0, 0, 512, 512, 0.0), blank(64)).std()
    rotated = crops.cut_rotated(image, crops.Crop(0.0, 0.0, 512.0, 512.0, 10.0), blank(64)).std()
    assert rotated < 1.3 * straight < 12


def test_crops_fit_any_image():
    config = imagenet()
    for height, width in ((1, 1), (1, 500), (500, 1), (3, 4), (4000, 30)):
        image = natural_image(max(height, 2), max(width, 2))[:height, :width]
        for uniforms in crops.draw_uniforms(0, 0, np.arange(20), 0):
            crop = crops.draw_crop(uniforms, height, width, config)
            assert crop.top >= 0
            assert crop.left >= 0
            assert crop.top + crop.height <= height
            assert crop.left + crop.width <= width
            assert crops.cut(image, crop, blank(24)).shape == (24, 24, 3)


def test_random_numbers_depend_on_seed_epoch_sample_and_view_but_not_on_the_rest_of_the_batch():
    samples = np.array([0, 5, 2])
    first = crops.draw_uniforms(0, 0, samples, 0)
    assert first.shape == (3, crops.NUM_UNIFORMS)
    assert np.array_equal(first[[2, 0]], crops.draw_uniforms(0, 0, samples[[2, 0]], 0))
    for other in ((1, 0, samples, 0), (0, 1, samples, 0), (0, 0, samples + 1, 0), (0, 0, samples, 1)):
        assert not np.isclose(first, crops.draw_uniforms(*other)).any()


def test_crops_of_digits_are_rotated_and_reach_beyond_the_edge():
    config = build_config({"recipe": "digits"})
    boxes = [crops.draw_crop(row, 8, 8, config) for row in crops.draw_uniforms(0, 0, np.arange(2000), 0)]
    angles, areas = np.array([box.angle for box in boxes]), np.array([box.height * box.width / 64 for box in boxes])
    assert angles.min() < -14 < 14 < angles.max()
    assert 0.5 <= areas.min() < 0.52
    assert 1.18 < areas.max() <= 1.2


@pytest.mark.parametrize("shape", [(3, 4000), (4000, 3), (1, 2000), (1, 1)])
def test_the_central_view_of_a_strip_is_its_middle(shape):
    image = np.zeros((*shape, 3), np.uint8)
    middle = [slice(max(0, side // 2 - 3), side // 2 + 3) for side in shape]
    image[tuple(middle)] = 255
    view = crops.central_view(image, 224, 0.875)
    assert view.shape == (224, 224, 3)
    assert view.mean() > 200

import itertools

import numpy as np
import pytest
import torch
from helpers import natural_image
from torchvision.transforms.v2 import functional as reference

from m2t_accel.config.recipes import build_config
from m2t_accel.data import crops, photometry
from m2t_accel.data.crops import Photometry


def imagenet(**settings):
    return build_config({"recipe": "8x2080Ti-b256-100ep", "dataset": "digits", **settings})


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


IMPLEMENTATIONS = [photometry.photometry_batched, photometry.photometry_one_by_one]


def unnormalised(function, crops, parameters, config):
    """Return the views of one implementation without the normalisation, in [0, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
    return function(crops, parameters, config) * std + mean


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "index", "factor", "theirs"), OPERATIONS)
def test_each_jitter_operation_equals_torchvision(function, name, index, factor, theirs):
    factors = identity(6).factors
    factors[:, index] = factor
    ours = unnormalised(function, images(), identity(6)._replace(factors=factors), imagenet())
    torch.testing.assert_close(ours, theirs(as_float(images()), factor), rtol=0, atol=2e-3)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_jitter_in_every_order_equals_torchvision_one_image_at_a_time(function):
    torch.manual_seed(0)
    functions = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    order = torch.tensor([list(p) for p in itertools.permutations(range(4))])
    crops = images(len(order), 16)
    factors = torch.rand(len(order), 4) * torch.tensor([0.8, 0.8, 0.4, 0.2]) + torch.tensor([0.6, 0.6, 0.8, -0.1])
    ours = unnormalised(function, crops, identity(len(order))._replace(factors=factors, order=order), imagenet())
    for i, places in enumerate(order.tolist()):
        expected = as_float(crops)[i]
        for operation in places:
            expected = functions[operation](expected, factors[i, operation].item())
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=4e-3)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvision_and_sigma_0_changes_nothing(function, sigma):
    sigmas = torch.tensor([sigma, 0.0, sigma, 0.0, sigma, sigma])
    inputs = as_float(images())
    ours = unnormalised(function, images(), identity(6)._replace(sigma=sigmas), imagenet())
    expected = reference.gaussian_blur(inputs, kernel_size=13, sigma=sigma)
    # With OpenCV the kernel ends at three sigma.
    tolerance = 1e-5 if function is photometry.photometry_batched else 1 / 255
    torch.testing.assert_close(ours[sigmas > 0], expected[sigmas > 0], rtol=0, atol=tolerance)
    torch.testing.assert_close(ours[sigmas == 0], inputs[sigmas == 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_grayscale_flip_solarize_and_normalise_equal_torchvision(function):
    crops, config = images(), imagenet()
    inputs = as_float(crops)
    on = torch.tensor([True, False] * 3)
    cases = {
        "grayscale": lambda x: reference.rgb_to_grayscale(x, num_output_channels=3),
        "flip": reference.horizontal_flip,
        "solarize": lambda x: reference.solarize(x, 128 / 255),
    }
    for name, theirs in cases.items():
        ours = function(crops, identity(6)._replace(**{name: on}), config)
        expected = torch.where(on.view(-1, 1, 1, 1), theirs(inputs), inputs)
        expected = reference.normalize(expected, config.image_mean, config.image_std)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def random_parameters(number, config):
    uniforms = np.random.default_rng(0).random((number, crops.NUM_UNIFORMS))
    return crops.photometry_parameters(uniforms, np.arange(number) % 2, config)


def test_the_two_implementations_agree():
    config = imagenet(image_size=32, solarize_probability=[0.3, 0.3], grayscale_probability=0.3)
    crops, parameters = images(96), random_parameters(96, config)
    sharp = parameters._replace(sigma=torch.zeros(96))
    one, two = (unnormalised(function, crops, sharp, config) for function in IMPLEMENTATIONS)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    one, two = (unnormalised(function, crops, parameters, config) for function in IMPLEMENTATIONS)
    torch.testing.assert_close(one, two, rtol=0, atol=0.01)  # they truncate the blur differently
    assert (one - two).abs().mean() < 2e-4


def test_the_two_implementations_agree_without_hue():
    config = imagenet(hue=0.0)
    crops, parameters = images(16), random_parameters(16, config)
    one_by_one = photometry.photometry_one_by_one(crops, parameters, config)
    batched = photometry.photometry_batched(crops, parameters, config)
    assert (one_by_one - batched).abs().max() < 5e-2
    assert (one_by_one - batched).abs().mean() < 1e-3


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_photometry_does_not_depend_on_the_batch(function):
    """A view is the same alone and in a batch; exact resume and any number of processes rely on that."""
    config = imagenet(image_size=32)
    crops, parameters = images(8), random_parameters(8, config)
    together = function(crops, parameters, config)
    for i in range(8):
        alone = Photometry(*(values[i : i + 1] for values in parameters))
        torch.testing.assert_close(function(crops[i : i + 1], alone, config)[0], together[i], rtol=0, atol=1e-5)


def test_photometry_compiles_to_one_graph_for_all_parameters():
    config = imagenet(image_size=32)
    crops, graphs = images(8), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(photometry.photometry_batched, fullgraph=True, backend=backend)
    for parameters in (identity(8), random_parameters(8, config)):
        expected = photometry.photometry_batched(crops, parameters, config)
        torch.testing.assert_close(compiled(crops, parameters, config), expected, rtol=0, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_views_are_channels_last_and_disabled_operations_change_nothing(function):
    config = imagenet(
        jitter_probability=0,
        flip_probability=0,
        grayscale_probability=0,
        blur_probability=[0, 0],
        solarize_probability=[0, 0],
    )
    parameters = crops.photometry_parameters(np.full((6, crops.NUM_UNIFORMS), 0.5), np.zeros(6, int), config)
    views = function(images(), parameters, config)
    assert views.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(views, photometry.evaluation_view(images(), config), rtol=0, atol=1e-6)


@pytest.mark.slow  # a minute of compiling
def test_photometry_by_the_compiler_has_the_same_values_in_few_kernels():
    pytest.importorskip("torch._inductor")
    from torch._inductor import metrics

    config = imagenet(image_size=32)
    crops, parameters = images(8), random_parameters(8, config)
    metrics.reset()
    torch._dynamo.reset()
    compiled = torch.compile(photometry.photometry_batched, dynamic=False)
    expected = photometry.photometry_batched(crops, parameters, config)
    views = compiled(crops, parameters, config)
    torch.testing.assert_close(views, expected, rtol=0, atol=1e-4)
    assert views.stride() == expected.stride()
    assert metrics.generated_kernel_count <= 40


@pytest.fixture
def fresh_photometry():
    photometry.photometry_compiled.cache_clear()
    yield
    photometry.photometry_compiled.cache_clear()


def test_a_machine_that_cannot_compile_is_warned_once_and_continues(monkeypatch, fresh_photometry):
    def compile(function, **options):
        def fail(*arguments):
            raise torch._dynamo.exc.InternalTorchDynamoError("Failed to find C compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    with pytest.warns(UserWarning, match="slower: InternalTorchDynamoError: Failed to find C compiler"):
        assert photometry.photometry_compiled() is photometry.photometry_batched
    assert photometry.photometry_compiled() is photometry.photometry_batched


def test_photometry_is_compiled_on_gpus_unless_a_run_must_repeat():
    assert photometry.is_compiled(torch.device("cuda"))
    assert not photometry.is_compiled(torch.device("cpu"))
    assert not photometry.is_compiled(torch.device("mps"))
    torch.use_deterministic_algorithms(True)
    try:
        assert not photometry.is_compiled(torch.device("cuda"))
    finally:
        torch.use_deterministic_algorithms(False)

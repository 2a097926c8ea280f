"""Encoder folders, loaded by stock libraries."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_model
from transformers import AutoImageProcessor, AutoModel, ResNetForImageClassification, ResNetModel, pipeline

from m2t_accel.config.recipes import build_config
from m2t_accel.data.crops import central_view
from m2t_accel.data.photometry import evaluation_view
from m2t_accel.hub.encoders import load_encoder
from m2t_accel.hub.folder import image_processor, save_encoder
from m2t_accel.model import create_encoder, embed, plain_encoder
from m2t_accel.momentum_norm import convert_batch_norm


def test_stock_libraries_compute_the_same_features(trained_run):
    """The pixels are compared where a run is published."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (21, 17, 3), np.uint8))
    folder = trained_run / "encoder"
    inputs = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    expected = embed(load_encoder(str(trained_run)).model, inputs.pixel_values)[0]
    encoder = AutoModel.from_pretrained(folder)
    assert type(encoder) is ResNetModel
    piped = pipeline("image-feature-extraction", model=str(folder))(image, pool=True)
    classifier, info = ResNetForImageClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert sorted(info["missing_keys"]) == ["classifier.1.bias", "classifier.1.weight"]
    for features in (encoder(**inputs).pooler_output, torch.tensor(piped), classifier.resnet(**inputs).pooler_output):
        torch.testing.assert_close(features.ravel(), expected, rtol=0, atol=1e-5)


@pytest.fixture
def config():
    return build_config({"recipe": "digits"})


def test_auto_model_loads_a_teachers_encoder_with_its_statistics(config, tmp_path):
    torch.manual_seed(0)
    teacher = convert_batch_norm(create_encoder("resnet10-quarter")).eval()
    for name, tensor in teacher.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 2)
    save_encoder(plain_encoder(teacher), config, "a card", tmp_path / "encoder")
    loaded = AutoModel.from_pretrained(tmp_path / "encoder")
    states = loaded.state_dict(), teacher.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(embed(loaded.eval(), images), embed(teacher, images))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "encoder")
    assert processor.size == {"shortest_edge": config.image_size}
    assert processor.crop_size == {"height": config.image_size, "width": config.image_size}
    assert tuple(processor.image_mean) == config.image_mean
    assert (tmp_path / "encoder" / "README.md").read_text() == "a card"


def test_the_weights_of_any_other_module_are_written(config, tmp_path):
    modules = [torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)) for _ in range(2)]
    save_encoder(modules[0], config, "a card", tmp_path / "encoder")
    load_model(modules[1], tmp_path / "encoder" / "model.safetensors")
    assert torch.equal(modules[0][0].weight, modules[1][0].weight)
    files = sorted(path.name for path in (tmp_path / "encoder").iterdir())
    assert files == ["README.md", "model.safetensors", "preprocessor_config.json"]


IMAGENET = {"recipe": "8x2080Ti-b256-100ep", "dataset": "digits"}


@pytest.mark.parametrize("settings", [{"recipe": "digits"}, IMAGENET, {**IMAGENET, "image_size": 384}])
@pytest.mark.parametrize(
    "shape", [(8, 8), (375, 500), (500, 333), (224, 224), (301, 299), (472, 403), (340, 303), (331, 428)]
)
def test_the_image_processor_prepares_images_as_evaluations_do(settings, shape):
    config = build_config(settings)
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (-(-shape[0] // 8), -(-shape[1] // 8), 3)), np.ones((8, 8, 1)))
    image = np.ascontiguousarray(image[: shape[0], : shape[1]].astype(np.uint8))
    crop = torch.from_numpy(central_view(image, config.image_size, config.evaluation_crop))
    expected = evaluation_view(crop[None], config)
    found = image_processor(config)(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    assert found.shape == expected.shape
    # Half a level of 255, normalised: the resize and the crop must be the same.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5 / 255 / min(config.image_std))

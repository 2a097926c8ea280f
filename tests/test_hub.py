"""The published encoder, loaded as others load it: stock libraries, in a process without this package."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from m2t_accel.augment import central_view
from m2t_accel.hub import image_processor
from m2t_accel.model import embed
from m2t_accel.photometry import evaluation_view
from m2t_accel.pretrain import pretrain
from m2t_accel.recipes import build_config

STRANGER = """
import json, sys
sys.modules["m2t_accel"] = None  # any import of it now fails
import numpy as np, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, ResNetForImageClassification, pipeline

folder, picture, output = sys.argv[1:]
image = Image.open(picture)
processor = AutoImageProcessor.from_pretrained(folder)
encoder = AutoModel.from_pretrained(folder)
inputs = processor(image, return_tensors="pt")
with torch.no_grad():
    features = encoder(**inputs).pooler_output.flatten(1)[0]
piped = pipeline("image-feature-extraction", model=folder)(image, pool=True)
classifier, info = ResNetForImageClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
with torch.no_grad():
    classified = classifier.resnet(**inputs).pooler_output.flatten(1)[0]
json.dump({
    "type": type(encoder).__name__,
    "pixels": inputs["pixel_values"].tolist(),
    "features": features.tolist(),
    "piped": np.asarray(piped).ravel().tolist(),
    "classified": classified.tolist(),
    "missing": sorted(info["missing_keys"]),
}, open(output, "w"))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    config = build_config(tiny(folder))
    return folder, config, pretrain(config)


@pytest.mark.slow
def test_stock_libraries_load_the_teachers_features(run, run_script, tmp_path):
    folder, _, teacher = run
    pixels = np.random.default_rng(0).integers(0, 256, (21, 17, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    done = run_script("-c", STRANGER, folder / "encoder", tmp_path / "picture.png", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    loaded = json.loads((tmp_path / "out.json").read_text())
    assert loaded["type"] == "ResNetModel"
    assert loaded["missing"] == ["classifier.1.bias", "classifier.1.weight"]
    with torch.no_grad():
        expected = embed(teacher.encoder.eval(), torch.tensor(loaded["pixels"]))[0]
    for name in ("features", "piped", "classified"):
        torch.testing.assert_close(torch.tensor(loaded[name]), expected, rtol=0, atol=1e-5, msg=name)


def test_running_statistics_are_the_teachers_history(run):
    folder, _, teacher = run
    loaded = AutoModel.from_pretrained(folder / "encoder").state_dict()
    theirs = teacher.encoder.state_dict()
    assert loaded.keys() == theirs.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in theirs.items())
    assert loaded["embedder.embedder.normalization.running_mean"].abs().max() > 0.01


IMAGENET = {"recipe": "8x2080Ti-b256-100ep", "dataset": "digits"}


@pytest.mark.parametrize("settings", [{"recipe": "digits"}, IMAGENET, {**IMAGENET, "image_size": 384}])
@pytest.mark.parametrize(
    "shape", [(8, 8), (375, 500), (500, 333), (224, 224), (301, 299), (472, 403), (340, 303), (331, 428)]
)
def test_the_processor_makes_what_evaluation_sees(settings, shape):
    config = build_config(settings)
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (-(-shape[0] // 8), -(-shape[1] // 8), 3)), np.ones((8, 8, 1)))
    image = np.ascontiguousarray(image[: shape[0], : shape[1]].astype(np.uint8))
    ours = evaluation_view(
        torch.from_numpy(central_view(image, config.image_size, config.evaluation_crop))[None], config
    )
    theirs = image_processor(config)(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape
    # Half a level of 255, normalised: the two must be the same resize and the same crop.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.5 / 255 / min(config.image_std))


def test_the_processor_is_written_out(run):
    folder, config, _ = run
    processor = AutoImageProcessor.from_pretrained(folder / "encoder")
    assert processor.size == {"shortest_edge": 32}
    assert processor.crop_size == {"height": 32, "width": 32}
    assert tuple(processor.image_mean) == config.image_mean


def test_the_card_tells_the_run(run):
    from huggingface_hub import ModelCard

    folder, _, _ = run
    card = ModelCard.load(folder / "encoder" / "README.md")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracies = [row["knn_top1"] for row in rows if "knn_top1" in row]
    (result,) = card.data.eval_results
    assert result.metric_value == round(accuracies[-1], 6)
    assert f"**{100 * accuracies[-1]:.2f} %**" in card.text
    for words in ("AutoModel.from_pretrained", "arXiv 2101.07525", "batch_size: 256", "images seen | 2,560 |"):
        assert words in card.text

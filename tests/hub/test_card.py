"""The published encoder, loaded as others load it: stock libraries, in a process without this package."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from helpers import tiny
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from m2t_accel.config.recipes import build_config
from m2t_accel.data.crops import central_view
from m2t_accel.data.photometry import evaluation_view
from m2t_accel.hub import card as module
from m2t_accel.hub.folder import image_processor
from m2t_accel.model import embed
from m2t_accel.pretrain import pretrain

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
    folder, _, _ = run
    card = ModelCard.load(folder / "encoder" / "README.md")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracies = [row["knn_top1"] for row in rows if "knn_top1" in row]
    (result,) = card.data.eval_results
    assert result.metric_value == round(accuracies[-1], 6)
    assert f"**{100 * accuracies[-1]:.2f} %**" in card.text
    for words in ("AutoModel.from_pretrained", "arXiv 2101.07525", "batch_size: 256", "images seen | 2,560 |"):
        assert words in card.text


# --- what may be published


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/data/imagenet", "imagenet"),
        ("~/pictures of me", "pictures of me"),
        ("../elsewhere/x", "x"),
        ("/home/someone/pictures: 12 images", "pictures: 12 images"),
        ("images at 100 images/s, of runs/digits", "images at 100 images/s, of runs/digits"),
        ("https://arxiv.org/abs/2101.07525", "https://arxiv.org/abs/2101.07525"),
        ("ILSVRC/imagenet-1k", "ILSVRC/imagenet-1k"),
        ("--dataset=/mnt/a/b --seed 1", "--dataset=b --seed 1"),
    ],
)
def test_paths_of_a_machine_are_not_published(text, clean):
    assert module.without_paths(text) == clean


def test_a_command_is_published_without_paths():
    command = "accelerate launch --config_file /home/me/c.yaml scripts/pretrain.py --dataset '/mnt/my pictures/x'"
    assert module.clean_command(command) == ("accelerate launch --config_file c.yaml scripts/pretrain.py --dataset x")
    assert module.clean({"a": ["/x/y", 1, None], "b": {"c": "~/z"}}) == {"a": ["y", 1, None], "b": {"c": "z"}}


TRAINING = {
    "data": "/data/my pictures: 12 images",
    "images_seen": 1200,
    "hardware": "1 × cpu",
    "time": "3 s",
    "command": "python scripts/pretrain.py --dataset '/data/my pictures'",
    "versions": {"torch": "2.15.0"},
}


def result(evaluation="linear probe", top1=0.5, **protocol):
    return {"evaluation": evaluation, "dataset": "/data/flowers", "figures": {"top1": top1}, "protocol": protocol}


def card(accuracies=(0.3, 0.4), results=(), **settings):
    given = {"recipe": "8x2080Ti-b256-100ep", "dataset": "/data/my pictures", "output_dir": "/home/me/runs/x"}
    return module.model_card(build_config({**given, **settings}), TRAINING, accuracies, results, "me/flowers")


def test_a_card_with_results_and_without_paths():
    text = card(results=[result(epochs=80, image_size=224), result("knn", 0.3, random_weights=True)])
    assert "| linear probe | flowers, ? images | top1: **50.00 %** | epochs 80, image_size 224 |" in text
    assert "| knn, random weights |" in text
    assert 'AutoModel.from_pretrained("me/flowers")' in text
    assert not any(part in text for part in ("/data", "/home", "my pictures/", "published linear top-1"))
    found = ModelCard(text).data.eval_results
    assert [(r.dataset_name, r.metric_name, r.metric_value) for r in found] == [
        ("my pictures", "kNN top-1 (k=20, T=0.07), while training", 0.4),
        ("flowers", "linear probe top1", 0.5),
    ], "random weights are no result of the encoder"
    assert found[1].metric_args == {"epochs": 80, "image_size": 224}
    assert "published linear top-1 on ImageNet is 70.4 %; this run was not evaluated so" in card()
    assert "It was not measured in this run." in card(accuracies=())
    assert "licence of the weights is their author's to choose" in text


def test_the_cards_code_loads_the_encoder(run):
    folder, _, _ = run
    text = (folder / "encoder" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.strip().splitlines()) == 5, "an import and four lines"
    places = {"image": Image.new("RGB", (40, 30))}
    exec(code.replace("PATH_OR_ID", str(folder / "encoder")), places)
    assert places["features"].shape == (1, 128)


# --- a second card


def test_a_card_that_nobody_has_edited_is_written_anew():
    there, ours = card(accuracies=(0.1, 0.2)), card(results=[result()])
    assert module.parts_of(module.merged_card(there, ours))[1] == module.parts_of(ours)[1]
    again = module.merged_card(there, ours)
    assert module.merged_card(again, ours) == again, "nothing changes twice"


def test_the_prose_of_an_edited_card_stays_and_its_results_are_updated():
    there = card(accuracies=(0.1, 0.2)).replace("## Limits", "## Thanks\n\nTo my mother.\n\n## Limits")
    merged = module.merged_card(there, card(results=[result(top1=0.625)]))
    assert "To my mother." in merged
    assert "**62.50 %**" in merged
    assert "**20.00 %**" not in merged
    assert merged.count(module.RESULTS) == 1
    without_marks = there.replace(module.RESULTS, "").replace(module.END_OF_RESULTS, "")
    merged = module.merged_card(without_marks, card(results=[result(top1=0.625)]))
    assert "**62.50 %**" not in merged, "whoever took the marks out wants the text as it is"
    assert "**20.00 %**" in merged
    assert [r.metric_value for r in ModelCard(merged).data.eval_results] == [0.4, 0.625]


def test_metadata_that_others_added_stays():
    data, body = module.parts_of(card())
    data |= {"license": "cc-by-4.0", "tags": ["flowers"]}
    other = {"task": {"type": "image-classification"}, "dataset": {"name": "CUB", "type": "cub"}}
    data["model-index"][0]["results"].append(
        {**other, "metrics": [{"type": "accuracy", "value": 0.9, "name": "theirs"}]}
    )
    there = f"---\n{yaml.safe_dump(data)}---\n{body}"
    merged, _ = module.parts_of(module.merged_card(there, card(accuracies=(0.3, 0.7))))
    assert (merged["license"], merged["tags"]) == ("cc-by-4.0", ["flowers"])
    metrics = [metric for found in merged["model-index"][0]["results"] for metric in found["metrics"]]
    assert sorted(metric["value"] for metric in metrics) == [0.7, 0.9]


@pytest.mark.parametrize("there", ["", "Just words.", "---\n- a list\n---\nwords", "---\nlicense: mit\n---\n"])
def test_any_card_may_be_there(there):
    merged = module.merged_card(there, card())
    assert there.split("---")[-1].strip() in merged
    assert ModelCard(merged).data.eval_results[0].metric_value == 0.4

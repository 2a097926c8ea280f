"""The text and the metadata of model cards, and the merging of a card with a published one."""

import json
import re

import pytest
from huggingface_hub import EvalResult, ModelCard
from PIL import Image

from m2t_accel.config.data import public_name
from m2t_accel.config.fields import command_without_paths, without_paths
from m2t_accel.config.recipes import build_config
from m2t_accel.hub.card import SECTION_END, SECTION_START, merge_cards, model_card


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
        ({"a": ["/x/y", 1, None], "b": {"c": "~/z"}}, {"a": ["y", 1, None], "b": {"c": "z"}}),
    ],
)
def test_paths_are_cut_to_their_last_name(text, clean):
    assert without_paths(text) == clean


def test_a_command_is_published_without_paths():
    command = "accelerate launch --config_file /home/me/c.yaml scripts/pretrain.py --dataset '/mnt/my pictures/x'"
    assert command_without_paths(command) == "accelerate launch --config_file c.yaml scripts/pretrain.py --dataset x"
    command = "python scripts/pretrain.py '--dataset=/home/John Smith/imagenet' '/home/a=b/John Smith/x' --seed=1"
    assert command_without_paths(command) == "python scripts/pretrain.py --dataset=imagenet x --seed=1"


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


def card(accuracies=(0.3, 0.4), results=(), parts=(), **settings):
    given = {"recipe": "8x2080Ti-b256-100ep", "dataset": "/data/my pictures", "output_dir": "/home/me/runs/x"}
    config, training = build_config({**given, **settings}), {**TRAINING, "parts": parts}
    return model_card(config, training, accuracies, results, "me/flowers")


@pytest.mark.parametrize(
    ("source", "hub_id", "shown"), [("/data/r50.pth", None, "r50.pth"), ("you/r50", "you/r50", "you/r50")]
)
def test_the_source_of_a_warm_start_is_named_and_the_base_model_if_it_is_on_the_hub(source, hub_id, shown):
    text = card(parts=[{"init_from": {"hub_id": hub_id}}, {}], init_from=source, encoder="resnet50")
    assert ModelCard(text).data.base_model == hub_id
    assert f"| started from | {shown} |" in text
    assert f"from 30.00 % with the weights of {shown}." in text
    assert f"init_from: {shown}\n" in text
    assert "from 30.00 % with random weights." in card()
    assert "from 30.00 % at the start." in card(encoder="ResNetModel"), (
        "pretrain() was given a module, maybe a trained one"
    )


def test_a_dataset_is_named_as_the_run_recorded_it(tmp_path, monkeypatch):
    (tmp_path / "cats").mkdir()
    monkeypatch.chdir(tmp_path / "cats")
    training = {**TRAINING, "data": ".: 12 images of 2 classes in train/", "dataset": public_name(".")}
    found = {**result(), "dataset": "data/dogs", "dataset_name": "dogs"}
    streamed = {**result(), "dataset": "me/birds", "dataset_name": "me/birds"}
    config = build_config({"recipe": "8x2080Ti-b256-100ep", "dataset": ".", "output_dir": "/home/me/runs/x"})
    monkeypatch.chdir(tmp_path)
    text = model_card(config, training, (0.3, 0.4), [found, streamed])
    assert "# Momentum² Teacher resnet50, cats\n" in text
    assert "| data | cats: 12 images of 2 classes |" in text
    types = [(found.dataset_type, found.dataset_name) for found in ModelCard(text).data.eval_results]
    assert types == [("cats", "cats"), ("dogs", "dogs"), ("me/birds", "birds")]


def metric_values(text):
    return [found.metric_value for found in ModelCard(text).data.eval_results]


def test_a_card_with_results():
    text = card(results=[result(epochs=80, image_size=224), result("knn", 0.3, random_weights=True)])
    assert "| linear probe | flowers, ? images | top1: **50.00 %** | epochs 80, image_size 224 |" in text
    assert "| knn, random weights |" in text
    assert 'AutoModel.from_pretrained("me/flowers")' in text
    assert not any(part in text for part in ("/data", "/home", "my pictures/", "linear top-1"))
    found = ModelCard(text).data.eval_results
    assert [(r.dataset_name, r.metric_name, r.metric_value) for r in found] == [
        ("my pictures", "kNN top-1 (k=20, T=0.07), while training", 0.4),
        ("flowers", "linear probe top1", 0.5),
    ], "random weights are no result of the encoder"
    assert found[1].metric_args == {"epochs": 80, "image_size": 224}
    assert "linear top-1 of this recipe on ImageNet is 70.4 %" in card()
    assert "not evaluated" in card(accuracies=())


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("momentum", "BatchNorm\nnormalises with momentum statistics. This"),
        (
            "batch",
            "BatchNorm\nnormalises with the statistics of the batch, as in BYOL, instead of momentum statistics.",
        ),
        ("running", "BatchNorm\nnormalises with its running average instead of momentum statistics."),
    ],
)
def test_a_card_names_the_teachers_statistics(kind, text):
    found = card(teacher_statistics=kind)
    assert text in found
    assert ("linear top-1 of this recipe on ImageNet" in found) == (kind == "momentum"), (
        "the published result is not its"
    )


def test_the_card_of_a_run(trained_run):
    text = (trained_run / "encoder" / "README.md").read_text()
    rows = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    accuracies = [row["knn_top1"] for row in rows if "knn_top1" in row]
    assert metric_values(text) == [round(accuracies[-1], 6)]
    for words in (f"**{100 * accuracies[-1]:.2f} %**", "arXiv 2101.07525", "batch_size: 64", "images seen | 640 |"):
        assert words in text


def test_the_code_in_the_card_loads_the_encoder(trained_run):
    text = (trained_run / "encoder" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.strip().splitlines()) == 5, "an import, an empty line and three lines"
    names = {"image": Image.new("RGB", (40, 30))}
    exec(code.replace("PATH_OR_ID", str(trained_run / "encoder")), names)
    assert names["features"].shape == (1, 128)


def test_a_second_card_replaces_the_section_and_keeps_the_text_around_it():
    published = card(accuracies=(0.1, 0.2)).replace("## Limits", "## Thanks\n\nTo my mother.\n\n## Limits")
    new = card(results=[result(top1=0.625)], epochs=50, encoder="resnet18")
    merged = merge_cards(published, new)
    assert "# Momentum² Teacher resnet18" in merged
    assert "# Momentum² Teacher resnet50" not in merged
    assert "To my mother." in merged
    assert "**62.50 %**" in merged
    assert "**20.00 %**" not in merged
    assert "| epochs | 50 |" in merged
    assert merged.count(SECTION_START) == merged.count(SECTION_END) == 1
    assert merge_cards(merged, new) == merged
    assert merge_cards(card(accuracies=(0.1, 0.2)), new) == merge_cards(new, new), "an unedited card is replaced"


@pytest.mark.parametrize("mark", [SECTION_START, SECTION_END])
def test_a_card_without_a_mark_keeps_its_text(mark):
    published = card(accuracies=(0.1, 0.2)).replace(mark, "")
    merged = merge_cards(published, card(results=[result(top1=0.625)]))
    assert ModelCard(merged).text == ModelCard(published).text
    assert metric_values(merged) == [0.4, 0.625]


def test_metadata_that_others_added_stays():
    published = ModelCard(card())
    published.data.license, published.data.tags = "cc-by-4.0", ["flowers"]
    published.data.eval_results.append(
        EvalResult("image-classification", "cub", "CUB", "accuracy", 0.9, metric_name="theirs")
    )
    merged = merge_cards(published.content, card(accuracies=(0.3, 0.7)))
    data = ModelCard(merged).data
    assert (data.license, data.tags, data.library_name) == ("cc-by-4.0", ["flowers"], "transformers")
    assert metric_values(merged) == [0.7, 0.9]


def test_results_of_earlier_weights_go():
    published = ModelCard(card(results=[result(top1=0.7), result("fine-tuning", 0.6)]))
    theirs = EvalResult("image-classification", "cub", "CUB", "accuracy", 0.9, metric_name="linear probe of theirs")
    published.data.eval_results.append(theirs)
    knn = {**result("knn"), "figures": {"top1_k20": 0.5, "top1_k200": 0.4}}
    assert metric_values(merge_cards(published.content, card())) == [0.4, 0.9]
    assert metric_values(merge_cards(published.content, card(results=[knn]))) == [0.5, 0.4, 0.9]
    assert metric_values(merge_cards(card(results=[knn]), card(accuracies=(0.1, 0.2)))) == [0.2]
    assert not ModelCard(merge_cards(card(), card(accuracies=()))).data.eval_results


def test_the_base_model_of_earlier_weights_goes():
    warm = card(parts=[{"init_from": {"hub_id": "you/r50"}}], init_from="you/r50", encoder="resnet50")
    other = warm.replace("you/r50", "you/r50-v2")
    for published, new, expected in ((warm, card(), None), (warm, other, "you/r50-v2"), (card(), warm, "you/r50")):
        assert ModelCard(merge_cards(published, new)).data.base_model == expected
    theirs = ModelCard(card())
    theirs.data.base_model = "me/theirs"
    assert ModelCard(merge_cards(theirs.content, card())).data.base_model == "me/theirs"


@pytest.mark.parametrize("published", ["Just words.", "---\nlicense: mit\n---\nwords", "---\nlicense: mit\n---\n", ""])
def test_any_card_may_be_published_already(published):
    merged = merge_cards(published, card())
    text = published.split("---")[-1].strip()
    assert ModelCard(merged).text.strip() == (text or ModelCard(card()).text.strip()), "an empty card gets our text"
    assert ModelCard(merged).data.get("license") == ("mit" if "mit" in published else None)
    assert metric_values(merged) == [0.4]


@pytest.mark.parametrize("published", ["---\n- a list\n---\nwords", "---\nmodel-index: [{name: x}]\n---\n"])
def test_metadata_that_cannot_be_read_are_not_overwritten(published):
    with pytest.raises(ValueError, match=r"dict|model_index"):
        merge_cards(published, card())

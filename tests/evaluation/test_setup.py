import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import write_image, write_parquet
from safetensors.torch import load_file, save_file

from m2t_accel.config.evaluation import build_knn, build_linear_probe
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.evaluation.setup import open_folder, open_on_main, run_once, start_evaluation, write_result
from m2t_accel.hub.encoders import weights_fingerprint
from m2t_accel.model import create_encoder


def test_the_view_is_the_encoders_unless_given(given):
    config = start_evaluation(build_knn(given)).config
    assert (config.image_size, config.evaluation_crop, config.image_mean) == (16, 0.8, (0.4, 0.5, 0.6))
    config = start_evaluation(build_knn({**given, "image_size": 24})).config
    assert (config.image_size, config.evaluation_crop) == (24, 0.8)


def test_random_weights_depend_on_the_seed(given):
    trained = start_evaluation(build_linear_probe({**given, "batch_size": 32})).weights
    found = [
        start_evaluation(build_linear_probe({**given, "batch_size": 32, "random_weights": True, "seed": seed})).weights
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1]
    assert len({trained, *found}) == 3


def test_images_without_labels_or_validation_split_are_refused(given, tmp_path):
    write_image(tmp_path / "plain" / "a.png")
    with pytest.raises(ConfigurationError, match=r"--dataset .*plain .* no labels .*plain: 1 image"):
        start_evaluation(build_knn({**given, "dataset": str(tmp_path / "plain")}))
    write_parquet(tmp_path / "shards" / "train.parquet", 0, 20, row_group_size=5)
    with pytest.raises(ConfigurationError, match=r"--dataset .* no validation split.*--validation_fraction"):
        start_evaluation(build_knn({**given, "dataset": str(tmp_path / "shards"), "validation_fraction": 0}))


def test_damaged_weights_are_refused(given, tmp_path):
    shutil.copytree(given["encoder"], tmp_path / "run")
    weights = tmp_path / "run" / "encoder" / "model.safetensors"
    state = load_file(weights)
    next(tensor for tensor in state.values() if tensor.dim() == 4)[0] = torch.nan
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"--encoder .*run: its features are not finite"):
        start_evaluation(build_knn({**given, "encoder": str(tmp_path / "run")}))


def test_a_fingerprint_of_weights_changes_with_any_of_them():
    encoder = create_encoder("resnet10-quarter")
    name = weights_fingerprint(encoder)
    assert weights_fingerprint(encoder) == name
    with torch.no_grad():
        encoder.embedder.embedder.normalization.running_mean[3] += 1e-6
    assert weights_fingerprint(encoder) != name


def test_a_result_states_its_protocol_and_is_not_measured_again(given, tmp_path, capsys):
    evaluation = start_evaluation(build_knn(given))
    data = {"test": {"images": 21}, "undecodable": 3}
    result = run_once(evaluation, lambda: write_result(evaluation, {"top1_k20": 0.5}, data, 1.25, more="so"))
    assert json.loads((tmp_path / "result" / "result.json").read_text()) == result
    expected = {"k": [20, 200], "temperature": 0.07, "image_size": 16, "more": "so", "network": "teacher"}
    assert {**result["protocol"], **expected, "precision": "float32"} == result["protocol"]
    assert result["dataset_name"] == Path(result["dataset"]).name
    assert set(result["versions"]) >= {"python", "torch", "transformers", "m2t_accel"}
    assert {"hardware", "command", "date", "weights", "data", "seed"} <= result.keys()
    assert f"{given['encoder']}, knn on {given['dataset']}: top1_k20 50.00 % (3 images" in capsys.readouterr().out
    assert run_once(evaluation, lambda: pytest.fail("measured again")) == result


def test_a_repeated_evaluation_is_not_published_over_the_first_one(given, tmp_path):
    evaluation = start_evaluation(build_linear_probe(given))
    open_folder(evaluation._replace(config=dataclasses.replace(evaluation.config, push_to_hub="me/first")))
    assert yaml.safe_load((tmp_path / "result" / "config.yaml").read_text())["push_to_hub"] is None


def test_what_an_evaluation_lacks_is_named_and_written_again(given, tmp_path, capsys):
    evaluation, folder = start_evaluation(build_linear_probe({**given, "batch_size": 32})), tmp_path / "result"

    def measure():
        (folder / "classifier").mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (folder / "classifier" / name).write_text(name)
        (folder / "checkpoint.pt").write_text("not a part of the result")
        return write_result(evaluation, {"top1": 0.5}, {"undecodable": 0}, 1.0, chosen_learning_rate=0.1)

    result = run_once(evaluation, measure)
    assert result["files"] == ["classifier/config.json", "classifier/model.safetensors"]
    for name in ("checkpoint.pt", "config.yaml"):
        (folder / name).unlink()
    other = evaluation._replace(config=dataclasses.replace(evaluation.config, epochs=3))
    with pytest.raises(ConfigurationError, match=r"--output_dir .*differs in epochs"):
        open_folder(other)
    assert not (folder / "config.yaml").exists()
    assert run_once(evaluation, lambda: pytest.fail("measured again")) == result
    assert (folder / "config.yaml").exists()
    (folder / "classifier" / "model.safetensors").unlink()
    capsys.readouterr()
    run_once(evaluation, measure)
    assert f"missing in {folder}: classifier/model.safetensors; the evaluation is repeated" in capsys.readouterr().out
    assert (folder / "classifier" / "model.safetensors").exists()


@pytest.mark.parametrize("change", ["more images", "another test image", "another label"])
def test_the_result_on_other_images_is_not_this_evaluations(given, tmp_path, change):
    folder = tmp_path / "images"
    for split, number in (("train", 6), ("val", 3)):
        for i in range(number):
            write_image(folder / split / "ab"[i % 2] / f"{i}.png", 9 * i)
    given = {**given, "dataset": str(folder)}
    evaluation = start_evaluation(build_knn(given))
    result = run_once(evaluation, lambda: write_result(evaluation, {"top1_k20": 0.5}, {"undecodable": 0}, 1.0))
    assert run_once(start_evaluation(build_knn(given)), lambda: pytest.fail("measured again")) == result
    if change == "more images":
        write_image(folder / "train" / "a" / "6.png")
    elif change == "another test image":
        (folder / "val" / "a" / "0.png").rename(folder / "val" / "a" / "7.png")
    else:
        (folder / "train" / "b" / "1.png").rename(folder / "train" / "a" / "1.png")
    with pytest.raises(ConfigurationError, match=r"--output_dir .*differs in the images or their labels"):
        open_folder(start_evaluation(build_knn(given)))


def test_a_folder_that_holds_something_else_is_refused_and_not_changed(given, tmp_path):
    evaluation = start_evaluation(build_knn(given))
    open_folder(evaluation)
    write_result(evaluation, {"top1_k20": 0.5}, {}, 1.0)
    folder = tmp_path / "result"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    hotter = dataclasses.replace(evaluation.config, temperature=0.1)
    with pytest.raises(ConfigurationError, match=r"--output_dir .*differs in temperature"):
        open_folder(evaluation._replace(config=hotter))
    with pytest.raises(ConfigurationError, match=r"--output_dir .*differs in the encoder's weights"):
        open_folder(evaluation._replace(weights="others"))
    half = SimpleNamespace(mixed_precision="bf16", is_main_process=True)
    with pytest.raises(ConfigurationError, match=r"--output_dir .*differs in precision \(float32, now bf16\):"):
        open_on_main(evaluation._replace(accelerator=half))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    for path, content in before.items():
        path.write_text("[1, 2")
        with pytest.raises(ConfigurationError, match=r"--output_dir .* not an evaluation's"):
            open_folder(evaluation)
        path.write_bytes(content)
    (tmp_path / "file").write_text("")
    below_a_file = evaluation._replace(config=build_knn({**given, "output_dir": str(tmp_path / "file" / "below")}))
    with pytest.raises(ConfigurationError, match=r"--output_dir .* cannot be written"):
        open_folder(below_a_file)

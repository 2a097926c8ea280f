import json

import pytest
import torch
from helpers import write_image, write_parquet

from m2t_accel.config.evaluation import build_knn, build_linear_probe
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.evaluation.setup import in_one_line, open_folder, start_evaluation, write_result
from m2t_accel.hub.encoders import weights_fingerprint
from m2t_accel.model import create_encoder


@pytest.fixture
def given(small_run, small_images):
    return {"encoder": str(small_run), "dataset": str(small_images), "num_workers": 0}


def test_the_view_is_the_encoders_unless_given(given):
    config = start_evaluation(build_knn(given)).config
    assert (config.image_size, config.evaluation_crop, config.image_mean) == (16, 0.8, (0.4, 0.5, 0.6))
    config = start_evaluation(build_knn({**given, "image_size": 24})).config
    assert (config.image_size, config.evaluation_crop) == (24, 0.8)


def test_random_weights_are_those_of_the_seed(given):
    trained = start_evaluation(build_linear_probe({**given, "batch_size": 32})).weights
    found = [
        start_evaluation(build_linear_probe({**given, "batch_size": 32, "random_weights": True, "seed": seed})).weights
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1]
    assert len({trained, *found}) == 3


def test_without_labels_nothing_can_be_measured(given, tmp_path):
    write_image(tmp_path / "plain" / "a.png")
    with pytest.raises(ConfigurationError, match=r"nothing can be measured on .*: it has no labels .*plain: 1 images"):
        start_evaluation(build_knn({**given, "dataset": str(tmp_path / "plain")}))
    write_parquet(tmp_path / "shards" / "train.parquet", 0, 20, row_group_size=5)
    with pytest.raises(ConfigurationError, match=r"has no validation split.*--validation_fraction is 0"):
        start_evaluation(build_knn({**given, "dataset": str(tmp_path / "shards"), "validation_fraction": 0}))


def test_a_fingerprint_of_weights_changes_with_any_of_them():
    encoder = create_encoder("resnet10-quarter")
    name = weights_fingerprint(encoder)
    assert weights_fingerprint(encoder) == name
    with torch.no_grad():
        encoder.embedder.embedder.normalization.running_mean[3] += 1e-6
    assert weights_fingerprint(encoder) != name


def test_a_result_tells_its_protocol(given, small_run):
    evaluation = start_evaluation(build_knn(given))
    assert open_folder(evaluation) is None
    result = write_result(evaluation, {"top1_k20": 0.5}, {"test": {"images": 21}}, 1.25, more="so")
    assert json.loads((small_run / "knn" / "result.json").read_text()) == result
    protocol = result["protocol"]
    assert (protocol["k"], protocol["temperature"], protocol["image_size"], protocol["more"]) == (
        [20, 200],
        0.07,
        16,
        "so",
    )
    assert (protocol["network"], protocol["precision"]) == ("teacher", "float32")
    assert set(result["versions"]) >= {"python", "torch", "transformers", "m2t_accel"}
    assert {"hardware", "command", "date", "weights", "data", "seed"} <= result.keys()
    assert in_one_line(result) == f"{small_run}, knn on {given['dataset']}: top1_k20 50.00 %"
    assert open_folder(evaluation) == result, "the same evaluation again"


def test_a_folder_that_holds_something_else_is_left_alone(given, small_run, tmp_path):
    evaluation = start_evaluation(build_knn(given))
    open_folder(evaluation)
    write_result(evaluation, {"top1_k20": 0.5}, {}, 1.0)
    before = {path: path.read_bytes() for path in (small_run / "knn").iterdir()}
    with pytest.raises(
        ConfigurationError, match=r"holds another evaluation \(another temperature\): give another folder"
    ):
        open_folder(start_evaluation(build_knn({**given, "temperature": 0.1})))
    with torch.no_grad():
        evaluation.encoder.embedder.embedder.convolution.weight += 1
    other = evaluation._replace(weights=weights_fingerprint(evaluation.encoder))
    with pytest.raises(ConfigurationError, match=r"another encoder's weights"):
        open_folder(other)
    assert {path: path.read_bytes() for path in (small_run / "knn").iterdir()} == before
    for name in ("config.yaml", "result.json"):
        (small_run / "knn" / name).write_text("[1, 2")
        with pytest.raises(ConfigurationError, match="that is not an evaluation's: give another folder"):
            open_folder(evaluation)
        (small_run / "knn" / name).write_bytes(before[small_run / "knn" / name])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        open_folder(start_evaluation(build_knn({**given, "output_dir": str(tmp_path / "file" / "below")})))

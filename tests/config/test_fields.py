import dataclasses
import re
from typing import ClassVar

import pytest

from m2t_accel.config.fields import (
    ConfigurationError,
    check_all_limits,
    check_writable,
    convert_all,
    count,
    did_you_mean,
    fields_by_heading,
    is_hub_id,
    one_line,
    plain_text,
    setting,
)
from m2t_accel.config.pretrain import ENCODERS, PretrainConfig
from m2t_accel.config.recipes import RECIPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    constant: ClassVar[bool] = False

    name: str = setting("plain", "a word", choices=("plain", "fancy"))
    number: int | None = setting(None, "a whole number or none", at_least=1, at_most=9)
    rate: float = setting(0.5, "a number", above=0, below=1)
    pair: tuple[float, float] = setting((0.1, 0.2), "two numbers", above=0)
    switch: bool = setting(False, "true or false")
    rates: tuple[float, ...] = setting((0.1,), "numbers", above=0)
    size: tuple[float, float] | None = setting(None, "two numbers, or none")


def build(**given):
    settings = Settings(**convert_all(Settings, given))
    check_all_limits(settings)
    return settings


def test_flags_and_yaml_are_read_in_the_same_way():
    from_flags = build(name="fancy", number="3", rate="1e-2", pair=["1", "2.5"], switch="true")
    from_yaml = build(name="fancy", number=3, rate=0.01, pair=[1, 2.5], switch=True)
    assert from_flags == from_yaml == Settings(name="fancy", number=3, rate=0.01, pair=(1.0, 2.5), switch=True)
    assert build(number="none", size="none") == build(number=None, size=None) == Settings()
    assert build(size=["1", 2]).size == (1.0, 2.0)


@pytest.mark.parametrize("given", ["0.1,2", ["0.1,2"], ["0.1", 2], [0.1, "2"], "0.1 2", " 0.1, 2 "])
def test_a_setting_may_take_any_number_of_values(given):
    assert build(rates=given, pair=given).rates == build(pair=given).pair == (0.1, 2.0)
    assert build(rates=3).rates == (3.0,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nmae": "x"}, "unknown setting nmae, did you mean name?"),
        ({"constant": True}, "unknown setting constant"),
        ({"name": "fanzy"}, "--name fanzy: unknown, did you mean fancy?; one of plain, fancy"),
        ({"name": ""}, "--name is empty"),
        ({"name": "a\0b"}, "--name is empty"),
        ({"number": 1.5}, "--number 1.5: a whole number"),
        ({"number": True}, "--number True: a whole number"),
        ({"number": 10}, "--number 10 is out of range: at most 9"),
        ({"number": 0}, "--number 0 is out of range: at least 1"),
        ({"rate": 1}, "--rate 1 is out of range: less than 1"),
        ({"rate": "nan"}, "--rate nan: not a finite number"),
        ({"pair": [1]}, "--pair 1: 2 numbers"),
        ({"pair": 1}, "--pair 1: 2 numbers"),
        ({"pair": [1, 0]}, "--pair 0 is out of range: more than 0"),
        ({"switch": "yes"}, "--switch yes: true or false"),
        ({"switch": {}}, "--switch {}: true or false"),
        ({"rates": "1,fast"}, "--rates fast: a number"),
        ({"rates": []}, "--rates is empty"),
    ],
)
def test_wrong_values_are_refused(given, message):
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}"):
        build(**given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoreSettings(Settings):
    speed: float = setting(1.0, "a number", heading="training")
    name: str = setting("plain", "a word", choices=("plain", "fancy"), heading="the run")
    seed: int = setting(0, "a whole number")


def test_settings_are_grouped_and_a_class_precedes_its_parents():
    groups = fields_by_heading(MoreSettings)
    names = {heading: [item.name for item in items] for heading, items in groups.items()}
    inherited = ["number", "rate", "pair", "switch", "rates", "size"]
    assert names == {"the run": ["name", "seed"], "training": ["speed"], "": inherited}
    assert next(iter(names)) == "the run"


FLAGS = [f"--{name}" for heading in fields_by_heading(PretrainConfig).values() for name in [f.name for f in heading]]
NEAR = {  # what users type: the flag, recipe or column that they mean
    "--epoch": "--epochs",
    "--datset": "--dataset",
    "--DataSet": "--dataset",
    "--img_sise": "--image_size",
    "--num_worker": "--num_workers",
    "--weigth_decay": "--weight_decay",
    "--wieght_decay": "--weight_decay",
    "--ouput_dir": "--output_dir",
    "--learning_rate": "--learning_rate_per_256",
    "--warmup": "--warmup_epochs",
    "--jitter": "--jitter_probability",
    "--optimizer_type": "--optimizer",
    "--workers": "--num_workers",
    "ResNet5": "resnet50",
    "resnet-50": "resnet50",
    "tensorbord": "tensorboard",
    "8xv100-b1024-100": "8xV100-b1024-100ep",
    "imgae": "image",
    "lable": "label",
}
FAR = [
    *("--fp16", "--mixed_precision", "--resume_from_checkpoints", "--hub_model", "--hub", "--lr", "--tf32"),
    *("--mask_ratio", "--adam_beta1", "--keep_in_memory", "--max_grad", "--verbose", "--device", "--knn", "--ema"),
    *("ImageNet-1k", "vit_base_patch16", "convnext_tiny", "pixels", "caption", ""),
]


@pytest.mark.parametrize("word", [*NEAR, *FAR])
def test_a_word_is_proposed_only_if_it_is_really_near(word):
    words = [*FLAGS, *RECIPES, *ENCODERS, "none", "tensorboard", "image", "label"]
    words = [w for w in words if w.startswith("--") == word.startswith("--")]
    assert did_you_mean(word, words) == (f", did you mean {NEAR[word]}?" if word in NEAR else "")


def test_parts_of_messages():
    assert one_line(ValueError("one\n two.")) == "ValueError: one two"
    assert len(one_line(ValueError("word " * 999))) <= 240
    assert [plain_text(value) for value in ((1, "b"), [0.5], None)] == ["1 b", "0.5", "None"]


def test_the_form_of_a_hub_id():
    assert is_hub_id("ILSVRC/imagenet-1k")
    assert not any(is_hub_id(text) for text in ("imagenet", "../data", "a/b/c", "user/", "/name"))


def test_a_noun_agrees_with_its_number():
    assert [count(number, "image") for number in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert count(2, "class") == "2 classes"


@pytest.mark.parametrize("path", [".", "nowhere/figures.json"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    check_writable("json", None)
    check_writable("json", "figures.json")
    with pytest.raises(ConfigurationError, match=f"--json {path}"):
        check_writable("json", path)

import pytest

from m2t_accel.config.data import TrainingSettings, check_enough_images, check_num_processes, public_name
from m2t_accel.config.fields import ConfigurationError


def settings(**given):
    return TrainingSettings(**{"dataset": "digits", "batch_size": 256, "device_batch_size": 32, **given})


def test_a_batch_is_one_virtual_device_by_default():
    assert settings().num_virtual_devices == 8
    assert settings(device_batch_size=None).num_virtual_devices == 1
    assert settings(device_batch_size=None).device_batch_size == 256


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": None}, "--dataset is needed"),
        ({"crop_scale": (0.9, 0.8)}, "--crop_scale 0.9 0.8: the first must not exceed"),
        ({"crop_ratio": (1.2, 0.8)}, "--crop_ratio 1.2 0.8: the first must not exceed"),
        ({"device_batch_size": 24}, "use --batch_size 240 or 264, or --device_batch_size 16"),
        ({"image_column": "x", "label_column": "x"}, "--label_column are both x"),
    ],
)
def test_settings_that_contradict_each_other(given, message):
    with pytest.raises(ConfigurationError) as caught:
        settings(**given)
    assert message in str(caught.value)


def test_the_processes_must_divide_the_batch():
    config = settings()
    for number in (1, 2, 4, 8):
        check_num_processes(config, number)
    with pytest.raises(ConfigurationError, match=r"use 1, 2, 4, 8 processes, or --batch_size 192 or 288$"):
        check_num_processes(config, 3)
    with pytest.raises(ConfigurationError, match=r"or --batch_size 512, or --device_batch_size 16$"):
        check_num_processes(config, 16)


def test_there_must_be_images_for_a_batch():
    check_enough_images(256, settings())
    with pytest.raises(ConfigurationError, match=r"13 images .* --batch_size 12 --device_batch_size 12"):
        check_enough_images(13, settings())
    with pytest.raises(ConfigurationError, match="--dataset digits has one image"):
        check_enough_images(1, settings())


@pytest.mark.parametrize(
    ("dataset", "name"),
    [("digits", "digits"), ("data/cats", "cats"), ("data/cats/", "cats"), (".", "home"), ("me/birds", "me/birds")],
)
def test_the_name_of_a_dataset_tells_a_folder_from_the_hub(tmp_path, monkeypatch, dataset, name):
    (tmp_path / "home" / "data" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    assert public_name(dataset) == name
    assert public_name(str(tmp_path / "home")) == "home"

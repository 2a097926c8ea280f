import pytest

from m2t_accel.config.data import TrainingSettings, check_enough_images, check_num_processes
from m2t_accel.config.fields import ConfigurationError


def settings(**given):
    return TrainingSettings(**{"dataset": "digits", "batch_size": 256, "device_batch_size": 32, **given})


def test_a_batch_is_one_virtual_device_unless_said_otherwise():
    assert settings().num_virtual_devices == 8
    assert settings(device_batch_size=None).num_virtual_devices == 1
    assert settings(device_batch_size=None).device_batch_size == 256


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": None}, "--dataset is needed: a folder of class folders"),
        ({"crop_ratio": (1.2, 0.8)}, "--crop_ratio 1.2 0.8: the first must not exceed the second"),
        ({"device_batch_size": 24}, "use --batch_size 240 or 264, or --device_batch_size 16"),
        ({"image_column": "x", "label_column": "x"}, "they must differ"),
    ],
)
def test_what_does_not_fit(given, message):
    with pytest.raises(ConfigurationError) as caught:
        settings(**given)
    assert message in str(caught.value)


def test_processes_that_do_not_divide_the_batch():
    config = settings()
    for number in (1, 2, 4, 8):
        check_num_processes(config, number)
    with pytest.raises(ConfigurationError) as caught:
        check_num_processes(config, 3)
    assert str(caught.value) == (
        "3 processes cannot share --batch_size 256 in sub-batches of --device_batch_size 32: use 1, 2, 4, 8 "
        "processes, or --batch_size 192 or 288"
    )
    with pytest.raises(ConfigurationError, match=r"or --batch_size 512, or --device_batch_size 16$"):
        check_num_processes(config, 16)


def test_fewer_images_than_a_batch():
    check_enough_images(256, settings())
    with pytest.raises(ConfigurationError, match=r"has 13 images .* --batch_size 12 --device_batch_size 12 or smaller"):
        check_enough_images(13, settings())
    with pytest.raises(ConfigurationError, match="has one image to train on: two are the least"):
        check_enough_images(1, settings())

import pytest

from m2t_accel.data import splits


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("validation-00.parquet", "validation"),
        ("data/validation_0.parquet", "validation"),
        ("validation.00.parquet", "validation"),
        ("val/0000.tar", "val"),
        ("train-test-split/train-0.parquet", "train"),
        ("train-test-split/test-0.parquet", "test"),
        ("train-test-split/0.parquet", "train"),
        ("test/train/0.parquet", "train"),
        ("a.parquet", "train"),
        ("contest/latest.parquet", "train"),
    ],
)
def test_the_innermost_name_decides_the_split(path, split):
    assert splits.old_split_of(path) == split


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (["test", "train", "validation"], ["train", "validation"]),
        (["train", "test"], ["train", "test"]),
        (["test"], ["test"]),
        (["images", "val"], ["images", "val"]),
        (["unsupervised", "train"], ["train"]),
    ],
)
def test_one_split_to_train_on_and_one_to_validate(names, used):
    assert splits.used_splits(names) == used

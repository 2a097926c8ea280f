import pytest
from helpers import settings

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import splits


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("validation-00.parquet", "validation"),
        ("data/validation_0.parquet", "validation"),
        ("validation.00.parquet", "validation"),
        ("val/0000.tar", "validation"),
        ("train-test-split/train-0.parquet", "train"),
        ("train-test-split/test-0.parquet", "test"),
        ("train-test-split/0.parquet", ""),
        ("test/train/0.parquet", "train"),
        ("a.parquet", ""),
        ("contest/latest.parquet", ""),
        ("dev-00000-of-00001.parquet", "validation"),
        ("eval.parquet", "heldout"),
        ("train2017/0.tar", "train"),
        ("val2017.tar", "validation"),
        ("ILSVRC2012_img_train.tar", "train"),
        ("imagenet1k-validation-00.tar", "validation"),
        ("TrainImages/0.tar", "train"),
        ("testset0.parquet", "test"),
        ("Trainval-1.tar", "train"),
        ("holdout 1.parquet", "heldout"),
        ("constrained/restrain.parquet", ""),
    ],
)
def test_the_innermost_name_decides_the_split(path, split):
    assert splits.split_of_path(path) == split


@pytest.mark.parametrize(
    ("name", "siblings", "split"),
    [
        ("train", [], "train"),
        ("Training_Images", [], "train"),
        ("val2017", [], "validation"),
        ("freight_train", ["bus"], ""),
        ("test_tube", ["beaker"], ""),
        ("ILSVRC2012_img_train", ["ILSVRC2012_img_val"], "train"),
        ("ILSVRC2012_img_val", ["ILSVRC2012_img_train"], "validation"),
        ("freight_train", ["ICE_val", "bus"], ""),
        ("train_mini", ["public_test"], "train"),
        ("public_test", ["train_mini"], "test"),
        ("train_mini", ["train", "public_test"], ""),
        ("public_test", ["private_test"], ""),
    ],
)
def test_a_folder_with_another_word_may_be_a_class(name, siblings, split):
    assert splits.split_of_folder(name, [name, *siblings]) == split


@pytest.mark.parametrize(
    ("names", "flags", "used"),
    [
        (["test", "train", "validation"], {}, ("train", "validation", ["test"])),
        (["train", "test"], {}, ("train", "test", [])),
        (["test"], {}, ("test", None, [])),
        (["images", "val"], {}, ("images", "val", [])),
        (["unsupervised", "train"], {}, ("train", None, ["unsupervised"])),
        (["train_small", "train", "dev"], {}, ("train", "dev", ["train_small"])),
        (["eval", "test", "train"], {}, ("train", "eval", ["test"])),
        (["train", "unsupervised", "test"], {"train_split": "unsupervised"}, ("unsupervised", "test", ["train"])),
        (["train", "val", "test"], {"validation_split": "test"}, ("train", "test", ["val"])),
        (["a", "b"], {"train_split": "a", "validation_split": "b"}, ("a", "b", [])),
        (["a", "b"], {"validation_split": "b"}, ("a", "b", [])),
    ],
)
def test_one_split_to_train_on_and_one_to_validate(names, flags, used):
    assert splits.choose_splits(names, settings("somewhere/else", **flags)) == used


@pytest.mark.parametrize(
    ("names", "flags", "message"),
    [
        (["val", "test"], {}, "--dataset .* has the splits test, val, and none is called train: .*--train_split"),
        (["a", "b"], {}, "has the splits a, b, and none is called train"),
        (["train", "test"], {"train_split": "trian"}, "--train_split trian: .* did you mean train?.* train, test"),
        (["train"], {"validation_split": "val"}, "--validation_split val: .* it has train"),
    ],
)
def test_a_split_that_cannot_be_chosen(names, flags, message):
    with pytest.raises(ConfigurationError, match=message):
        splits.choose_splits(names, settings("somewhere/else", **flags))


def test_files_of_a_split_that_a_flag_names():
    files = ["extra/0.tar", "train/0.tar", "train-extra-1.tar", "val.tar"]
    assert splits.group_files(files, settings("a/b", train_split="extra")) == {
        "extra": ["extra/0.tar", "train-extra-1.tar"],
        "train": ["train/0.tar"],
        "validation": ["val.tar"],
    }

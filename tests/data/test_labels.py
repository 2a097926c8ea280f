import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from helpers import encoded, settings

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.labels import standard_columns


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        ({"image": "x"}, {"image_column": "imgae"}, "--image_column imgae: no such column, did you mean image"),
        ({"image": "x"}, {"label_column": "kind"}, "--label_column kind: no such column; there are image"),
        ({"words": "x"}, {}, "no column of images; name one of words with --image_column"),
        ({"words": 3}, {"image_column": "words"}, "--image_column words: not a column of images"),
        ({"image": "x", "label": 0.5}, {"label_column": "label"}, "--label_column label: not class labels"),
    ],
)
def test_columns_that_are_not_there_or_not_right(columns, given, message):
    split = Dataset.from_dict({name: [value] * 8 for name, value in columns.items()})
    with pytest.raises(ConfigurationError, match=message):
        standard_columns({"train": split}, settings("digits", **given), [])


def labelled_splits(train, validation, feature=None):
    feature = feature or Value("string" if isinstance(train[0], str) else "int64")
    return {
        name: Dataset.from_dict(
            {"image": encoded(0, len(labels)), "label": labels}, features=Features({"image": Image(), "label": feature})
        )
        for name, labels in (("train", train), ("test", validation))
    }


def test_words_mean_the_same_class_in_every_split():
    splits = standard_columns(labelled_splits(["b", "c", "a", "c"], ["c", "b"]), settings("digits"), [])
    assert splits["train"].features["label"].names == splits["test"].features["label"].names == ["a", "b", "c"]
    assert (splits["train"]["label"][:], splits["test"]["label"][:]) == ([1, 2, 0, 2], [2, 1])


def test_a_word_that_only_validation_has_is_an_error():
    with pytest.raises(ConfigurationError, match="the label z of the validation split is not among"):
        standard_columns(labelled_splits(["a", "b"], ["z"]), settings("digits"), [])


@pytest.mark.parametrize("withheld", [[-1, -1], [None, None]])
def test_withheld_labels_are_no_labels(withheld):
    splits = standard_columns(
        labelled_splits([0, 1, 0], withheld, ClassLabel(names=["a", "b"])), settings("digits"), []
    )
    assert "label" in splits["train"].features
    assert "label" not in splits["test"].features


def test_missing_words_are_no_class():
    word = standard_columns(labelled_splits(["b", "None", "a"], ["None"]), settings("digits"), [])
    assert word["train"].features["label"].names == ["None", "a", "b"]
    splits = labelled_splits(["b", None, "a"], ["a"])
    assert "label" not in standard_columns(splits, settings("digits"), [])["train"].features
    with pytest.raises(
        ConfigurationError, match=r"--label_column label: not class labels for all images \(some are miss"
    ):
        standard_columns(splits, settings("digits", label_column="label"), [])


def test_numbers_that_are_no_classes_are_no_labels():
    splits = standard_columns(labelled_splits([20_000_001, 7, 9], [5]), settings("digits"), [])
    assert list(splits["train"].features) == ["image"]

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from helpers import encoded, load, write_parquet, write_table

from m2t_accel.config.fields import ConfigurationError

CLASSES = ClassLabel(names=["even", "odd"])


# Labels of the training split, of the validation split, and their types; the answer: the class names and the numbers of
# the validation labels, or a word of the error, or None where the validation split has no labels.
LABELS = {
    "words": (["b", "c", "a"], ["c", "b"], None, (["a", "b", "c"], [2, 1])),
    "a word None": (["b", "None"], ["None", "b"], None, (["None", "b"], [0, 1])),
    "words in another order": (["a", "b"], ["b", "b"], None, (["a", "b"], [1, 1])),
    "an unknown word": (["a", "b"], ["a", "z"], None, "label z .*--label_column"),
    "unknown words alone": (["a", "b"], ["z", "z"], None, "label z .*--label_column"),
    "numbers": ([0, 1], [1, 1], None, (["0", "1"], [1, 1])),
    "numbers with a gap": ([0, 3, 0, 3], [3, 0], None, (["0", "1", "2", "3"], [3, 0])),
    "an unknown number": ([0, 1], [1, 2], None, "label 2 .*--label_column"),
    "booleans": ([True, False], [True, True], "bool", (["False", "True"], [1, 1])),
    "class labels": ([0, 1], [1, 1], CLASSES, (["even", "odd"], [1, 1])),
    "a withheld number": ([0, 1], [-1, -1], None, None),
    "a withheld class label": ([0, 1], [-1, -1], CLASSES, None),
    "a missing class label": ([0, 1], [None, 1], CLASSES, None),
    "a missing word": (["a", "b"], ["a", None], None, None),
    "no column": (["a", "b"], None, None, None),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", LABELS)
def test_labels_of_both_splits(tmp_path, case, streaming):
    """Without validation labels, a fifth of the training images is held out: 8 of 40."""
    train, validation, kind, answer = LABELS[case]
    if kind is None:
        kind = Value("string" if isinstance(train[0], str) else "int64")
    elif isinstance(kind, str):
        kind = Value(kind)
    for name, number, labels in (("train", 40, train), ("val", 4, validation)):
        columns, features = {"image": encoded(0, number)}, {"image": Image()}
        if labels is not None:
            columns["label"], features["label"] = (labels * number)[:number], kind
        split = Dataset.from_dict(columns, features=Features(features))
        split.to_parquet(tmp_path / f"{name}.parquet", batch_size=4)
    given = {"streaming": streaming, "validation_fraction": 0.2}
    if isinstance(answer, str):
        with pytest.raises(ConfigurationError, match=f"{answer}, or type --evaluate_every 0"):
            load(tmp_path, **given)
        assert len(load(tmp_path, **given, evaluate_every=0).train) == 40
        return
    images = load(tmp_path, **given)
    if answer is None:
        assert (len(images.train), len(images.validation)) == (32, 8)
    else:
        assert (images.class_names, images.validation["label"][:]) == (answer[0], (answer[1] * 4)[:4])
        assert len(images.train) == 40


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([0, None, 1, 0], "some are missing or negative"),
        ([0, -1, 1, 0], "some are missing or negative"),
        (["b", None, "a", "a"], "some are missing or negative"),
        ([20_000_001, 7, 9, 9], "numbers up to 20,000,001"),
        ([0.5, 1.0, 0.0, 0.0], "float64, which pandas"),
        ([[0], [1], [1], [0]], "the values are lists of int64"),
        ([{"id": 0}] * 4, "the values are structs of id"),
    ],
)
def test_labels_that_are_not_classes(tmp_path, labels, reason, streaming):
    """The note says why there are no labels; if --label_column asks for them, an error does."""
    write_table(tmp_path / "a.parquet", image=encoded(0, 4), label=labels)
    images = load(tmp_path, streaming=streaming)
    assert (len(images.train), images.bank, images.validation) == (4, None, None)
    assert "no labels, because" in images.note
    assert reason in images.note
    assert images.lacks.endswith(f"found: {images.note}")
    with pytest.raises(ConfigurationError, match="--label_column label: ") as caught:
        load(tmp_path, streaming=streaming, label_column="label")
    assert reason in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_withheld_class_labels_of_training_images(tmp_path, streaming):
    features = Features({"image": Image(), "label": CLASSES})
    rows = {"image": encoded(0, 4), "label": [-1] * 4}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    images = load(tmp_path, streaming=streaming)
    assert (len(images.train), images.bank, images.class_names) == (4, None, None)
    assert "no labels, because" in images.note


def test_streamed_class_labels_with_a_validation_split_of_plain_numbers(tmp_path):
    write_parquet(tmp_path / "train.parquet", 0, 8, row_group_size=4)
    write_table(tmp_path / "val.parquet", image=encoded(0, 4), label=[1, 0, 1, 1])
    images = load(tmp_path, streaming=True)
    assert images.class_names == ["even", "odd"]
    assert images.validation["label"][:] == [1, 0, 1, 1]
    write_table(tmp_path / "val.parquet", image=encoded(0, 4), label=[1, 0, 1, 2])
    with pytest.raises(ConfigurationError, match=r"label 2 .*--label_column"):
        load(tmp_path, streaming=True)


def test_a_number_is_never_taken_for_the_place_of_a_word(tmp_path):
    write_table(tmp_path / "train.parquet", image=encoded(0, 4), label=["a", "b", "a", "b"])
    write_table(tmp_path / "val.parquet", image=encoded(0, 4), label=[1, 0, 1, 1])
    with pytest.raises(ConfigurationError, match=r"label 0 .*--label_column"):
        load(tmp_path, streaming=True)

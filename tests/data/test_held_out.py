import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from helpers import encoded, load, pixel, write_parquet, write_table
from pyarrow import parquet

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import held_out
from m2t_accel.data.decode import decode_image
from m2t_accel.data.parquet import ParquetShards


def test_the_choice_of_held_out_images_never_changes(image_net):
    """Neither the seed of a run nor a new version may change it, or results could not be compared."""
    for seed in (0, 1):
        images = load(image_net / "train", validation_fraction=0.34, seed=seed, batch_size=2)
        train, validation = (
            [row["path"].rpartition("/")[2] for row in part["image"]] for part in (images.train, images.validation)
        )
        assert validation == ["n01_2.JPEG", "n01_4.JPEG", "n02_1.JPEG", "n02_3.JPEG"]
        assert len(train) == 8
        assert not set(train) & set(validation)
    images = load(image_net / "val", validation_fraction=0.34, batch_size=2)
    assert (len(images.train), len(images.validation)) == (4, 2)


@pytest.mark.parametrize("given", [{"validation_fraction": 0}, {"evaluate_every": 0}])
def test_no_image_is_held_out_unless_it_is_used(image_net, given):
    images = load(image_net / "train", **given)
    assert images.validation is None
    assert len(images.train) == 12


def test_without_evaluation_streaming_holds_no_image_in_memory(tmp_path, monkeypatch):
    for name in ("train", "val"):
        write_parquet(tmp_path / f"{name}.parquet", 0, 100, row_group_size=10)
    assert load(tmp_path, streaming=True).validation is not None
    monkeypatch.setattr(ParquetShards, "dataset", None)  # the method that would read them
    images = load(tmp_path, streaming=True, evaluate_every=0)
    assert (len(images.train), images.bank, images.validation) == (100, None, None)
    assert "kNN" not in images.note


@pytest.mark.parametrize("name", ["label", "species"])
@pytest.mark.parametrize("kind", [ClassLabel(names=["even", "odd"]), Value("string")], ids=["class", "word"])
def test_no_row_group_is_held_out_if_all_are_too_large(tmp_path, name, kind):
    features = Features({"image": Image(), name: kind})
    rows = Dataset.from_dict({"image": encoded(0, 100), name: ["even", "odd"] * 50}, features)
    parquet.write_table(rows.with_format("arrow")[:], tmp_path / "train.parquet", row_group_size=50)
    images = load(tmp_path, streaming=True)
    assert images.class_names == ["even", "odd"]
    assert (len(images.train), images.validation) == (100, None)
    assert "smallest row group has 50 images, more than the 10 wanted: write smaller row groups" in images.note
    assert "every row group is too large" in images.lacks
    assert list(images.bank.features) == ["label"]  # the images would only take memory, in each process
    assert images.bank["label"][:] == [0, 1] * 25 * 2
    assert "kNN" not in images.note


def test_a_part_of_a_row_group_of_any_size_is_held_in_memory(tmp_path, monkeypatch):
    """A row group may have more than 2 GB, which Arrow cannot return in one piece."""
    monkeypatch.setattr(held_out, "MAX_STREAMED_BANK", 20)
    monkeypatch.setattr(held_out, "MAX_STREAMED_QUERIES", 30)
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", None)
    write_parquet(tmp_path / "train.parquet", 0, 200, row_group_size=200)
    write_parquet(tmp_path / "val.parquet", 200, 30, row_group_size=30)
    images = load(tmp_path, streaming=True)
    assert len(images.train) == 200
    bank = [pixel(images.bank, i) for i in range(20)]
    assert bank == sorted(set(bank))
    assert bank[0] < 50 < 150 < bank[-1] < 200
    assert [pixel(images.validation, i) for i in range(30)] == list(range(200, 230))
    assert "kNN compares with 20 of" in images.note


def test_streaming_holds_out_whole_row_groups(tmp_path):
    write_parquet(tmp_path / "all.parquet", 0, 100, row_group_size=10)
    images = load(tmp_path, streaming=True, validation_fraction=0.2)
    assert (len(images.train), len(images.validation)) == (80, 20)
    assert images.train.piece_sizes.tolist() == [10, 10, 10, 0, 10, 10, 0, 10, 10, 10]
    seen = {
        decode_image(row)[0, 0, 0]
        for piece, size in enumerate(images.train.piece_sizes)
        for row in images.train.open(piece)(0, size)[1]
    }
    others = {pixel(images.validation, i) for i in range(20)}
    assert len(seen) == 80
    assert len(others) == 20
    assert not seen & others
    assert "evaluation on 20 others (held out of the training images)" in images.note


def test_unequal_row_groups_do_not_hold_out_nearly_all_images(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 105, row_group_size=100)
    images = load(tmp_path, streaming=True)
    assert (len(images.train), len(images.validation)) == (100, 5)


@pytest.mark.parametrize(
    ("sizes", "num_images", "pieces"),
    [
        ([10] * 4, 40, [0, 1, 2, 3]),
        ([10] * 10, 20, [3, 6]),
        ([0, 10, 0, 10, 10], 10, [3]),
        ([100, 5], 10, [1]),
        ([100, 50], 10, []),
    ],
)
def test_pieces_are_spread_evenly(sizes, num_images, pieces):
    assert held_out.spread_pieces(np.array(sizes, np.int32), num_images).tolist() == pieces


def test_both_parts_of_a_split_read_the_column_that_the_flag_names(tmp_path):
    rows = {"image": encoded(0, 40), "mask": encoded(60, 40), "label": [i % 2 for i in range(40)]}
    features = Features({"image": Image(), "mask": Image(), "label": Value("int64")})
    table = Dataset.from_dict(rows, features=features).with_format("arrow")[:]
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    images = load(tmp_path, streaming=True, image_column="mask", validation_fraction=0.2)
    assert len(images.validation) < len(images.train) < 40
    samples, found = images.train.open(0)(0, 5)
    assert [decode_image(row)[0, 0, 0] for row in found] == (60 + samples).tolist()
    assert pixel(images.validation, 0) >= 60


@pytest.mark.parametrize("sorted_by_class", [True, False])
@pytest.mark.parametrize("words", [True, False])
def test_the_classes_are_those_of_all_rows(tmp_path, sorted_by_class, words, monkeypatch):
    """The images in memory may show only some of the classes."""
    monkeypatch.setattr(held_out, "MAX_STREAMED_BANK", 20)
    labels = [i // 10 if sorted_by_class else i % 10 for i in range(100)]
    labels = [f"c{label}" for label in labels] if words else labels
    write_table(tmp_path / "a.parquet", row_group_size=10, image=encoded(0, 100), label=labels)
    images = load(tmp_path, streaming=True)
    assert images.class_names == [f"c{i}" if words else str(i) for i in range(10)]
    assert (len(images.train), len(images.bank), len(images.validation)) == (90, 20, 10)
    assert "kNN compares with 20 of" in images.note


def test_a_streamed_column_must_hold_images(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 20, row_group_size=5)
    with pytest.raises(
        ConfigurationError, match=r"--image_column label: .* class labels; --image_column may name image"
    ):
        load(tmp_path, streaming=True, image_column="label", label_column="image")


def test_both_streamed_splits_need_the_column_of_images(tmp_path):
    write_parquet(tmp_path / "train.parquet", 0, 8, row_group_size=4)
    write_table(tmp_path / "val.parquet", img=encoded(0, 4), label=[1, 0, 1, 1])
    with pytest.raises(ConfigurationError, match=r"--dataset .* no column image, .* but img, label"):
        load(tmp_path, streaming=True)

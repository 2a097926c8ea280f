import pytest
from datasets import Dataset, Features, Image, Value
from helpers import encoded, pixel, settings, write_parquet
from pyarrow import parquet

from m2t_accel.data import held_out, sources
from m2t_accel.data.decode import decode_image


@pytest.mark.parametrize("alone", ["train", "val"])
def test_one_split_alone_holds_out_a_part_that_no_seed_changes(image_net, alone):
    found = []
    for seed in (0, 1):
        images = sources.load_images(settings(image_net / alone, validation_fraction=0.34, seed=seed, batch_size=2))
        paths = [[row["path"] for row in part["image"]] for part in (images.train, images.validation)]
        assert not set(paths[0]) & set(paths[1])
        number = {"train": 12, "val": 6}[alone]
        assert len(paths[0]) + len(paths[1]) == number
        assert len(paths[1]) == round(0.34 * number)
        found.append(paths)
    assert found[0] == found[1]


@pytest.mark.parametrize("wish", [{"validation_fraction": 0}, {"evaluate_every": 0}])
def test_nothing_is_held_out_when_not_wanted(image_net, wish):
    images = sources.load_images(settings(image_net / "train", **wish))
    assert images.validation is None
    assert len(images.train) == 12


def test_streaming_holds_no_image_in_memory_for_a_run_without_evaluation(tmp_path, monkeypatch):
    for name in ("train", "val"):
        write_parquet(tmp_path / f"{name}.parquet", 0, 100, row_group_size=10)
    assert sources.load_images(settings(tmp_path, streaming=True)).validation is not None
    monkeypatch.setattr(sources.ParquetShards, "dataset", None)  # what would read them
    images = sources.load_images(settings(tmp_path, streaming=True, evaluate_every=0))
    assert (len(images.train), images.bank, images.validation) == (100, None, None)
    assert "kNN" not in images.note


def test_shards_of_which_none_can_be_held_out(tmp_path):
    write_parquet(tmp_path / "train.parquet", 0, 100, row_group_size=50)
    images = sources.load_images(settings(tmp_path, streaming=True))
    assert (len(images.train), images.validation) == (100, None)
    assert "no image is held out, because the smallest row group has 50, more than the 10 wanted" in images.note
    assert "no row group is so small" in images.lacks


def test_streamed_images_are_held_out_piece_by_piece(tmp_path):
    write_parquet(tmp_path / "all.parquet", 0, 100, row_group_size=10)
    images = sources.load_images(settings(tmp_path, streaming=True, validation_fraction=0.2))
    assert (len(images.train), len(images.validation)) == (80, 20)
    assert sorted(images.train.piece_sizes.tolist()) == [0, 0, *[10] * 8]
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


def test_streamed_images_of_another_column_are_held_out(tmp_path):
    """The held-out part and the rest must both read the column that is meant, not one called `image`."""
    rows = {"image": encoded(0, 100)[:40], "mask": encoded(0, 100)[60:], "label": [i % 2 for i in range(40)]}
    features = Features({"image": Image(), "mask": Image(), "label": Value("int64")})
    table = Dataset.from_dict(rows, features=features).with_format("arrow")[:]
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    images = sources.load_images(settings(tmp_path, streaming=True, image_column="mask", validation_fraction=0.2))
    assert len(images.validation) < len(images.train) < 40
    samples, found = images.train.open(0)(0, 5)
    assert [decode_image(row)[0, 0, 0] for row in found] == (60 + samples).tolist()
    assert pixel(images.validation, 0) >= 60


@pytest.mark.parametrize("sorted_by_class", [True, False])
@pytest.mark.parametrize("words", [True, False])
def test_streamed_labels_are_those_of_all_rows(tmp_path, sorted_by_class, words, monkeypatch):
    """Also where the images in memory show only some of the classes."""
    monkeypatch.setattr(held_out, "MAX_STREAMED_BANK", 20)
    labels = [i // 10 if sorted_by_class else i % 10 for i in range(100)]
    rows = {"image": encoded(0, 100), "label": [f"c{label}" for label in labels] if words else labels}
    features = Features({"image": Image(), "label": Value("string" if words else "int64")})
    parquet.write_table(
        Dataset.from_dict(rows, features=features).with_format("arrow")[:], tmp_path / "a.parquet", row_group_size=10
    )
    images = sources.load_images(settings(tmp_path, streaming=True))
    assert images.class_names == [f"c{i}" if words else str(i) for i in range(10)]
    assert (len(images.train), len(images.bank), len(images.validation)) == (90, 20, 10)


def test_labels_that_are_none_hold_nothing_out(tmp_path):
    rows = {"image": encoded(0, 40), "label": [None, *range(39)]}
    features = Features({"image": Image(), "label": Value("int64")})
    parquet.write_table(
        Dataset.from_dict(rows, features=features).with_format("arrow")[:], tmp_path / "a.parquet", row_group_size=5
    )
    images = sources.load_images(settings(tmp_path, streaming=True))
    assert (len(images.train), images.bank, images.validation) == (40, None, None)


def test_pieces_of_unequal_size_do_not_hold_out_nearly_all(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 105, row_group_size=100)
    images = sources.load_images(settings(tmp_path, streaming=True))
    assert (len(images.train), len(images.validation)) == (100, 5)

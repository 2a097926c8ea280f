import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from helpers import encoded, load, settings, write_deep_images, write_image, write_tar
from pyarrow import parquet

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.doctor import images
from m2t_accel.doctor.findings import BAD, DOUBTFUL, GOOD


def marks(findings):
    return [finding.mark for finding in findings]


def folder_of_images(folder, good, broken, size=(12, 10)):
    """Write images of two classes, of which `broken` are cut."""
    for i in range(good + broken):
        path = folder / "ab"[i % 2] / f"{i:03}.png"
        write_image(path, value=i % 256, size=size)
        if i >= good:
            path.write_bytes(path.read_bytes()[:40])
    return folder


def examine_damage(folder, **others):
    config = settings(folder, **others)
    data = load(folder, **others)
    return list(images.check_damage(config, data, images.decode_sample(data.train, config.max_image_pixels)))


def test_a_folder_with_half_the_images_broken_is_bad_and_they_are_named(tmp_path):
    (finding,) = examine_damage(folder_of_images(tmp_path, 30, 30), validation_fraction=0)
    assert finding.mark == BAD
    assert finding.text.startswith("30 of 60 images cannot be decoded: ")
    assert "030.png (" in finding.text
    assert finding.text.count(".png") == 3
    assert "and 27 more; the run would stop at 11" in finding.text
    assert finding.text.endswith("--max_bad_fraction 0.6")
    # With this flag it would not.
    assert marks(examine_damage(tmp_path, validation_fraction=0, max_bad_fraction=0.6)) == [DOUBTFUL]


def test_few_broken_images_are_doubtful_and_none_is_good(tmp_path):
    (finding,) = examine_damage(folder_of_images(tmp_path / "few", 57, 3))
    assert (finding.mark, "allows 10 in all" in finding.text) == (DOUBTFUL, True)
    assert marks(examine_damage(folder_of_images(tmp_path / "none", 20, 0))) == [GOOD]


def test_a_share_is_only_bad_if_the_sample_proves_it(tmp_path):
    config = settings(folder_of_images(tmp_path, 20, 0), max_bad_fraction=0.01)
    data = load(tmp_path)
    big = images.Sample(np.ones((200, 2), np.int64), [("x.png", "empty")] * 2, 200, is_everything=False)
    assert marks(images.check_damage(config, data, big)) == [DOUBTFUL]


def test_the_sample_is_spread_and_the_same_each_time(tmp_path):
    train = load(folder_of_images(tmp_path, 100, 0), evaluate_every=0).train
    samples, rows = images.choose_images(train, 10)
    assert [sample // 10 for sample in samples] == list(range(10))
    assert samples == images.choose_images(train, 10)[0]
    assert samples != images.choose_images(train, 10, seed=1)[0]
    assert len(rows) == 10


def test_too_few_images_for_a_batch_are_bad(tmp_path):
    config = settings(folder_of_images(tmp_path, 8, 0), batch_size=64)
    assert list(images.check_held_out(config, load(tmp_path))) == []
    with pytest.raises(ConfigurationError, match="--batch_size"):
        list(images.check_found(config, load(tmp_path)))


def test_unbalanced_classes_are_doubtful(tmp_path):
    for i in range(24):
        write_image(tmp_path / ("cat" if i < 22 else "dog") / f"{i}.png")
    data = load(tmp_path, evaluate_every=0)
    (finding,) = images.check_classes(data)
    assert finding.mark == DOUBTFUL
    assert "2 classes of 2 to 22 images; cat is the largest, dog the smallest" in finding.text


def test_what_is_held_out_is_said(tmp_path):
    config, data = settings(folder_of_images(tmp_path, 20, 0)), load(tmp_path)
    (finding,) = images.check_held_out(config, data)
    assert finding == (GOOD, "held out", "2 images for kNN every epoch")
    assert marks(images.check_held_out(settings(tmp_path, evaluate_every=0), data)) == [DOUBTFUL]


@pytest.mark.parametrize(("size", "mark"), [((200, 200), GOOD), ((20, 20), DOUBTFUL)])
def test_views_that_enlarge_most_images_are_doubtful(tmp_path, size, mark):
    config = settings(folder_of_images(tmp_path, 10, 0, size), image_size=64, crop_scale=(0.08, 1.0))
    sample = images.decode_sample(load(tmp_path).train, config.max_image_pixels)
    (finding,) = images.check_sizes(config, sample)
    assert finding.mark == mark
    assert ("--image_size 32" in finding.text) == (mark == DOUBTFUL)


@pytest.mark.parametrize(("largest", "found"), [(1023, [DOUBTFUL]), (65535, [])])
def test_images_of_10_bits_in_16_are_doubtful(tmp_path, largest, found):
    write_deep_images(tmp_path / "images", largest)
    sample = images.decode_sample(load(tmp_path / "images").train, 10_000)
    assert marks(images.check_values(sample)) == found


def test_the_enlargement_of_a_recipe_for_its_own_images_is_meant():
    config = settings("digits")
    sample = images.Sample(np.full((5, 2), 8), [], 5, False)
    (finding,) = images.check_sizes(config, sample)
    assert (finding.mark, "as this recipe intends" in finding.text) == (GOOD, True)


def write_classes(path, labels, row_group_size):
    names = [f"class {i}" for i in range(max(labels) + 1)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = encoded(0, 1) * len(labels)
    table = Dataset.from_dict({"image": rows, "label": labels}, features=features).with_format("arrow")[:]
    parquet.write_table(table, path, row_group_size=row_group_size)


SORTED = sorted(list(range(20)) * 40)
SHUFFLED = np.random.default_rng(0).permutation(SORTED).tolist()


@pytest.mark.parametrize(("labels", "mark"), [(SORTED, DOUBTFUL), (SHUFFLED, GOOD)], ids=["sorted", "shuffled"])
def test_shards_sorted_by_class_are_doubtful(tmp_path, monkeypatch, labels, mark):
    """The estimate is near the classes that the sub-batches of such shards really show."""
    monkeypatch.setattr("m2t_accel.data.order.POOL_SIZE", 64)
    monkeypatch.setattr("m2t_accel.data.order.MIN_POOL_BATCHES", 4)
    write_classes(tmp_path / "train-00000-of-00001.parquet", labels, row_group_size=40)
    write_classes(tmp_path / "val-00000-of-00001.parquet", list(range(20)), row_group_size=40)
    config = settings(tmp_path, streaming=True, batch_size=16, device_batch_size=16)
    data = load(tmp_path, streaming=True, batch_size=16, device_batch_size=16)
    shards, order = images.check_order(config, data)
    assert (shards.mark, order.mark) == (GOOD, mark)
    assert ("sorted by class" in order.text) == (mark == DOUBTFUL)
    shown = [len({labels[s] for s in request.samples}) for request in DeviceBatches(data.train, config, 1, 0)]
    seen, fair = images.classes_of_a_sub_batch(np.array(labels), data.train, config)
    assert seen == pytest.approx(np.mean(shown), rel=0.3)
    assert fair == pytest.approx(20 * (1 - (1 - 1 / 20) ** 16))


def test_tars_of_one_class_each_are_doubtful(tmp_path):
    for i in range(20):
        write_tar(tmp_path / f"train-{chr(97 + i) * 3}.tar", 0, 64, labels=False)
    batches = {"batch_size": 512, "device_batch_size": 16}
    config, data = settings(tmp_path, streaming=True, **batches), load(tmp_path, streaming=True, **batches)
    shards, order = images.check_order(config, data)
    assert (shards.mark, order.mark) == (DOUBTFUL, DOUBTFUL)
    assert "for 32 virtual devices" in shards.text
    assert "shuffle the images before you write the shards" in order.text


def test_images_that_are_not_streamed_are_shuffled(tmp_path):
    config, data = settings(folder_of_images(tmp_path, 20, 0)), load(tmp_path)
    assert marks(images.check_order(config, data)) == [GOOD]

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from m2t_accel import files
from m2t_accel.config.data import ImageSettings
from m2t_accel.config.evaluation import build_knn
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.evaluation import knn, setup
from m2t_accel.evaluation.features import Features


def accuracy_by_hand(bank, bank_labels, queries, labels, num_classes, k, temperature=0.07):
    """The vote written out, one query at a time."""
    correct = 0
    for query, label in zip(queries.tolist(), labels.tolist(), strict=True):
        norm = math.sqrt(sum(x * x for x in query))
        scored = []
        for other, other_label in zip(bank.tolist(), bank_labels.tolist(), strict=True):
            other_norm = math.sqrt(sum(x * x for x in other))
            cosine = sum(x * y for x, y in zip(query, other, strict=True)) / norm / other_norm
            scored.append((cosine, other_label))
        votes = [0.0] * num_classes
        for cosine, other_label in sorted(scored, reverse=True)[:k]:
            votes[other_label] += math.exp(cosine / temperature)
        correct += max(range(num_classes), key=votes.__getitem__) == label
    return correct / len(queries)


@pytest.fixture(scope="module")
def points():
    """A bank (120, 8), its labels, queries (60, 8) and their labels, in five overlapping classes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 8, dtype=torch.float64, generator=generator)
    bank_labels, labels = (torch.randint(5, (number,), generator=generator) for number in (120, 60))
    bank, queries = (
        centres[each] + 1.2 * torch.randn(len(each), 8, dtype=torch.float64, generator=generator)
        for each in (bank_labels, labels)
    )
    return bank, bank_labels, queries, labels


def to_blocks(bank, size):
    samples = torch.arange(len(bank))
    return [Features(rows, bank[rows], rows) for rows in samples.split(size)]


@pytest.mark.parametrize(("block", "chunk"), [(120, 60), (50, 7), (3, 60)])
def test_the_vote_equals_one_by_hand(points, block, chunk):
    bank, bank_labels, queries, labels = points
    expected = accuracy_by_hand(bank, bank_labels, queries, labels, 5, k=20)
    assert 0.4 < expected < 0.95, "a defect would change this figure"
    for max_k in (20, 50):
        similarities, samples = knn.find_nearest(to_blocks(bank, block), queries, max_k, chunk)
        assert knn.knn_accuracy(similarities, bank_labels[samples], labels, 5, 20, 0.07) == expected


def test_a_low_temperature_is_the_vote_of_the_nearest():
    similarities = torch.tensor([[0.99, 0.95, 0.9]])
    labels = torch.tensor([[2, 0, 0]])
    assert knn.knn_accuracy(similarities, labels, torch.tensor([2]), 3, 3, 1e-3) == 1
    assert knn.knn_accuracy(similarities, labels, torch.tensor([0]), 3, 3, 1.0) == 1  # two against one


def test_two_processes_find_the_neighbours_of_one(points):
    bank, _, queries, _ = points
    blocks = to_blocks(bank, 30)
    mine, theirs = (knn.find_nearest(blocks[i::2], queries, 20) for i in (0, 1))
    answers = iter(theirs)
    two_processes = SimpleNamespace(num_processes=2, gather=lambda rows: torch.cat([rows, next(answers)]))
    merged, whole = knn.merge_shares(*mine, two_processes), knn.find_nearest(blocks, queries, 20)
    assert all(torch.equal(a, b) for a, b in zip(merged, whole, strict=True))


def test_a_bank_may_be_smaller_than_k():
    rows, labels = torch.eye(3), torch.arange(3)
    similarities, samples = knn.find_nearest(to_blocks(rows, 2), rows, 20)
    assert knn.knn_accuracy(similarities, labels[samples], labels, 3, 20, 0.07) == 1.0


def test_k_above_the_bank_is_a_line_and_the_figure_names_the_neighbours_that_vote(given, capsys):
    result = knn.evaluate_knn(build_knn({**given, "k": [5, 100, 200]}))
    assert list(result["figures"]) == ["top1_k5", "top1_k42"]
    assert "only 42 images to search for neighbours, so these 42 vote instead of k = 200" in capsys.readouterr().out


def test_blocks_are_whole_batches_that_several_processes_can_share():
    assert [knn.block_size(number) for number in (1437, 50_000, 1_281_167)] == [128, 24 * 128, 8192]


def test_an_evaluation_writes_its_result_once(given, capsys):
    config = build_knn({**given, "k": [1, 5]})
    result = knn.evaluate_knn(config)
    assert set(result["figures"]) == {"top1_k1", "top1_k5"}
    assert result["figures"]["top1_k1"] > 0.8, "the classes are three colours"
    assert (result["data"]["bank"]["images"], result["data"]["test"]["images"]) == (42, 21)
    first = capsys.readouterr().out
    assert "knn on" in first
    assert knn.evaluate_knn(config) == result
    again = capsys.readouterr().out
    assert first.endswith(again), "the summary alone: nothing is measured again"
    assert len(again) < len(first)


def test_a_result_that_does_not_fit_on_the_disk_is_one_line(given, monkeypatch):
    def fail(path, content):
        if path.name == "result.json":
            raise OSError(28, "No space left on device")
        return files.write_text(path, content)

    monkeypatch.setattr(setup, "write_text", fail)
    with pytest.raises(ConfigurationError, match=r"--output_dir \S+ cannot be written \(No space left on device\)"):
        knn.evaluate_knn(build_knn({**given, "k": (5,)}))


def test_the_first_image_that_cannot_be_decoded_is_named(given, small_images, tmp_path, capsys):
    images = shutil.copytree(small_images, tmp_path / "images")
    for name in ("val/blue/0.png", "train/red/5.png", "train/red/6.png"):
        (images / name).write_bytes(b"broken")
    assert knn.evaluate_knn(build_knn({**given, "dataset": str(images)}))["data"]["undecodable"] == 3
    first = f"3 images cannot be decoded, and left out, the first is {images}/train/red/5.png (no known image format"
    assert first in capsys.readouterr().out


def test_images_that_cannot_be_decoded_are_refused():
    images = Dataset.from_list([{"image": {"bytes": b"broken", "path": None}, "label": 0}] * 3)
    config = ImageSettings(dataset="mine", image_size=8, num_workers=0)
    with pytest.raises(ConfigurationError, match=r"none of the 3 training images .* image 0 .*no known image format"):
        knn.measure_knn(torch.nn.Conv2d(3, 1, 1), images, images, 1, config, Accelerator())


@pytest.mark.slow
def test_two_processes_measure_the_same_figures(given, two_processes):
    settings, folder = two_processes("knn")
    alone = knn.evaluate_knn(build_knn({**given, **settings}))
    two = json.loads((folder / "result.json").read_text())
    for key in ("figures", "data", "protocol", "weights"):
        assert json.loads(json.dumps(alone[key])) == two[key]

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from helpers import encoded
from torch import nn

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.evaluation import features, knn
from m2t_accel.evaluation.features import Features


def knn_by_hand(bank, bank_labels, queries, labels, num_classes, k=20, temperature=0.07):
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


def blocks_of(bank, size):
    numbers = torch.arange(len(bank))
    return [Features(rows, bank[rows], rows) for rows in numbers.split(size)]


@pytest.mark.parametrize(("block", "chunk"), [(120, 60), (50, 7), (3, 60)])
def test_the_vote_equals_one_by_hand(block, chunk):
    torch.manual_seed(0)
    centres = torch.randn(5, 8, dtype=torch.float64)
    bank_labels, labels = torch.randint(5, (120,)), torch.randint(5, (60,))
    bank = centres[bank_labels] + 1.2 * torch.randn(120, 8, dtype=torch.float64)
    queries = centres[labels] + 1.2 * torch.randn(60, 8, dtype=torch.float64)
    expected = knn_by_hand(bank, bank_labels, queries, labels, 5)
    assert 0.4 < expected < 0.95, "too easy or too hard to tell a defect"
    similarities, samples = knn.nearest(blocks_of(bank, block), queries, 20, chunk)
    assert knn.vote(similarities, bank_labels[samples], labels, 5, 20, 0.07) == expected
    similarities, samples = knn.nearest(blocks_of(bank, block), queries, 50, chunk)
    assert knn.vote(similarities, bank_labels[samples], labels, 5, 20, 0.07) == expected


def test_a_bank_smaller_than_k():
    rows, labels = torch.eye(3), torch.arange(3)
    similarities, samples = knn.nearest(blocks_of(rows, 2), rows, 20)
    assert knn.vote(similarities, labels[samples], labels, 3, 20, 0.07) == 1.0


def test_a_banks_blocks_are_whole_batches_that_several_processes_can_share():
    assert knn.block_size(1437) == 128
    assert knn.block_size(50_000) == 24 * 128
    assert knn.block_size(1_281_167) == 8192


def test_features_are_of_the_images_asked_for_and_in_their_order(tmp_path):
    """In batches of three: one image broken, the encoder a function that can be checked by hand."""
    rows = encoded(0, 8)
    rows[4] = {"bytes": b"broken", "path": None}
    images = Dataset.from_list([{"image": row, "label": i % 2} for i, row in enumerate(rows)])
    config = ImageSettings(dataset="digits", image_size=8, image_mean=(0, 0, 0), image_std=(1, 1, 1), num_workers=0)
    accelerator = Accelerator()
    encoder = MeanColour()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "BATCH_SIZE", 3)
        parts = list(features.embed_images(encoder, images, config, accelerator))
        assert [len(part.samples) for part in parts] == [3, 2, 2]
        found = features.gather_features(parts, accelerator)
        result = knn.measure_knn(encoder, images, images, 2, config, accelerator, ks=(1, 4))
    assert found.samples.tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert torch.allclose(found.features[:, 0] * 255, torch.tensor([0.0, 1, 2, 3, 5, 6, 7]), atol=1e-4)
    assert encoder.training
    assert (result.num_bank, result.num_queries, result.num_broken) == (7, 7, 2)
    assert result.accuracies[1] == 1.0, "each image is its own nearest"


class MeanColour(nn.Module):
    """An encoder of two features: the mean colour, and one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values):
        mean = pixel_values.mean(dim=(1, 2, 3), keepdim=True) * self.weight
        return SimpleNamespace(pooler_output=torch.cat([mean, torch.full_like(mean, 0.01)], dim=1))


def test_no_image_can_be_decoded():
    images = Dataset.from_list([{"image": {"bytes": b"broken", "path": None}, "label": 0}] * 3)
    config = ImageSettings(dataset="mine", image_size=8, num_workers=0)
    with pytest.raises(ConfigurationError, match="--dataset mine: of the images to measure kNN with, none can be"):
        knn.measure_knn(MeanColour(), images, images, 1, config, Accelerator())


def test_a_fingerprint_is_of_files_and_labels_and_not_of_their_order():
    digests, labels = torch.tensor([5, -3, 5, 9]), torch.tensor([0, 1, 1, 0])
    name = features.fingerprint(digests, labels)
    order = torch.tensor([2, 0, 3, 1])
    assert features.fingerprint(digests[order], labels[order]) == name
    assert features.fingerprint(digests, labels.roll(1)) != name
    assert features.fingerprint(digests + 1, labels) != name
    assert len(name) == 16

import json
import math

import pytest
import torch
from torch.nn import functional

from m2t_accel import monitor


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


def test_knn_equals_a_vote_by_hand():
    torch.manual_seed(0)
    centres = torch.randn(5, 8, dtype=torch.float64)
    bank_labels, labels = torch.randint(5, (120,)), torch.randint(5, (60,))
    bank = centres[bank_labels] + 1.2 * torch.randn(120, 8, dtype=torch.float64)
    queries = centres[labels] + 1.2 * torch.randn(60, 8, dtype=torch.float64)
    expected = knn_by_hand(bank, bank_labels, queries, labels, 5)
    assert 0.4 < expected < 0.95, "too easy or too hard to tell a defect"
    assert monitor.knn_accuracy(bank, bank_labels, queries, labels, 5, chunk=7) == expected


def test_knn_of_a_bank_smaller_than_k():
    features, labels = torch.eye(3), torch.arange(3)
    assert monitor.knn_accuracy(features, labels, features, labels, 3) == 1.0


@pytest.mark.parametrize(("spread", "low", "high"), [(0.0, 0.0, 0.0), (1e-3, 0.0, 0.01), (1e3, 0.97, 1.01)])
def test_embedding_std_tells_collapse_from_spread(spread, low, high):
    torch.manual_seed(0)
    embeddings = functional.normalize(torch.ones(512, 64) + spread * torch.randn(512, 64), dim=1)
    assert low <= monitor.embedding_std(embeddings).item() <= high


@pytest.mark.parametrize("with_knn", [True, False])
def test_curves_are_drawn(tmp_path, with_knn):
    rows = [{"step": 0, "epoch": 0.0, "knn_top1": 0.5}] if with_knn else []
    for step in range(1, 6):
        row = {"step": step, "epoch": step / 5, "loss": 4 - step, "embedding_std": 0.5, "learning_rate": 0.1}
        row |= {"weight_momentum": 0.99, "statistics_momentum": 1 - step / 5}
        rows.append(row | ({"knn_top1": 0.9} if with_knn and step == 5 else {}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monitor.draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

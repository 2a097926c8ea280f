import warnings

import pytest


@pytest.fixture(scope="module")
def metric_of():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # packages that `evaluate` imports warn
        from m2t_accel.evaluation.metrics import TopKAccuracy
    return TopKAccuracy


def test_top_1_and_top_5_of_ten_classes(metric_of):
    metric = metric_of(num_classes=10)
    ranked = [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [0, 1, 2, 3, 4], [9, 8, 7, 6, 5]]
    assert metric.compute(predictions=ranked, references=[1, 1, 9, 9]) == {"top1": 0.5, "top5": 0.75}
    assert metric.compute(predictions=ranked[:1], references=[2]) == {"top1": 0.0, "top5": 1.0}, "no rows are left over"


def test_up_to_five_classes_have_no_top_5(metric_of):
    assert metric_of(num_classes=3).compute(predictions=[[2, 1, 0], [0, 1, 2]], references=[2, 2]) == {"top1": 0.5}


def test_no_cache_is_written(metric_of, monkeypatch, tmp_path):
    """HF_HOME may be read-only; the accuracy is computed after all training."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "metrics")
    assert metric_of(num_classes=2).compute(predictions=[[1, 0]], references=[1]) == {"top1": 1.0}
    assert not any(tmp_path.iterdir())

import warnings

import pytest


@pytest.fixture(scope="module")
def metrics():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what `evaluate` imports
        from m2t_accel.evaluation import metrics
    return metrics


def test_top_1_and_top_5(metrics):
    metric = metrics.TopKAccuracy(num_classes=10)
    ranked = [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [0, 1, 2, 3, 4], [9, 8, 7, 6, 5]]
    assert metric.compute(predictions=ranked, references=[1, 1, 9, 9]) == {"top1": 0.5, "top5": 0.75}
    assert metric.compute(predictions=ranked[:1], references=[2]) == {"top1": 0.0, "top5": 1.0}, "nothing is left over"


def test_of_five_classes_top_5_says_nothing(metrics):
    metric = metrics.TopKAccuracy(num_classes=3)
    assert metric.compute(predictions=[[2, 1, 0], [0, 1, 2]], references=[2, 2]) == {"top1": 0.5}

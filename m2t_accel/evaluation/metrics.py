"""Accuracy as a metric of Hugging Face's `evaluate`, without the Hub. Importing `evaluate` takes 7 seconds."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class TopKAccuracy(evaluate.Metric):
    """Top-1 accuracy and, with more than five classes, top-5 accuracy, from 0 to 1.

    The predictions (N, K) are the classes of each image, the most likely first; K is at least 5 or the number of
    classes. The references (N,) are the labels.

    Gather the predictions of several processes before `compute`, because the distributed mode of `evaluate` hangs when
    it is used a second time.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy of ranked predictions.",
            citation="",
            inputs_description="predictions: ranked classes of each image; references: the true classes",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _build_data_dir(self) -> str:
        # The original creates a folder there, which is never used in memory, and fails if HF_HOME is read-only.
        return self._data_dir_root

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        figures = {"top1": float(hits[:, 0].mean())}
        if self.num_classes > 5:
            figures["top5"] = float(hits[:, :5].any(axis=1).mean())
        return figures

"""The charts of a page: which figures of metrics.jsonl each shows. page.js draws them with plotly.js."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from m2t_accel.pages.record import RunRecord, is_number
from m2t_accel.pages.series import downsample, numbers

ACCENT, DARK, LIGHT = "#1f5fa8", "#24292f", "#8c959f"
STYLES = ({"color": ACCENT}, {"color": DARK, "dash": "dot"}, {"color": LIGHT, "dash": "dash"})
MAX_COLUMNS = 400  # of a heat map


class Chart(NamedTuple):
    """A chart of curves over the epochs."""

    name: str  # of its element in the page
    title: str
    figures: Mapping[str, str]  # name in metrics.jsonl: words for the legend
    note: str
    options: Mapping[str, object] = {}  # for page.js
    scale: float = 1.0  # factor of the values


PERCENT = {"unit": " %"}

CHARTS = (
    Chart("loss", "Loss", {"loss": "loss"}, "0: predictions equal the targets; 4: unrelated.", {"smooth": True}),
    Chart(
        "knn",
        "kNN accuracy of the teacher",
        {"knn_top1": "kNN top-1"},
        "Top-1, k = 20, on held-out images.",
        PERCENT,
        scale=100,
    ),
    Chart(
        "embeddings",
        "Embeddings",
        {"embedding_std": "spread", "agreement": "agreement"},
        "Spread of the teacher's embeddings: 1 is even, 0 is collapse. Agreement: cosine of predictions and targets.",
        {"smooth": True},
    ),
    Chart(
        "rank",
        "Effective rank of the embeddings",
        {"effective_rank": "effective rank"},
        "RankMe (arXiv 2210.02885): the number of dimensions that the teacher's embeddings fill.",
    ),
    Chart(
        "schedules",
        "Schedules",
        {"learning_rate": "learning rate", "weight_momentum": "weight momentum", "statistics_momentum": "statistics α"},
        "The learning rate is divided by its peak.",
    ),
    Chart(
        "norms",
        "Gradients and updates",
        {"gradient_norm": "gradient", "update_norm": "update", "update_ratio": "update / weights"},
        "Norms over all weights of the student.",
        {"log": True, "smooth": True},
    ),
    Chart(
        "distances",
        "Distance of teacher and student",
        {"teacher_distance": "weights", "statistics_distance": "statistics, largest of the layers"},
        "Weights: relative to their norm. Statistics: a batch's against the teacher's history.",
        {"smooth": True},
    ),
    Chart("speed", "Images per second", {"images_per_second": "images/s"}, "Without evaluations.", {"smooth": True}),
    Chart(
        "wait",
        "Waiting for images",
        {"data_wait": "share of the time"},
        "Share of the time in which the step waited for a batch.",
        {"smooth": True, **PERCENT},
        scale=100,
    ),
)

LAYERS = Chart(
    "layers",
    "Statistics of each layer",
    {"layers": "layers"},
    "Distance of a batch's BatchNorm statistics from the teacher's history. Watch for a layer that darkens with time.",
)


def run_charts(record: RunRecord) -> tuple[list[dict[str, object]], list[str]]:
    """Return the charts of a run for page.js, and in words those for which the run has no figures."""
    drawn, missing = [], []
    for chart in CHARTS:
        series = []
        for (figure, words), style in zip(chart.figures.items(), STYLES, strict=False):
            epochs, values = record.series(figure)
            if not values:
                continue
            if figure == "learning_rate":
                peak = max(values) or 1.0
                values, words = [value / peak for value in values], f"{words} / {peak:.3g}"
            curve = downsample(epochs, [chart.scale * value for value in values])
            # A line between few points would hide how few they are; one point alone has no line.
            mode = "lines+markers" if len(values) <= 30 else "lines"
            series.append({"name": words, "mode": mode, **style, **curve})
        if series:
            drawn.append(describe(chart) | {"series": series})
        else:
            missing.append(chart.title)
    heat = heat_map(record)
    if heat:
        drawn.append(describe(LAYERS) | {"heat": heat, "wide": True})
    else:
        missing.append(LAYERS.title)
    return drawn, missing


def describe(chart: Chart) -> dict[str, object]:
    """Return a chart for page.js, without its curves."""
    return {"id": chart.name, "title": chart.title, "note": chart.note, **chart.options}


def heat_map(record: RunRecord) -> dict[str, object] | None:
    """Return the distances of the layers over the epochs; None if the run has none.

    Of more lines than a screen has room for, evenly spaced ones are shown.
    """
    rows = [row for row in record.rows if isinstance(row.get("layers"), dict) and row["layers"]]
    if not rows:
        return None
    if len(rows) > MAX_COLUMNS:
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, MAX_COLUMNS).astype(int)]
    names = list(dict.fromkeys(name for row in rows for name in row["layers"]))
    distances = [
        [float(f"{row['layers'][name]:.4g}") if is_number(row["layers"].get(name)) else None for row in rows]
        for name in reversed(names)  # plotly draws the first one at the bottom
    ]
    finite = [value for line in distances for value in line if value is not None]
    return {
        "x": numbers(np.array([row["epoch"] for row in rows])),
        "y": [name.removesuffix(".normalization") for name in reversed(names)],  # it says nothing in each line
        "z": distances,
        # The first lines of a run may be far above all others, and would leave them one colour.
        "zmax": float(np.quantile(finite, 0.98)) if finite else 1.0,
    }

"""Compare runs: what differs in their settings and results, and their curves over each other."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m2t_accel.config.fields import plain_text
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.pages.charts import CHARTS, Chart, describe
from m2t_accel.pages.page import chart_cards, now, smoothing_slider, table, write_page
from m2t_accel.pages.record import RunRecord
from m2t_accel.pages.series import downsample, numbers
from m2t_accel.pictures import plain_words, save_picture

# Settings of two runs that may differ although both compute the same.
IGNORED = ("output_dir", "resume", "num_workers", "push_to_hub", "hub_private_repo", "report_to", "checkpoint_every")
IGNORED += ("keep", "collective_timeout", "log_every", "evaluate_every", "stop_on_collapse", "deterministic", "tracker")
# Entries of the protocol of an evaluation that depend on the encoder, or on how it did.
OF_ENCODER = ("network", "held_out_top1", "chosen_learning_rate")
COLOURS = ("#1f5fa8", "#d9770b", "#2e8b57", "#a8327a", "#6b5b95", "#8a6d3b", "#24292f", "#17a2b8")  # by group
LINE_STYLES = {"solid": "solid", "dash": "dashed", "dot": "dotted"}  # plotly's: that of matplotlib and CSS
GRID = 500  # points of the mean of a group
DRAWN = ("loss", "knn", "embeddings", "rank", "schedules", "speed")  # charts of the picture; the page has all


class Group(NamedTuple):
    """Runs whose settings differ in the seed only; each seed occurs once."""

    label: str
    records: list[RunRecord]
    colour: str
    dash: str  # a key of LINE_STYLES


def group_runs(records: Sequence[RunRecord]) -> list[Group]:
    """Return the runs in groups that differ by seed only, in the order in which they were given.

    A run with the seed of an earlier one is no further sample, so the second run of each seed is in a second group.
    """
    found: dict[tuple[str, int], list[RunRecord]] = {}
    repeats: Counter[tuple[str, str]] = Counter()
    for record in records:
        settings = settings_text(record)
        seed, others = settings.pop("seed"), repr(sorted(settings.items()))
        found.setdefault((others, repeats[others, seed]), []).append(record)
        repeats[others, seed] += 1
    groups = []
    for i, members in enumerate(found.values()):
        label = members[0].name if len(members) == 1 else f"{members[0].name} and {len(members) - 1} of other seeds"
        dash = list(LINE_STYLES)[i // len(COLOURS) % len(LINE_STYLES)]
        groups.append(Group(label, members, COLOURS[i % len(COLOURS)], dash))
    return groups


def settings_text(record: RunRecord) -> dict[str, str]:
    """Return the settings that decide what a run computes, as text; runs of earlier versions have the defaults.

    Two of them are no settings of their own: the precision of the launch, and whether the run evaluates. One that does
    not may train on more images, because it holds none out.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(PretrainConfig)}
    settings = {**defaults, **record.settings}
    precisions = re.findall(r", (float32|bf16|fp16)\b", record.hardware)  # several if the run has resumed in another
    settings["precision"] = ", then ".join(dict.fromkeys(precisions)) or "float32"
    settings["evaluates"] = settings["evaluate_every"] != 0
    return {name: plain_text(value) for name, value in settings.items() if name not in IGNORED}


def differences(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return the settings that differ, with the value of each run."""
    texts = [settings_text(record) for record in records]
    names = dict.fromkeys(name for text in texts for name in text)
    values = {name: [text.get(name, "-") for text in texts] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def results(record: RunRecord) -> dict[str, float]:
    """Return the results of a run, by the words of the table's columns."""
    found = {"loss": record.last("loss"), "kNN top-1 %": scaled(record.last("knn_top1"))}
    for name, result in evaluations(record).items():
        for figure, share in result["figures"].items():
            found[f"{name} {figure} %"] = scaled(share)
    speeds = record.series("images_per_second")[1]
    found["images/s"] = statistics.median(speeds) if speeds else None
    return {name: value for name, value in found.items() if value is not None}


def evaluations(record: RunRecord) -> dict[str, Mapping[str, object]]:
    """Return the results of the evaluations of a run's encoder, by the names of their folders."""
    return {
        name: result
        for name, result in record.results.items()
        if not (result.get("protocol") or {}).get("random_weights")
    }


def protocol_differences(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return what differs in the protocols of an evaluation that several runs have, by its name.

    What an earlier version has not recorded is not compared.
    """
    protocols: dict[str, list[dict[str, object]]] = {}
    for record in records:
        for name, result in evaluations(record).items():
            images = {"images": result["data"]} if "data" in result else {}
            protocols.setdefault(name, []).append({**(result.get("protocol") or {}), **images})
    found = {}
    for name, each in protocols.items():
        shared = [key for key in each[0] if key not in OF_ENCODER and all(key in protocol for protocol in each)]
        if different := [key for key in shared if any(protocol[key] != each[0][key] for protocol in each)]:
            found[name] = different
    return found


def protocol_notes(groups: Sequence[Group]) -> list[str]:
    """Return a line for each evaluation whose figures cannot be compared, because its protocols differ."""
    differing = protocol_differences([record for group in groups for record in group.records])
    return [f"* {name}: the runs differ in {', '.join(parts)} of this evaluation" for name, parts in differing.items()]


def scaled(share: float | None) -> float | None:
    return 100 * share if isinstance(share, int | float) else None


def shown(name: str, value: float) -> str:
    """Return a figure with as many digits as it deserves."""
    return f"{value:,.0f}" if name == "images/s" else f"{value:.2f}" if name.endswith("%") else f"{value:.4f}"


class Line(NamedTuple):
    """A line of the table: a run, or the mean of a group."""

    cells: list[str]
    group: Group
    is_mean: bool = False


def comparison_table(groups: Sequence[Group]) -> tuple[list[str], list[Line]]:
    """Return the header and the lines of the table of runs.

    A group of several runs has a line with mean ± standard deviation of those that have got furthest. A `*` marks the
    figures of an evaluation whose protocols differ.
    """
    records = [record for group in groups for record in group.records]
    differing = differences(records)
    every = [results(record) for record in records]
    columns = list(dict.fromkeys(name for found in every for name in found if name != "images/s"))
    columns += ["images/s"] if any("images/s" in found for found in every) else []
    lines, index = [], 0
    for group in groups:
        of_group = every[index : index + len(group.records)]
        for record, found in zip(group.records, of_group, strict=True):
            values = [each[index] for each in differing.values()]
            figures = [shown(name, found[name]) if name in found else "-" for name in columns]
            lines.append(Line([record.name, *values, *figures, progress(record)], group))
            index += 1
        step = max(record.step for record in group.records)
        ended = [found for record, found in zip(group.records, of_group, strict=True) if record.step == step]
        if len(ended) > 1:
            means = [mean_and_deviation(name, [found[name] for found in ended if name in found]) for name in columns]
            same = [each[index - 1] if name != "seed" else "" for name, each in differing.items()]
            lines.append(Line([f"mean of {len(ended)}", *same, *means, f"step {step:,}"], group, is_mean=True))
    unlike = tuple(f"{name} " for name in protocol_differences(records))
    columns = [f"{name} *" if name.startswith(unlike) else name for name in columns]
    return ["run", *differing, *columns, "status"], lines


def mean_and_deviation(name: str, values: Sequence[float]) -> str:
    """Return the mean and the sample standard deviation of a figure of several seeds."""
    if len(values) < 2:
        return "-"
    return f"{shown(name, statistics.mean(values))} ± {shown(name, statistics.stdev(values))}"


def progress(record: RunRecord) -> str:
    """Return the status of a run, and how far it is."""
    total = f" of {record.total_steps:,}" if record.total_steps and record.total_steps != record.step else ""
    return f"{record.status}, step {record.step:,}{total}"


def text_table(header: Sequence[str], lines: Sequence[Line]) -> str:
    """Return the table for a terminal."""
    rows = [list(header), *(line.cells for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def group_curve(group: Group, figure: str) -> dict[str, list[float]] | None:
    """Return mean, low and high of a figure of a group, at the epochs that at least two of its runs have reached.

    Low and high are the mean minus and plus the sample standard deviation. None: fewer than two runs have the figure.
    """
    curves = [curve for curve in (record.series(figure) for record in group.records) if len(curve[0]) > 1]
    if len(curves) < 2:
        return None
    end = sorted(epochs[-1] for epochs, _ in curves)[-2]
    # Evaluations are few: between them a mean would be of no run's figure.
    grid = np.array([epoch for epoch in max((epochs for epochs, _ in curves), key=len) if epoch <= end])
    grid = grid if len(grid) <= GRID else np.linspace(grid[0], end, GRID)
    values = np.array([np.interp(grid, *curve, left=np.nan, right=np.nan) for curve in curves])
    grid, values = grid[kept := np.isfinite(values).sum(axis=0) >= 2], values[:, kept]
    mean, deviation = np.nanmean(values, axis=0), np.nanstd(values, axis=0, ddof=1)
    return {
        "x": numbers(grid),
        "y": numbers(mean),
        "low": numbers(mean - deviation),
        "high": numbers(mean + deviation),
    }


def comparison_charts(groups: Sequence[Group]) -> list[dict[str, object]]:
    """Return the charts of the page: each curve of CHARTS, with a line for each run and each group's mean."""
    drawn = []
    for chart in CHARTS:
        for number, figure in enumerate(chart.figures):
            series = [each for group in groups for each in group_series(group, figure, chart.scale)]
            if series:
                drawn.append(
                    describe(chart)
                    | {
                        "id": chart.name if not number else f"{chart.name}-{figure}",
                        "title": title_of(chart, figure),
                        "legend": False,
                    }
                    | ({"note": ""} if number or chart.name == "schedules" else {})
                    | {"series": series}
                )
    return drawn


def title_of(chart: Chart, figure: str) -> str:
    """Return the title of a chart that shows one of its figures."""
    return chart.title if len(chart.figures) == 1 else f"{chart.title}: {chart.figures[figure]}"


def group_series(group: Group, figure: str, scale: float) -> list[dict[str, object]]:
    """Return the curves of a group: thin ones of its runs, and a thick mean with its deviation if there are several."""
    mean = group_curve(group, figure)
    series = []
    for record in group.records:
        epochs, values = record.series(figure)
        if values:
            mode = "lines+markers" if len(values) <= 30 and mean is None else "lines"
            style = {"width": 1, "opacity": 0.45} if mean is not None else {}
            curve = downsample(epochs, [scale * value for value in values])
            look = {"color": group.colour, "dash": group.dash, "mode": mode, **style}
            series.append({"name": record.name, **look, **curve})
    if mean is not None:
        scaled_mean = mean | {name: [scale * value for value in mean[name]] for name in ("y", "low", "high")}
        look = {"color": group.colour, "dash": group.dash, "width": 2.4}
        series.append({"name": f"mean of {group.label}", **look, **scaled_mean})
    return series


def write_comparison(groups: Sequence[Group], page: Path) -> None:
    """Write the page of a comparison, and its picture beside it with the suffix .png.

    Raises:
        OSError: a file cannot be written.
    """
    header, lines = comparison_table(groups)
    charts = comparison_charts(groups)
    rows = []
    for line in lines:
        style = f"border-top:3px {LINE_STYLES[line.group.dash]} {line.group.colour}"
        swatch = f'<span class="swatch" style="{style}"></span>'
        cells = [escape(cell) for cell in line.cells]
        cells = [f"<strong>{cell}</strong>" for cell in cells] if line.is_mean else cells
        rows.append([swatch + cells[0], *cells[1:]])
    number = sum(len(group.records) for group in groups)
    title = f"Comparison of {number} runs" if number > 1 else groups[0].label
    several = any(len(group.records) > 1 for group in groups)
    note = " Thick: mean of the seeds, with a band of one standard deviation." if several else ""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="muted">Written {now()}. The columns between run and loss are the settings that differ.</p>',
        table([escape(name) for name in header], rows, "compact"),
        *(f'<p class="muted">{escape(line)}</p>' for line in protocol_notes(groups)),
        f'<div class="controls"><h2>Curves</h2>{smoothing_slider()}</div>' if charts else "",
        f'<p class="muted">The colours and line styles are those of the table.{note}</p>'
        if charts
        else "<p>No run has a line of metrics yet.</p>",
        chart_cards(charts),
    ]
    write_page(page, title, "\n".join(body), charts)
    draw_comparison(groups, page.with_suffix(".png"))


@plain_words()
def draw_comparison(groups: Sequence[Group], picture: Path) -> None:
    """Draw the most important curves of the runs over each other."""
    from matplotlib.figure import Figure  # late: importing matplotlib takes about 1 s

    charts = [
        (title_of(chart, figure), curves)
        for chart in CHARTS
        for figure in list(chart.figures)[:1]
        if chart.name in DRAWN
        and (curves := [each for group in groups for each in group_series(group, figure, chart.scale)])
    ]
    figure = Figure(figsize=(11, 3.3 * max(1, -(-len(charts) // 2)) + 0.6), layout="constrained")
    panels = list(figure.subplots(max(1, -(-len(charts) // 2)), 2, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, (title, curves) in zip(panels, charts, strict=False):
        draw_panel(panel, title, curves)
    handles = [
        {
            "color": group.colour,
            "linestyle": LINE_STYLES[group.dash],
            "label": group.label if len(group.records) == 1 else f"{group.label} (mean)",
        }
        for group in groups
    ]
    if charts:
        for handle in handles:
            panels[0].plot([], [], **handle)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save_picture(figure, picture)


def draw_panel(panel: object, title: str, curves: Sequence[Mapping[str, object]]) -> None:
    """Draw curves in one panel of the picture."""
    panel.set_axis_on()
    for curve in curves:
        alpha, width = curve.get("opacity", 1), curve.get("width", 1.6)
        x, y = (curve.get(f"mean_{name}", curve[name]) for name in ("x", "y"))
        style = {"color": curve["color"], "linestyle": LINE_STYLES[curve["dash"]], "linewidth": width, "alpha": alpha}
        panel.plot(x, y, marker="o" if "markers" in curve.get("mode", "") else None, markersize=3, **style)
        if "low" in curve:
            panel.fill_between(curve["x"], curve["low"], curve["high"], color=curve["color"], alpha=0.15, linewidth=0)
    panel.set_title(title)
    panel.set_xlabel("epoch")
    panel.grid(alpha=0.3)

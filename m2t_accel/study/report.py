"""Show the results of a study: a table in Markdown, and a picture."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from m2t_accel.config.fields import count, plain_text
from m2t_accel.pictures import plain_words, save_picture
from m2t_accel.study.plan import Study
from m2t_accel.study.results import FIGURES, Results, collect, distinct, summary, write_results

WORDS = {"knn_top1": "kNN top-1", "linear_top1": "linear top-1"}
# Okabe and Ito's colours, which colour-blind readers can tell apart; each has its own marker, too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "os^DvPX*"  # one more than the colours, so that 56 values of a setting look different
GREY = "#6e6e6e"
SMALL = {"color": GREY, "fontsize": 13}


def report(study: Study, stored: Results, folder: Path) -> Results:
    """Collect the results of a study, and write them to results.json and figure.png if a run is complete.

    Raises:
        OSError: a file cannot be written.
    """
    results = collect(study, stored)
    if results["runs"]:
        write_results(results, folder / "results.json")
        draw_study(results, folder / "figure.png")
    return results


def markdown_table(results: Results) -> str:
    """Return a table with a line for each cell of the grid: mean ± standard deviation over the seeds."""
    names = [name for name in results["grid"] if name != "seed"]
    figures = measured(results)
    rows = []
    for cell in results["cells"]:
        labels = [plain_text(cell["settings"][name]) for name in names] or ["trained"]
        rows.append([*labels, *(shown(cell[figure]) for figure in figures)])
    for settings, group in random_weights(results):
        labels = [*(plain_text(settings.get(name, "")) for name in names[:-1]), "random weights"]
        rows.append([*labels, *(shown(summary(group, figure)) for figure in figures)])
    header = [*(names or ["encoder"]), *(f"{WORDS[figure]} %" for figure in figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def measured(results: Results) -> list[str]:
    """Return the figures that the study measures."""
    return [figure for figure in FIGURES if figure == "knn_top1" or results["linear_probe"] is not None]


def random_weights(results: Results) -> list[tuple[Mapping[str, object], list[Mapping[str, object]]]]:
    """Return the results of random weights in groups that differ by seed only, with their settings."""
    every = [
        ({name: value for name, value in each["settings"].items() if name != "seed"}, each)
        for each in results["random_weights"]
    ]
    keys = distinct([settings for settings, _ in every])
    return [(key, [each for settings, each in every if settings == key]) for key in keys]


def shown(found: Mapping[str, object]) -> str:
    """Return a summary as percent: mean ± standard deviation (number of seeds)."""
    if not found["seeds"]:
        return "-"
    spread = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.2f}"
    return f"{100 * found['mean']:.2f}{spread} ({count(found['seeds'], 'seed')})"


@plain_words()
def draw_study(results: Results, picture: Path) -> None:
    """Draw the kNN accuracy of the teachers over the epochs, and beside it the accuracies of the trained encoders.

    The values of the grid's last setting have a colour each; each combination of the others, without the seed, has a
    panel. Thin lines and points are runs, thick lines and bars are means over the seeds.
    """
    from matplotlib import rc_context  # late: importing matplotlib takes about 1 s
    from matplotlib.figure import Figure

    names = [name for name in results["grid"] if name != "seed"]
    kinds = distinct([{name: cell["settings"][name] for name in names[-1:]} for cell in results["cells"]])
    panels = distinct([{name: cell["settings"][name] for name in names[:-1]} for cell in results["cells"]])
    by_place = {}
    for result in results["runs"]:
        kind = kinds.index({name: result["settings"][name] for name in names[-1:]})
        panel = panels.index({name: result["settings"][name] for name in names[:-1]})
        by_place.setdefault((panel, kind), []).append(result)
    labels = [", ".join(plain_text(value) for value in kind.values()) for kind in kinds]
    final = [name for name in FIGURES if any(result[name] is not None for result in results["runs"])]
    widths = [4.2] * len(panels) + [1 + 1.3 * len(panels)] * len(final)
    with rc_context({"font.size": 14, "axes.titlesize": 15, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(sum(widths) + 0.6, 5.4), layout="constrained")
        axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        figure.suptitle(results["title"], fontsize=17)
        ylim = limits(results)
        for number, panel in enumerate(panels):
            axes[number].set_ylim(*ylim)
            groups = {kind: by_place[number, kind] for kind in range(len(kinds)) if (number, kind) in by_place}
            draw_curves(axes[number], groups, labels, random_level(results, panel, "knn_top1"))
            axes[number].set_title(", ".join(f"{name.replace('_', ' ')} {plain_text(v)}" for name, v in panel.items()))
        axes[0].set_ylabel("teacher kNN top-1 (%)")
        for number, name in enumerate(final, len(panels)):
            draw_points(axes[number], results, name, by_place, panels)
        notes = [f"colour: {name.replace('_', ' ')}" for name in names[-1:]]
        if any(len(group) > 1 for group in by_place.values()):
            notes.append("thin lines and points: one seed; thick: mean of the seeds")
        figure.supxlabel("; ".join(notes), **SMALL)
        save_picture(figure, picture)


def limits(results: Results) -> tuple[float, float]:
    """Return the limits of the axis of kNN accuracies, the same for all panels."""
    values = [100 * share for result in results["runs"] for share in result["curve"]["knn_top1"]] or [0, 100]
    height = max(values) - min(values) or 1
    return min(values) - 0.1 * height, max(values) + 0.15 * height  # room for words


def random_level(results: Results, panel: Mapping[str, object], figure: str) -> float | None:
    """Return the mean figure in percent of the random weights that belong to a panel; None if there is none."""
    for settings, group in random_weights(results):
        if all(panel.get(name, value) == value for name, value in settings.items()):
            values = [each[figure] for each in group if each[figure] is not None]
            return 100 * statistics.mean(values) if values else None
    return None


def draw_curves(
    axes: object, groups: Mapping[int, Sequence[Mapping]], labels: Sequence[str], level: float | None
) -> None:
    """Draw one panel: a colour for each group of runs, and its name at the end of the mean."""
    from matplotlib.ticker import MaxNLocator

    ends = []
    for kind, group in groups.items():
        colour, curves = COLOURS[kind % len(COLOURS)], [result["curve"] for result in group]
        for curve in curves if len(curves) > 1 else []:
            axes.plot(curve["epoch"], percent(curve["knn_top1"]), color=colour, linewidth=0.9, alpha=0.6)
        shared = sorted(set.intersection(*(set(curve["epoch"]) for curve in curves)))
        values = [dict(zip(curve["epoch"], percent(curve["knn_top1"]), strict=True)) for curve in curves]
        mean = [statistics.mean(each[epoch] for each in values) for epoch in shared]
        axes.plot(shared, mean, color=colour, linewidth=2.6, marker=MARKERS[kind % len(MARKERS)], markersize=5)
        if shared:
            ends.append((shared[-1], mean[-1], labels[kind], colour))
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.25)
    if level is not None:
        axes.axhline(level, color=GREY, linestyle="--", linewidth=1.2)
        place = {"xytext": (0, -3), "textcoords": "offset points", "va": "top"}
        axes.annotate("random weights", (0.03, level), xycoords=axes.get_yaxis_transform(), **SMALL, **place)
    if not ends:
        return
    low, high = axes.get_ylim()
    end = max(epoch for epoch, _, _, _ in ends) or 1
    axes.set_xticks([tick for tick in MaxNLocator(5, integer=True).tick_values(0, end) if tick <= end])
    room = 0.14 + 0.05 * max(map(len, labels))  # for the names
    axes.set_xlim(-0.03 * end, (1 + room) * end)
    places = spread_out([value for _, value, _, _ in ends], 0.075 * (high - low))
    for (epoch, _, name, colour), place in zip(ends, places, strict=True):
        axes.annotate(name, (epoch, place), xytext=(8, 0), textcoords="offset points", color=colour, va="center")


def spread_out(values: Sequence[float], distance: float) -> list[float]:
    """Return the values moved up and down until each two are at least so far apart, in the same order."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = list(values)
    for _ in range(100):
        for lower, upper in itertools.pairwise(order):
            missing = distance - (placed[upper] - placed[lower])
            if missing > 1e-9:
                placed[lower] -= missing / 2
                placed[upper] += missing / 2
    return placed


def draw_points(
    axes: object, results: Results, figure: str, by_place: Mapping[tuple[int, int], Sequence[Mapping]], panels: Sequence
) -> None:
    """Draw a figure of the trained encoders: a point for each run, a bar for each mean, side by side for each panel.

    The figure of random weights, which may be far below, is written in words, so that small differences stay visible.
    """
    num = 1 + max(kind for _, kind in by_place)
    for (panel, kind), group in by_place.items():
        values = percent(result[figure] for result in group if result[figure] is not None)
        if not values:
            continue
        place, colour = panel + 0.7 * ((kind + 0.5) / num - 0.5), COLOURS[kind % len(COLOURS)]
        axes.plot([place] * len(values), values, MARKERS[kind % len(MARKERS)], color=colour, markersize=7, alpha=0.75)
        axes.plot([place - 0.25 / num, place + 0.25 / num], 2 * [statistics.mean(values)], color=colour, linewidth=2.6)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.1 * (high - low), high)
    for number, panel in enumerate(panels):
        level = random_level(results, panel, figure)
        if level is not None:
            place = (number, 0.02)
            axes.annotate(f"random: {level:.1f}", place, xycoords=axes.get_xaxis_transform(), ha="center", **SMALL)
    axes.set_xticks(range(len(panels)), ["\n".join(map(plain_text, panel.values())) for panel in panels])
    axes.set_xlim(-0.55, len(panels) - 0.45)
    axes.set_xlabel(", ".join(name.replace("_", " ") for name in panels[0]))
    axes.set_title(f"{WORDS[figure]} (%)")
    axes.grid(alpha=0.25, axis="y")


def percent(shares: object) -> list[float]:
    return [100 * share for share in shares]

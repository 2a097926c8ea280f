"""Write report.html, the page of one run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

import yaml

from m2t_accel.config.fields import ConfigurationError, count, plain_text
from m2t_accel.config.recipes import build_config
from m2t_accel.pages.charts import run_charts
from m2t_accel.pages.page import chart_cards, now, smoothing_slider, table, write_page
from m2t_accel.pages.record import FINISHED, RUNNING, RunRecord, read_run
from m2t_accel.progress import duration

RELOAD_EVERY = 120.0  # seconds
MAX_BAD_SHOWN = 20


def write_run_page(record: RunRecord, path: Path, with_images: bool = True) -> None:
    """Write the page of a run.

    Args:
        with_images: whether to show pictures and paths of the images, which may not be public.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    charts, missing = run_charts(record)
    settings = record.settings
    parts = [
        f"<h1>{escape(record.name)}</h1>",
        f"<p>{escape(str(settings['encoder']))} on {escape(str(settings['dataset']))}, recipe "
        f"{escape(str(settings['recipe']))}. {state(record)}</p>",
        figures(record),
        f"<pre>{escape(record.command)}</pre>" if record.command else "<p>The command is not recorded.</p>",
        f'<p class="muted">Written {now()}'
        + (". The page reloads itself while the run goes on." if record.status == RUNNING else "")
        + "</p>",
        alarms(record),
        f'<div class="controls"><h2>Curves</h2>{smoothing_slider()}</div>' if charts else "<h2>Curves</h2>",
        chart_cards(charts),
        absent(record, missing),
        *(section("Views", views(record)) if with_images else ()),
        *(section("Neighbours", neighbours(record)) if with_images else ()),
        *section("Evaluations", evaluations(record)),
        *(section("Images that cannot be decoded", bad_images(record)) if with_images else ()),
        *section("Settings", settings_table(record)),
        *section("Environment", environment(record)),
    ]
    reload_every = RELOAD_EVERY if record.status == RUNNING else None
    write_page(path, f"{record.name}: {settings['recipe']}", "\n".join(parts), charts, reload_every)


def refresh_run_page(folder: Path) -> None:
    """Write report.html of a run again, such as after an evaluation; do nothing if the folder is not that of a run."""
    try:
        write_run_page(read_run(folder), folder / "report.html")
    except ConfigurationError:
        pass
    except OSError as error:
        print(f"warning: {folder / 'report.html'} cannot be written ({error.strerror})", flush=True)


def section(title: str, content: str) -> tuple[str, str]:
    """Return a heading and what is below it."""
    return f"<h2>{title}</h2>", content


def state(record: RunRecord) -> str:
    """Return the status and the progress of a run as a sentence."""
    total = f" of {record.total_steps:,}" if record.total_steps else ""
    left = f", about {duration(record.seconds_left)} left" if record.seconds_left else ""
    if not record.rows:
        rest = "before the first line of metrics"
    elif record.status == FINISHED:
        rest = f"after {count(record.step, 'step')}"
    elif record.status == RUNNING:
        rest = f"at step {record.step:,}{total}{left}"
    else:
        rest = f"after the metrics of step {record.step:,}{total}; the same command resumes it"
    return f'<span class="status">{record.status.capitalize()}</span> {rest}.'


def figures(record: RunRecord) -> str:
    """Return the newest figures of a run in large type."""
    shown = []
    epochs, accuracies = record.series("knn_top1")
    if accuracies:
        shown.append(
            ("kNN top-1", f"{100 * accuracies[-1]:.2f} %", f"{100 * accuracies[0]:.2f} % at epoch {epochs[0]:g}")
        )
    for name, words, note in (
        ("loss", "loss", "0 to 4"),
        ("embedding_std", "spread", "1 even, 0 collapse"),
        ("effective_rank", "effective rank", f"of {record.settings.get('projection_size', '?')} dimensions"),
    ):
        if (value := record.last(name)) is not None:
            shown.append((words, f"{value:.4g}", note))
    speeds = record.series("images_per_second")[1]
    if speeds:
        shown.append(("images/s", f"{sorted(speeds)[len(speeds) // 2]:,.0f}", "median"))
    wait = record.series("data_wait")[1]
    if wait:
        shown.append(("data wait", f"{100 * sum(wait) / len(wait):.1f} %", "mean share of the time"))
    seconds = record.training.get("seconds", record.last("seconds"))
    if seconds is not None:
        shown.append(("time", duration(seconds), escape(record.hardware)))
    if skipped := record.last("skipped_steps"):
        shown.append(("skipped steps", f"{skipped:,.0f}", "float16 overflows"))
    cells = (f"<div><dt>{words}</dt><dd>{value}<small>{note}</small></dd></div>" for words, value, note in shown)
    return f'<dl class="figures">{"".join(cells)}</dl>'


def alarms(record: RunRecord) -> str:
    """Return the alarms of a run; empty if it had none."""
    found = [str(alarm) for row in record.rows for alarm in row.get("alarms", ())]
    if not found:
        return ""
    return f"<h2>Alarms</h2><ul>{''.join(f'<li>{escape(alarm)}</li>' for alarm in found)}</ul>"


def absent(record: RunRecord, missing: list[str]) -> str:
    """Return a sentence about the charts that the run has no figures for."""
    if not record.rows:
        return f"<p>No line of metrics yet; one is due every {count(record.settings.get('log_every', 10), 'step')}.</p>"
    if not missing:
        return ""
    without_knn = " kNN needs labelled images and --evaluate_every." if any("kNN" in title for title in missing) else ""
    return (
        f'<p class="muted">Not recorded in this run: {"; ".join(missing)}. Runs of earlier versions lack figures, and '
        f"some are due on about 100 lines of a run only.{without_knn}</p>"
    )


def image(uri: str, words: str = "") -> str:
    return f'<img src="{escape(uri)}" alt="{escape(words)}" title="{escape(words)}" loading="lazy">'


def is_small(record: RunRecord) -> str:
    """Return the class of pictures of few pixels, which browsers would blur."""
    return " small" if record.settings.get("image_size", 224) <= 64 else ""


def views(record: RunRecord) -> str:
    """Return images of the first epoch with their two views."""
    if not record.views:
        return "<p>No pictures of views are in the run's folder; scripts/preview.py draws them.</p>"
    tiles = []
    for pair in record.views:
        pictures = "".join(image(uri, words) for uri, words in zip(pair["images"], pair["words"], strict=True))
        described = "; ".join(f"view {i}: {escape(words)}" for i, words in enumerate(pair["words"]) if i)
        tiles.append(f'<figure><div class="pair">{pictures}</div><figcaption>{described}</figcaption></figure>')
    return (
        '<p class="muted">Images of the first epoch. Left: the image, with the two crops. Then view 1 and view 2, as '
        f'the model sees them.</p><div class="tiles{is_small(record)}">{"".join(tiles)}</div>'
    )


def neighbours(record: RunRecord) -> str:
    """Return images with their nearest neighbours at the first and at the newest evaluation."""
    moments = [record.neighbours[name] for name in ("first", "latest") if name in record.neighbours]
    if not moments:
        return "<p>No neighbours are in the run's folder: they are saved when kNN is measured.</p>"
    tiles = []
    for i, query in enumerate(moments[0]["queries"]):
        rows = []
        for moment in moments:
            cells = []
            for found in moment["queries"][i]["neighbours"]:
                wrong = ' class="wrong"' if found["label"] != query["label"] else ""
                words = f"{found['cosine']:.3f}" + (f" <strong>{escape(found['label'])}</strong>" if wrong else "")
                cells.append(
                    f"<figure>{image(found['image'], found['label'])}<figcaption{wrong}>{words}</figcaption></figure>"
                )
            rows.append(f'<div class="row"><span>epoch {moment["epoch"]:g}</span>{"".join(cells)}</div>')
        label = f"<span>{escape(query['label'])}</span>"
        tiles.append(
            f'<figure><div class="query">{image(query["image"], query["label"])}{label}</div>{"".join(rows)}</figure>'
        )
    return (
        '<p class="muted">Held-out images, each with its five nearest training images by the cosine of the teacher\'s '
        f'features; red: of another class.</p><div class="tiles{is_small(record)}">{"".join(tiles)}</div>'
    )


def evaluations(record: RunRecord) -> str:
    """Return a table of the evaluations in the run's folder."""
    if not record.results:
        return "<p>None yet: scripts/knn.py, linear_probe.py and finetune.py measure the encoder of a finished run.</p>"
    rows = []
    for name, result in record.results.items():
        protocol = result.get("protocol") if isinstance(result.get("protocol"), dict) else {}
        kind = str(result.get("evaluation", name)) + (", random weights" if protocol.get("random_weights") else "")
        accuracies = ", ".join(f"{figure} {percent(share)}" for figure, share in result["figures"].items())
        cells = (kind, str(result.get("dataset", "")), accuracies, str(result.get("date", "")), name)
        rows.append([escape(cell) for cell in cells])
    return table(("evaluation", "data", "result", "date", "folder"), rows)


def percent(share: object) -> str:
    return f"{100 * share:.2f} %" if isinstance(share, int | float) else str(share)


def bad_images(record: RunRecord) -> str:
    """Return the images that could not be decoded."""
    if not record.bad_images:
        return "<p>None was met.</p>"
    rows = [
        (escape(str(row.get("path", ""))), escape(str(row.get("reason", ""))))
        for row in record.bad_images[:MAX_BAD_SHOWN]
    ]
    number = len(record.bad_images)
    more = f", the first {MAX_BAD_SHOWN} of them below; bad_images.jsonl lists all" if number > MAX_BAD_SHOWN else ""
    return f"<p>{count(number, 'image')}{more}.</p>" + table(("image", "reason"), rows)


def settings_table(record: RunRecord) -> str:
    """Return the settings, first those that differ from the recipe's."""
    recipe = recipe_settings(record.settings)
    text = {name: plain_text(value) for name, value in record.settings.items()}
    changed = [name for name in text if name in recipe and plain_text(recipe[name]) != text[name]]
    rows = [(escape(name), escape(value)) for name, value in text.items()]
    if not recipe:
        summary = "<p>The recipe is not one of this version.</p>"
    elif changed:
        summary = "<p>Other than in the recipe:</p>" + table(
            ("setting", "here", "in the recipe"),
            [(escape(name), escape(text[name]), escape(plain_text(recipe[name]))) for name in changed],
        )
    else:
        summary = "<p>All settings are those of the recipe.</p>"
    return f"{summary}<details><summary>All {len(rows)} settings</summary>{table((), rows)}</details>"


def recipe_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of the run's recipe; empty if this version does not know it."""
    own = {name: settings[name] for name in ("recipe", "dataset", "output_dir") if settings.get(name) is not None}
    with contextlib.suppress(ConfigurationError):
        recipe = yaml.safe_load(build_config(own).to_yaml())
        # The run itself has settled this number, if it was not given.
        return recipe | ({"evaluate_every": settings.get("evaluate_every")} if recipe["evaluate_every"] is None else {})
    return {}


def environment(record: RunRecord) -> str:
    """Return hardware and versions of each start of the run."""
    rows = list(environment_rows(record))
    return table((), rows) if rows else "<p>Not recorded.</p>"


def environment_rows(record: RunRecord) -> Iterator[tuple[str, str]]:
    if record.training.get("data"):
        yield "images", escape(str(record.training["data"]))
    parts = record.training.get("parts") or []
    for part in parts if len(parts) > 1 else []:
        yield (
            f"started at step {part['step']:,}",
            f"{escape(part['hardware'])}<br><code>{escape(part['command'])}</code>",
        )
    if record.hardware:
        yield "hardware", escape(record.hardware)
    for package, version in record.versions.items():
        yield escape(str(package)), escape(str(version))

"""The frame of a page: one HTML file with its style, its script and plotly.js, which needs no network."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from m2t_accel.files import write_text

# The browser itself refuses whatever is not in the file.
POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_page(
    path: Path, title: str, body: str, charts: Sequence[Mapping[str, object]], reload_every: float | None = None
) -> None:
    """Write a page atomically.

    Args:
        body: HTML.
        charts: the charts, as m2t_accel.pages.charts describes them; `chart_cards` has their elements.
        reload_every: seconds after which the page loads itself again, because the run goes on.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    from plotly.offline import get_plotlyjs  # late: the scripts answer --help without it

    style, script = (
        files("m2t_accel.pages").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    data = json.dumps(charts, separators=(",", ":"), allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    reload = f' data-reload="{reload_every:.0f}"' if reload_every else ""
    write_text(
        path,
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body{reload}>
{body}
<script id="charts" type="application/json">{data}</script>
<script>{get_plotlyjs()}</script>
<script>
{script}</script>
</body>
</html>
""",
    )


def chart_cards(charts: Iterable[Mapping[str, object]]) -> str:
    """Return the elements that page.js draws the charts in."""
    cards = []
    for chart in charts:
        height = f' style="height:{max(200, 15 * len(chart["heat"]["y"]) + 70)}px"' if "heat" in chart else ""
        button = "" if "heat" in chart else '<button class="log" title="logarithmic axis">log</button>'
        cards.append(
            f'<section class="chart{" wide" if chart.get("wide") else ""}" id="{chart["id"]}"><header>'
            f"<h3>{escape(str(chart['title']))}</h3>{button}</header>"
            f'<p class="note">{escape(str(chart["note"]))}</p><div class="plot"{height}></div></section>'
        )
    return f'<div class="charts">{"".join(cards)}</div>'


def smoothing_slider() -> str:
    """Return the control that sets the window of the moving average."""
    return (
        '<label>Smoothing <input id="smoothing" type="range" min="0" max="20" value="2" step="1" '
        'aria-label="window of the moving average, in percent of the run"><output></output></label>'
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table of cells that are HTML; wide ones scroll. The kind "compact" breaks no line."""
    head = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in header)}</tr></thead>" if header else ""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{lines}</tbody></table></div>'


def now() -> str:
    """Return the time as an element that page.js shows in the reader's time zone."""
    moment = datetime.datetime.now(datetime.UTC)
    return f'<time datetime="{moment.isoformat(timespec="seconds")}">{moment:%Y-%m-%d %H:%M} UTC</time>'

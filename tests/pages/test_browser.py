"""The pages in a real browser, Chromium without a window. Skipped where there is none."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
from helpers import write_run

from m2t_accel.pages.charts import CHARTS
from m2t_accel.pages.comparison import group_runs, write_comparison
from m2t_accel.pages.record import RUNNING, read_run
from m2t_accel.pages.run_page import write_run_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")]

# Before all other scripts: collects errors, and requests that the page's policy has refused.
LISTEN = """
window.problems = [];
addEventListener("error", (event) => problems.push(event.message));
addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => problems.push(`${event.violatedDirective} ${event.blockedURI}`));
console.error = console.warn = (...words) => problems.push(words.join(" "));
"""

# After all other scripts: waits for the charts, uses the controls, and sends what it sees to the page around it.
LOOK = """
(async () => {
  const root = document.documentElement, wait = (ms) => new Promise((done) => setTimeout(done, ms));
  for (let i = 0; i < 400 && !root.dataset.drawn; i++) await wait(50);
  const marks = ".scatterlayer .js-line, .scatterlayer .point, .heatmaplayer image";
  const found = { drawn: root.dataset.drawn, width: innerWidth, over: root.scrollWidth - root.clientWidth, charts: {} };
  for (const card of document.querySelectorAll(".chart")) {
    const plot = card.querySelector(".plot");
    found.charts[card.id] = { marks: plot.querySelectorAll(marks).length, over: plot.scrollWidth - plot.clientWidth };
  }
  const loss = document.querySelector("#loss .plot"), slider = document.getElementById("smoothing");
  const smoothed = () => JSON.stringify(loss.data.map((curve) => [curve.y.length, curve.y[50]]));
  found.smoothed = [smoothed()];
  for (const value of ["20", "0"]) {
    slider.value = value;
    slider.dispatchEvent(new Event("input"));
    await wait(300);
    found.smoothed.push(smoothed());
  }
  found.axes = [loss._fullLayout.yaxis.type];
  document.querySelector("#loss button.log").click();
  await wait(300);
  found.axes.push(loss._fullLayout.yaxis.type);
  const names = performance.getEntriesByType("resource").map((entry) => entry.name);
  found.requests = names.filter((name) => !name.startsWith("data:"));
  parent.postMessage({ ...found, problems }, "*");
})();
"""

# A frame has any width; a window of Chromium has 500 pixels at least.
FRAME = """<!DOCTYPE html>
<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>
<pre id="found"></pre>
<script>
onmessage = (event) => {{ document.getElementById("found").textContent = JSON.stringify(event.data); }};
</script>
"""


@pytest.fixture
def look(tmp_path):
    """Open a page in a frame of some width, use its controls, and return what is seen."""

    def run(page, width):
        text = page.read_text().replace("<head>", f"<head><script>{LISTEN}</script>", 1)
        (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{LOOK}</script></body>"))
        (tmp_path / "frame.html").write_text(FRAME.format(width=width))
        words = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1600,1000",
        ]
        words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=60000", "--dump-dom"]
        done = subprocess.run(
            [CHROMIUM, *words, f"file://{tmp_path / 'frame.html'}"],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout)
        return json.loads(unescape(found))

    return run


def check(found, num_charts, width):
    assert found["problems"] == []
    assert found["requests"] == []
    assert found["drawn"] == str(num_charts)
    assert [name for name, chart in found["charts"].items() if chart["marks"] == 0] == []
    assert (found["width"], found["over"]) == (width, 0), "nothing is wider than the window"
    assert {name: chart["over"] for name, chart in found["charts"].items() if chart["over"] > 0} == {}
    assert len(set(found["smoothed"])) == 3, "three windows of the moving average, three curves"
    assert found["axes"] == ["linear", "log"]


@pytest.mark.parametrize("width", [1400, 400])
def test_a_report_of_100_000_lines_is_drawn_and_its_controls_work(tmp_path, look, width):
    write_run_page(read_run(write_run(tmp_path / "run", 100_000), RUNNING), tmp_path / "report.html")
    check(look(tmp_path / "report.html", width), len(CHARTS) + 1, width)


@pytest.mark.parametrize("width", [1400, 400])
def test_a_comparison_is_drawn(tmp_path, look, width):
    folders = [write_run(tmp_path / f"seed{seed}", 3000, seed=seed) for seed in range(3)]
    folders.append(write_run(tmp_path / "other", finished=False, batch_size=32, device_batch_size=32))
    write_comparison(group_runs([read_run(folder) for folder in folders]), tmp_path / "comparison.html")
    check(look(tmp_path / "comparison.html", width), sum(len(chart.figures) for chart in CHARTS), width)


def test_an_error_or_a_request_would_be_seen(tmp_path, look):
    write_run_page(read_run(write_run(tmp_path / "run")), tmp_path / "report.html")
    fault = '<img src="https://example.org/a.png"><script>null.x;</script></body>'
    text = (tmp_path / "report.html").read_text().replace("</body>", fault)
    (tmp_path / "report.html").write_text(text)
    problems = " ".join(look(tmp_path / "report.html", 1400)["problems"])
    assert "img-src https://example.org/a.png" in problems
    assert "null" in problems

import json
import re

import numpy as np
import pytest
from helpers import write_run

from m2t_accel.config.recipes import build_config
from m2t_accel.pages.charts import CHARTS, LAYERS
from m2t_accel.pages.record import RUNNING, read_run
from m2t_accel.pages.run_page import refresh_run_page, write_run_page

MAX_BYTES = 6_000_000


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Write the page of a run without plotly.js; return its text and its charts by name."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")

    def write(folder, status=None, **options):
        write_run_page(read_run(folder, status), tmp_path / "report.html", **options)
        text = (tmp_path / "report.html").read_text()
        (data,) = re.findall(r'<script id="charts" type="application/json">(.*?)</script>', text)
        body = text[text.index("<body") : text.index("<script")]
        return body, {chart["id"]: chart for chart in json.loads(data)}

    return write


def test_every_figure_of_a_run_is_drawn(tmp_path, page):
    body, charts = page(write_run(tmp_path / "run"))
    assert set(charts) == {chart.name for chart in (*CHARTS, LAYERS)}
    for chart in CHARTS:
        assert len(charts[chart.name]["series"]) == len(chart.figures)
    assert charts["knn"]["series"][0]["y"] == [90, 95]
    assert "<dd>95.00 %<small>90.00 % at epoch 0</small></dd>" in body
    assert len(charts["layers"]["heat"]["y"]) == 3
    assert np.shape(charts["layers"]["heat"]["z"]) == (3, 40)
    assert "python scripts/pretrain.py &lt;b&gt;" in body
    assert "Not recorded" not in body
    assert "data-reload" not in body


def test_the_page_of_a_run_under_way_says_how_long_it_takes_and_reloads(tmp_path, page):
    folder = write_run(tmp_path / "run", finished=False)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:11]))
    body, _ = page(folder, RUNNING)
    assert 'data-reload="120"' in body
    assert "Running</span> at step 10 of 40, about 3 s left." in body
    assert "Stopped</span> after the metrics of step 10 of 40; the same command resumes it." in page(folder)[0]


def test_the_alarms_of_a_run_are_above_its_curves(tmp_path, page):
    folder = write_run(tmp_path / "run")
    assert "Alarms" not in page(folder)[0]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[3]["alarms"], rows[7]["alarms"] = ["step 3: one update <b>", "step 3: the rank"], ["step 7: the data"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    body, _ = page(folder)
    shown = "<h2>Alarms</h2><ul><li>step 3: one update &lt;b&gt;</li><li>step 3: the rank</li><li>step 7: the data</li>"
    assert shown in body
    assert body.index("<h2>Alarms") < body.index("<h2>Curves")


def test_what_is_missing_is_said_in_words(tmp_path, page):
    folder = write_run(tmp_path / "run")
    old = ("step", "epoch", "loss", "embedding_std", "learning_rate", "statistics_momentum", "weight_momentum")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({name: row[name] for name in old if name in row}) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    body, charts = page(folder)
    assert set(charts) == {"loss", "embeddings", "schedules"}
    assert [series["name"] for series in charts["embeddings"]["series"]] == ["spread"]
    assert "Not recorded in this run: kNN accuracy of the teacher; Effective rank of the embeddings; Gradients" in body
    for words in ("scripts/preview.py draws", "saved when kNN is measured", "None yet: scripts/knn.py", "None was met"):
        assert words in body
    (folder / "metrics.jsonl").unlink()
    body, charts = page(folder)
    assert charts == {}
    assert "No line of metrics yet; one is due every 10 steps." in body


def test_numbers_that_are_not_finite_do_not_break_the_page(tmp_path, page):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "epoch": 4.1, "loss": Infinity, "layers": {"encoder.layer.0.normalization": NaN}}\n')
    _, charts = page(folder)
    assert len(charts["loss"]["series"][0]["y"]) == 40
    assert charts["layers"]["heat"]["z"][-1][-1] is None


def test_text_of_the_user_is_no_html(tmp_path, page):
    folder = write_run(tmp_path / "a<script>b", dataset="</script><script>alert(1)</script>")
    (folder / "bad_images.jsonl").write_text(json.dumps({"sample": 1, "path": "<i>.jpg", "reason": "cut"}) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "epoch": 4.1, "layers": {"</script><b>": 1}}\n')
    body, charts = page(folder)
    assert "</script><b>" in charts["layers"]["heat"]["y"]
    assert "<script>" not in body
    assert "<i>" not in body
    assert "&lt;i&gt;.jpg" in body


def test_the_settings_that_differ_from_the_recipe_come_first(tmp_path, page):
    body, _ = page(write_run(tmp_path / "run"))
    recipe = build_config({"recipe": "digits"})
    assert f"<tr><td>epochs</td><td>4</td><td>{recipe.epochs}</td></tr>" in body
    assert "<td>encoder</td><td>resnet10-quarter</td></tr>" in body
    folder = write_run(tmp_path / "unknown")
    text = (folder / "config.yaml").read_text().replace("recipe: digits", "recipe: of another version")
    (folder / "config.yaml").write_text(text)
    assert "The recipe is not one of this version." in page(folder)[0]


def write_pictures(folder, uri="data:image/png;base64,AAAA"):
    (folder / "pictures").mkdir()
    pair = {"images": [uri] * 3, "words": ["photo.jpg", "flip", "unchanged"]}
    (folder / "pictures" / "views.json").write_text(json.dumps({"pairs": [pair] * 12}))
    near = [{"image": uri, "label": label, "cosine": 0.5} for label in ("cat", "dog", "cat", "cat", "cat")]
    queries = [{"image": uri, "label": "cat", "neighbours": near}] * 8
    moments = {"first": {"epoch": 0.0, "queries": queries}, "latest": {"epoch": 4.0, "queries": queries}}
    (folder / "pictures" / "neighbours.json").write_text(json.dumps(moments))


def test_views_neighbours_and_results_are_shown_but_no_image_is_published(tmp_path, page):
    folder = write_run(tmp_path / "run")
    write_pictures(folder)
    (folder / "knn").mkdir()
    result = {"evaluation": "knn", "figures": {"top1_k20": 0.9861}, "dataset": "digits", "protocol": {}}
    (folder / "knn" / "result.json").write_text(json.dumps(result))
    body, _ = page(folder)
    assert "top1_k20 98.61 %" in body
    assert body.count("<img") == 12 * 3 + 8 * (1 + 2 * 5)
    assert body.count('class="wrong"') == 8 * 2
    public, _ = page(folder, with_images=False)
    assert "<img" not in public
    assert "photo.jpg" not in public
    assert "top1_k20 98.61 %" in public


def test_a_page_of_many_lines_stays_below_its_limit(tmp_path):
    folder = write_run(tmp_path / "run", 10_000, layers=60)
    write_pictures(folder, "data:image/jpeg;base64," + "A" * 5000)
    write_run_page(read_run(folder), tmp_path / "report.html")
    assert 4_500_000 < (tmp_path / "report.html").stat().st_size < MAX_BYTES


def test_a_result_is_added_to_the_page_and_other_folders_get_none(tmp_path, page, capsys):
    folder = write_run(tmp_path / "run")
    (folder / "knn").mkdir()
    (folder / "knn" / "result.json").write_text('{"evaluation": "knn", "figures": {"top1_k20": 0.9861}}')
    refresh_run_page(folder)
    assert "top1_k20 98.61 %" in (folder / "report.html").read_text()
    refresh_run_page(tmp_path)
    assert not (tmp_path / "report.html").exists()
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    (folder / "report.html" / "file").write_text("")
    refresh_run_page(folder)
    assert re.fullmatch(r"warning: .*report\.html cannot be written \(.*\)\n", capsys.readouterr().out)

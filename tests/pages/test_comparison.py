import json
import re

import pytest
from helpers import write_run
from PIL import Image

from m2t_accel.pages.comparison import comparison_table, group_curve, group_runs, protocol_notes, text_table
from m2t_accel.pages.record import read_run


@pytest.fixture
def seeds(tmp_path):
    return [write_run(tmp_path / f"seed{seed}", seed=seed, num_workers=seed) for seed in range(3)]


def test_runs_that_differ_by_seed_only_are_one_group(tmp_path, seeds):
    other = write_run(tmp_path / "other", weight_momentum=0.9)
    groups = group_runs([read_run(folder) for folder in (*seeds, other)])
    assert [[record.name for record in group.records] for group in groups] == [["seed0", "seed1", "seed2"], ["other"]]
    header, lines = comparison_table(groups)
    assert header == ["run", "seed", "weight_momentum", "loss", "kNN top-1 %", "images/s", "status"]
    cells = {line.cells[0]: dict(zip(header, line.cells, strict=True)) for line in lines}
    assert cells["seed2"]["kNN top-1 %"] == "97.00"
    assert cells["mean of 3"] | {"loss": "", "images/s": ""} == {
        "run": "mean of 3", "seed": "", "weight_momentum": "0.95", "loss": "", "kNN top-1 %": "96.00 ± 1.00",
        "images/s": "", "status": "step 40",
    }  # fmt: skip
    assert cells["other"]["weight_momentum"] == "0.9"
    assert text_table(header, lines).splitlines()[0].split()[:3] == ["run", "seed", "weight_momentum"]


def test_runs_of_another_precision_or_that_hold_out_no_images_are_other_groups(tmp_path):
    folders = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("float32", "bf16"))]
    folders.append(write_run(tmp_path / "all images", seed=2, evaluate_every=0))
    hardware = "8 × NVIDIA H200, bf16, then 4 × NVIDIA H200, float32"
    (folders[1] / "training.json").write_text(json.dumps({"hardware": hardware, "seconds": 1}))
    groups = group_runs([read_run(folder) for folder in folders])
    assert [group.label for group in groups] == ["float32", "bf16", "all images"]
    header, lines = comparison_table(groups)
    assert header[1:4] == ["seed", "precision", "evaluates"]
    assert [line.cells[2:4] for line in lines] == [
        ["float32", "True"],
        ["bf16, then float32", "True"],
        ["float32", "False"],
    ]


def test_a_seed_counts_once_in_a_group(tmp_path, seeds):
    again = write_run(tmp_path / "again", seed=1)
    groups = group_runs([read_run(folder) for folder in (*seeds[:2], again, seeds[2])])
    assert [group.label for group in groups] == ["seed0 and 2 of other seeds", "again"]


def test_each_of_many_groups_has_its_own_colour_and_line_style(tmp_path):
    groups = group_runs(
        [read_run(write_run(tmp_path / str(i), num_steps=2, weight_momentum=i / 20)) for i in range(20)]
    )
    assert len({(group.colour, group.dash) for group in groups}) == 20


def test_results_of_different_protocols_are_marked(seeds):
    for folder, epochs in zip(seeds, (40, 40, 90), strict=True):
        for name, protocol in (("linear", {"epochs": epochs, "network": folder.name}), ("knn", {"k": [20]})):
            (folder / name).mkdir()
            result = {
                "figures": {"top1": 0.9},
                "protocol": protocol,
                "data": {"train": epochs if name == "linear" else 5},
            }
            (folder / name / "result.json").write_text(json.dumps(result))
    groups = group_runs([read_run(folder) for folder in seeds])
    header, _ = comparison_table(groups)
    assert header[-4:-2] == ["knn top1 %", "linear top1 % *"]
    assert protocol_notes(groups) == ["* linear: the runs differ in epochs, images of this evaluation"]


def test_the_mean_of_a_curve_is_that_of_the_runs_that_have_reached_the_epoch(seeds):
    lines = (seeds[2] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (seeds[2] / "metrics.jsonl").write_text("".join(lines[:21]))
    (seeds[2] / "training.json").unlink()
    (group,) = group_runs([read_run(folder) for folder in seeds])
    curve = group_curve(group, "loss")
    every = [record.series("loss")[1] for record in group.records]
    assert len(curve["x"]) == 40
    assert curve["y"][4] == pytest.approx(sum(values[4] for values in every) / 3, rel=1e-5)
    assert curve["y"][-1] == pytest.approx((every[0][-1] + every[1][-1]) / 2, rel=1e-5)
    assert curve["low"][4] < curve["y"][4] < curve["high"][4]
    assert group_curve(group._replace(records=group.records[:1]), "loss") is None
    _, lines = comparison_table([group])
    assert [line.cells[0] for line in lines] == ["seed0", "seed1", "seed2", "mean of 2"]


def test_a_run_of_an_earlier_version_has_the_defaults(tmp_path):
    folders = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("old", "new"))]
    text = (folders[0] / "config.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("init_from", "max_image_pixels", "keep"))]
    (folders[0] / "config.yaml").write_text("\n".join(lines))
    (group,) = group_runs([read_run(folder) for folder in folders])
    assert len(group.records) == 2


def test_the_script_prints_a_table_and_writes_a_page_and_a_picture(tmp_path, seeds, ask):
    under_way = write_run(tmp_path / "under way", finished=False, epochs=8)
    (seeds[0] / "knn").mkdir()
    result = {"evaluation": "knn", "figures": {"top1_k20": 0.9861}, "dataset": "digits", "protocol": {}}
    (seeds[0] / "knn" / "result.json").write_text(json.dumps(result))
    empty = write_run(tmp_path / "empty", epochs=2, finished=False)
    (empty / "metrics.jsonl").unlink()
    page = tmp_path / "page.html"
    answer = ask("scripts/compare.py", *seeds, f"{seeds[0]}/", under_way, empty, "--output", page)
    assert (answer.status, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert len(lines) == 1 + 3 + 1 + 2 + 2, "a run that is given twice is one"
    assert "98.61" in lines[1]
    assert "stopped, step 40 of 80" in lines[5]
    assert lines[-1] == f"Curves: {page}, {tmp_path / 'page.png'}"
    assert "<title>Comparison of 5 runs</title>" in page.read_text()
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.convert("L").getextrema() == (0, 255)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: RUN"),
        (
            ["RUN", "no/such/run"],
            "no/such/run is not the folder of a run: it has no config.yaml of scripts/pretrain.py",
        ),
        (["RUN", "--output", "page.pdf"], "--output page.pdf: .* must end in .html"),
        (["RUN", "--output", "/no/such/folder/page.html"], "--output .* cannot be written: give a file in a folder"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(tmp_path, ask, arguments, words):
    run = write_run(tmp_path / "run")
    output = ["--output", tmp_path / "page.html"] if "--output" not in arguments else []
    answer = ask("scripts/compare.py", *[run if word == "RUN" else word for word in arguments], *output)
    assert answer.status == 2
    assert answer.out == ""
    (line,) = answer.err.splitlines()
    assert re.match(rf"compare\.py: error: .*{words}", line)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_one_line_and_leaves_no_half_picture(tmp_path, ask):
    answer = ask("scripts/compare.py", write_run(tmp_path / "run"), "--output", tmp_path / "page.html")
    assert answer.status == 2
    line = f"--output {tmp_path / 'page.html'} cannot be written (No space left on device): make room "
    assert answer.err.startswith(f"compare.py: error: {line}")
    assert answer.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]

import subprocess
import sys

import pytest
from helpers import write_run

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.pages.record import FINISHED, RUNNING, STOPPED, read_run


def test_a_finished_run(tmp_path):
    record = read_run(write_run(tmp_path / "run"))
    assert (record.name, record.status, record.step, record.total_steps) == ("run", FINISHED, 40, 40)
    assert record.series("knn_top1") == ([0.0, 4.0], [0.9, 0.95])
    assert record.last("knn_top1") == 0.95
    assert record.versions == {"torch": "2.14.1"}
    assert record.command == "python scripts/pretrain.py <b>"


def test_a_run_under_way_is_told_from_a_stopped_one_by_its_lock(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    assert read_run(folder).status == STOPPED
    (folder / ".lock").write_text("")
    assert read_run(folder).status == STOPPED
    script = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX); print(); input()"
    words = [sys.executable, "-c", script, str(folder / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert read_run(folder).status == RUNNING
        holder.communicate(b"\n")
    record = read_run(folder)
    assert record.status == STOPPED
    assert (record.hardware, record.versions["torch"]) == ("1 × cpu (1 thread), float32", "2.14.1")


def test_lines_that_are_cut_or_odd_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    text = (folder / "metrics.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    odd = ['{"step": 1, "ep\n', "[1, 2]\n", '{"step": "x", "epoch": 1}\n', "\n"]
    odd += ['{"step": 21, "epoch": 2.1, "loss": NaN, "layers": 3}\n']
    (folder / "metrics.jsonl").write_text("".join(lines[:21] + odd) + lines[21][:-9])
    for name in ("bad_images.jsonl", "training.json"):
        (folder / name).write_text("{")
    (folder / "knn").mkdir()
    (folder / "knn" / "result.json").write_text('{"figures": 3}')
    record = read_run(folder)
    assert [row["step"] for row in record.rows] == list(range(22))
    assert len(record.series("loss")[0]) == 20
    assert (record.status, record.total_steps, record.results, record.bad_images) == (STOPPED, 40, {}, [])
    assert record.seconds_left is None, "the newest line lacks the time"


def test_the_time_left_is_that_of_the_remaining_steps(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:11]))
    assert read_run(folder, RUNNING).seconds_left == pytest.approx(3.0), "30 steps of 0.1 s"


@pytest.mark.parametrize("content", [None, "a: 1\n", "no mapping", "recipe: digits\n", "\x00"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigurationError, match=r"is not the folder of a run: .*scripts/pretrain\.py; give the"):
        read_run(tmp_path)

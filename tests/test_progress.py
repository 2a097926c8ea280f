import io
import sys

import pytest

from m2t_accel import progress


def test_a_log_file_gets_few_lines_and_a_terminal_a_moving_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    for is_terminal, shown in ((False, ["0/3"]), (True, ["0/3", "1/3", "2/3", "3/3"])):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        with progress.progress_bar("step", 3) as bar:
            for _ in range(3):
                bar.update()
            text = capsys.readouterr().err
            assert [part for part in ("0/3", "1/3", "2/3", "3/3") if part in text] == shown
        assert is_terminal or "3/3" in capsys.readouterr().err  # closing the bar writes the end


def test_a_late_bar_appears_after_a_while_and_leaves_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.0)
    assert list(progress.late_progress_bar("looking", " files", range(3), 3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    assert list(progress.late_progress_bar("looking", " files", range(3), 3)) == [0, 1, 2]
    text = capsys.readouterr().err
    assert "looking:  67%" in text
    assert text.split("\r")[-2].strip() == ""


@pytest.mark.parametrize("stderr", [None, io.StringIO()], ids=["none", "closed"])
def test_without_stderr_there_is_no_bar(monkeypatch, stderr):
    if stderr is not None:
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.progress_bar("step", 3) as bar:
        bar.update()


@pytest.mark.parametrize(("seconds", "words"), [(45.4, "45 s"), (723, "12 min 3 s"), (18720, "5 h 12 min")])
def test_duration_in_words(seconds, words):
    assert progress.duration(seconds) == words

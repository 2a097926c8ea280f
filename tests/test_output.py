import io
import os
import sys

import pytest
from helpers import without_reader

from m2t_accel import progress
from m2t_accel.output import lasting_output


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_the_program_goes_on_when_the_reader_of_its_output_has_ended(monkeypatch, name):
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.0)
    with without_reader() as stream:
        monkeypatch.setattr(sys, name, stream)
        with lasting_output():
            with progress.progress_bar("step", 3) as bar:
                bar.update()
                bar.write("a line above the bar")
            print("a line", file=getattr(sys, name), flush=True)
            print("a line that stays in the buffer", end="", file=getattr(sys, name))
        assert getattr(sys, name) is stream
        stream.flush()  # as the interpreter does


@pytest.mark.parametrize(("encoding", "written"), [("ascii", b"a ? b ?\n"), ("utf-8", "a → b ?\n".encode())])
def test_a_character_that_the_encoding_lacks_is_a_question_mark(monkeypatch, encoding, written):
    """The last one stands for a byte of a path that is not UTF-8."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_output():
        print("a → b \udcff")
    assert stream.buffer.getvalue() == written


def test_a_full_disk_loses_no_later_line(monkeypatch, tmp_path):
    with open("/dev/full", "w") as full, (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stdout", full)
        with lasting_output():
            print("lost", flush=True)
            os.dup2(log.fileno(), full.fileno())  # there is room again
            print("written", flush=True)
    assert (tmp_path / "log").read_text().endswith("written\n")

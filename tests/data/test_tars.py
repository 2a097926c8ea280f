import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, write_tar

from m2t_accel import progress
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import tars


def test_damaged_and_joined_tars_lose_nothing_in_silence(tmp_path):
    write_tar(tmp_path / "a.tar", 0, 20)
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "joined.tar").write_bytes(content + content)
    (tmp_path / "damaged.tar").write_bytes(content[:10240] + b"x" * 512 + content[10752:])
    (tmp_path / "late.tar").write_bytes(content + bytes(tars.PART) + b"x")
    for name in ("joined.tar", "damaged.tar", "late.tar"):
        with pytest.raises(ConfigurationError, match=r"cannot be read as a tar .*joined of several"):
            tars.index_tars(tmp_path, [name])


def test_a_label_in_words_is_none(tmp_path):
    write_tar(tmp_path / "a.tar", 0, 3)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, content in (("000009.png", b"image"), ("000009.cls", b"cat")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert tars.index_tars(tmp_path, ["a.tar"])[0]["label"].to_pylist() == [0, 1, 0, None]


def test_a_tar_has_the_path_by_which_it_was_asked_for(tmp_path, monkeypatch):
    """What is kept of a tar serves from another folder, where the same words may mean another one."""
    for number, name in enumerate(("here", "there")):
        (tmp_path / name / "set").mkdir(parents=True)
        write_tar(tmp_path / name / "set" / "a.tar", 100 * number, 3)
    for name in ("here", "there", "here"):
        monkeypatch.chdir(tmp_path / name)
        for folder in (Path("set"), tmp_path / name / "set"):
            images = tars.tars_to_dataset(folder, ["a.tar"], [])
            assert [image["path"] for image in images["image"]] == [f"{folder}/a.tar"] * 3


def test_a_tar_that_is_replaced_by_one_of_its_size_and_time_is_read_again(tmp_path):
    write_tar(tmp_path / "a.tar", 0, 3)
    before = os.stat(tmp_path / "a.tar")
    first = tars.index_tars(tmp_path, ["a.tar"])
    write_tar(tmp_path / "b.tar", 0, 3, labels=False)
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes().ljust(before.st_size, b"\0"))
    os.replace(tmp_path / "b.tar", tmp_path / "a.tar")
    os.utime(tmp_path / "a.tar", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tars.index_tars(tmp_path, ["a.tar"]) != first


def test_a_tar_is_indexed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "a.tar", 0, 5)
    first = tars.index_tars(tmp_path, ["a.tar"])
    assert first[0]["label"].to_pylist() == [0, 1, 0, 1, 0]
    with monkeypatch.context() as patch:
        patch.setattr(tars.tarfile, "open", None)
        assert tars.index_tars(tmp_path, ["a.tar"]) == first
    write_tar(tmp_path / "a.tar", 0, 6)
    assert len(tars.index_tars(tmp_path, ["a.tar"])[0]) == 6


@pytest.fixture
def by_processes(tmp_path, monkeypatch):
    """Four tars, which two processes look through."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tars, "SMALL", 0)
    monkeypatch.setattr(tars, "num_cores", lambda: 2)
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", 10 * i, 3 + i)
    return [f"{i}.tar" for i in range(4)]


def test_processes_find_what_one_finds(tmp_path, by_processes, monkeypatch):
    members = tars.tar_members
    monkeypatch.setattr(
        tars, "tar_members", lambda file, *more: {f"{os.getpid()}.png": (0, os.getpid()), **members(file, *more)}
    )
    found = tars.index_tars(tmp_path, by_processes)
    assert tars.index_tars(tmp_path, by_processes) == found  # kept, or others would have been asked
    monkeypatch.setattr(tars, "tar_members", members)
    assert [table.slice(1) for table in found] == [tars.index_tar(str(tmp_path / name)) for name in by_processes]
    processes = {table["size"][0].as_py() for table in found}
    assert 1 <= len(processes) <= 2
    assert os.getpid() not in processes


def test_a_broken_tar_is_one_line_and_those_before_it_are_kept(tmp_path, by_processes, monkeypatch):
    (tmp_path / "2.tar").write_bytes(b"no tar")
    with pytest.raises(ConfigurationError, match=r"2\.tar cannot be read as a tar \(.*move it away$"):
        tars.index_tars(tmp_path, by_processes)
    assert 1 <= len(list((tmp_path / "cache" / "m2t_accel").iterdir())) <= 3
    assert multiprocessing.active_children() == []
    (tmp_path / "2.tar").unlink()
    with pytest.raises(ConfigurationError, match=r"2\.tar cannot be read"):
        tars.index_tars(tmp_path, by_processes)


@pytest.mark.parametrize("trouble", ["killed", "daemon", "no process", "no cache"])
def test_what_processes_cannot_do_is_done_all_the_same(tmp_path, by_processes, monkeypatch, trouble):
    members, parent = tars.tar_members, os.getpid()
    if trouble == "killed":

        def killed(file, *more):
            return members(file, *more) if os.getpid() == parent else os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(tars, "tar_members", killed)
    elif trouble == "daemon":
        monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    elif trouble == "no process":

        def refused():
            raise BlockingIOError("Resource temporarily unavailable")

        monkeypatch.setattr(os, "fork", refused)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    found = tars.index_tars(tmp_path, by_processes)
    assert found == [tars.index_tar(str(tmp_path / name)) for name in by_processes]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_parent(tmp_path, by_processes, number):
    """Ctrl-C goes to all of them, the others to the parent; each process waits for a minute."""
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from m2t_accel import tars\n"
        "tars.SMALL, tars.num_cores = 0, lambda: 2\n"
        "tars.tar_members = lambda *_: os.write(1, b'%d\\n' % os.getpid()) and time.sleep(60)\n"
        f"tars.index_tars(Path({str(tmp_path)!r}), {by_processes!r})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    children = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
    started = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(30) != 0
    _, alive = psutil.wait_procs(children, timeout=20)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    assert time.monotonic() - started < 20
    process.stdout.close()


def test_labels_that_are_no_numbers_of_classes(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("0.png", b"image"), ("0.cls", b"9" * 5000), ("1.png", b"image"), ("1.cls", b"9" * 19)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert tars.index_tars(tmp_path, ["a.tar"])[0]["label"].to_pylist() == [None, None]


def test_how_far_it_has_come_is_told(tmp_path, by_processes, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.0)
    monkeypatch.setattr(tars, "PATIENCE", 0.001)
    for small in (0, 1 << 40):
        monkeypatch.setattr(tars, "SMALL", small)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(small)))
        tars.index_tars(tmp_path, by_processes)
        shares = [int(share) for share in re.findall(r"looking for images in tars: +(\d+)%", capsys.readouterr().err)]
        assert shares == sorted(shares)
        assert len(set(shares)) >= 4


def test_memory_does_not_grow_with_the_members(tmp_path):
    """tarfile keeps each as an object, with its header."""
    for number in (100, 1100):
        write_tar(tmp_path / f"{number}.tar", 0, number)
        tracemalloc.start()
        tars.index_tar(str(tmp_path / f"{number}.tar"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2.5e6  # 2.2 million bytes more with them

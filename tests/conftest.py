"""Fixtures, and the environment that every test runs in."""

import atexit
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

# Tests, and the scripts that they start, must not depend on the user's shell: a launcher around pytest, a job, the Hub,
# proxies, the width of a terminal.
for name in list(os.environ):
    if re.match(r"(ACCELERATE|HF|HUGGING\w*|LOCAL|MASTER|OMPI|PMI|SLURM|TORCHELASTIC|TQDM)_", name) or re.fullmatch(
        r"RANK|WORLD_SIZE|COLUMNS|(?i:\w+_PROXY)", name
    ):
        del os.environ[name]
os.environ["ACCELERATE_USE_CPU"] = "true"  # the runs of the tests are compared bit for bit, so also where GPUs are
# The tensors are small, and waiting OpenMP threads slow other processes on the same cores tenfold and more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network; a look-up that fails should fail at once
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# The caches of the tests must not outlive them, nor must the user's caches reach the tests. The Hugging Face libraries
# use this folder, too, if HF_HOME is not set.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="m2t-accel-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# After the variables above: datasets reads them when it is imported.
import datasets  # noqa: E402
from helpers import ROOT, run_in_root, tiny, write_image  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from loopback_hub import loopback_hub  # noqa: E402

from m2t_accel.config.recipes import build_config  # noqa: E402


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture
def image_net(tmp_path):
    """ImageNet's layout in small: 2 classes of 6 and 3 images."""
    for split, number in (("train", 6), ("val", 3)):
        for index, name in enumerate(("n01", "n02")):
            for i in range(number):
                write_image(tmp_path / split / name / f"{name}_{i}.JPEG", value=100 * index + i)
    (tmp_path / "train" / "n01" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    write_image(tmp_path / "train" / ".cache" / "hidden.jpg")
    return tmp_path


@pytest.fixture
def run_script():
    """Run a command of Python in the repository's root: `run_script("scripts/knn.py", "--help")`."""
    return run_in_root


class Answer(NamedTuple):
    """Exit status and output of a script."""

    status: int
    out: str
    err: str


@pytest.fixture
def ask(capsys, monkeypatch):
    """Run a script of the repository in this process, as if typed in its root: `ask("scripts/knn.py", "--help")`.

    Takes milliseconds where a process of its own takes seconds to import torch.
    """

    def run(script, *arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit:
            status = exit.code or 0
        captured = capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The folder of a tiny complete run on digits; tests must not change it."""
    import m2t_accel  # here, so that a test of one module does not import the whole package

    folder = tmp_path_factory.mktemp("trained") / "run"
    m2t_accel.pretrain(build_config(tiny(folder)))
    return folder


@pytest.fixture
def float64():
    """Create tensors in float64 during the test."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def in_child():
    """Call a function in a forked process, which lives on. Return the process id and the printed result."""
    processes = []

    def call(function):
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads; the child only touches files
            process = os.fork()
        if not process:
            try:
                result = str(function())
            except BaseException as error:
                result = repr(error)
            os.write(write, f"{result}\n".encode())
            time.sleep(60)
            os._exit(0)
        processes.append(process)
        os.close(write)
        with os.fdopen(read) as pipe:
            return process, pipe.readline()

    yield call
    for process in processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of so many kilobytes, and give its folder."""
    mounted = []

    def mount(kilobytes):
        where = tmp_path / f"disk-{len(mounted)}"
        where.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(where)]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("no small disk can be mounted here")
        mounted.append(where)
        return where

    yield mount
    for where in mounted:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


@pytest.fixture
def full_disk(monkeypatch):
    """Let every picture fail in the middle of its file, as on a full disk."""
    from matplotlib.figure import Figure

    def fail(figure, picture, **options):
        Path(picture).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)


@pytest.fixture
def dataset_hub(tmp_path, monkeypatch):
    """Start a Hub of the datasets in `tmp_path / "hub"`, and let `datasets` use it in this process."""
    with loopback_hub(tmp_path / "hub") as server:
        for module, name, value in (
            (constants, "ENDPOINT", server.url),
            (constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"),
            (constants, "HF_HUB_OFFLINE", False),
            (constants, "HF_HUB_DISABLE_XET", True),
            (constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache")),
            (datasets.config, "HF_ENDPOINT", server.url),
            (datasets.config, "HUB_DATASETS_URL", server.url + "/datasets/{repo_id}/resolve/{revision}/{path}"),
            (datasets.config, "HF_HUB_OFFLINE", False),
            (datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache"),
            (datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "datasets-cache" / "downloads"),
        ):
            monkeypatch.setattr(module, name, value)
        yield server

import errno
import json
import multiprocessing
import multiprocessing.synchronize
import os
import re
import signal
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from helpers import settings, write_image, write_parquet

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.loader import create_loader, default_num_workers, read, send
from m2t_accel.data.requests import DeviceBatches, Request
from m2t_accel.data.sources import load_images
from m2t_accel.data.views import FlippedCrops, TwoViews
from m2t_accel.distributed import interruption
from m2t_accel.distributed.interruption import NoBatchError, StopSignals


def loader_of(config, dataset=TwoViews, device=None):
    images = load_images(config).train
    return create_loader(dataset(images, config), DeviceBatches(images, config, 1, 0), config, device)


def test_a_loader_leaves_the_global_random_state_and_no_processes():
    config = settings("digits", num_workers=1)
    images = load_images(config).train.select(range(16))
    loader = create_loader(TwoViews(images, config), DeviceBatches(images, config, 1, 0), config)
    before = torch.get_rng_state()
    list(read(loader))
    assert torch.equal(before, torch.get_rng_state())
    batches = read(loader)
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    batches.close()
    assert multiprocessing.active_children() == []


def test_workers_are_forked_whatever_the_default_of_python_is():
    """The default of Python 3.14 is another one; then `end_with_parent` would watch the wrong process."""
    usual = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        batches = read(loader_of(settings("digits", num_workers=1)))
        next(batches)
        assert [worker._popen.method for worker in multiprocessing.active_children()] == ["fork"]
        batches.close()
    finally:
        multiprocessing.set_start_method(usual, force=True)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_more_workers_than_cores_are_no_warning(num_workers, monkeypatch):
    """A warning would be an error under pytest."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    next(read(loader_of(settings("digits", num_workers=num_workers))))


class NoisyViews(TwoViews):
    """Writes to stderr as a C library and as Python."""

    def __getitems__(self, request):
        os.write(2, b"libpng warning: iCCP: known incorrect sRGB profile\n")
        print("a message of Python", file=sys.stderr)
        return super().__getitems__(request)


def test_workers_hide_what_c_libraries_write_to_stderr(capfd):
    for _ in read(loader_of(settings("digits", num_workers=1, epochs=2, batch_size=1024), NoisyViews)):
        os.write(2, b"a message of the main process\n")
    errors = capfd.readouterr().err
    assert "libpng" not in errors
    assert "a message of Python" in errors
    assert "a message of the main process" in errors


class UnpicklableViews(TwoViews):
    def __getitems__(self, request):
        return lambda: request


def test_a_batch_that_cannot_be_sent_is_an_error():
    """An error in the thread of torch's queue would lose the batch, and the main process would wait for it."""
    loader = loader_of(settings("digits", num_workers=1), UnpicklableViews)
    loader.timeout = 20
    with pytest.raises(AttributeError, match="pickle"):
        next(read(loader))


def test_a_batch_without_a_decodable_image_ends_the_run(tmp_path):
    for i in range(8):
        write_image(tmp_path / f"{i}.png")
    loader = loader_of(settings(tmp_path))
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(ConfigurationError, match=r"none of the 4 images.*No such file"):
        list(read(loader))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_reuse_buffers_but_never_one_that_is_kept(num_workers, monkeypatch):
    config = settings("digits", num_workers=num_workers)
    images = load_images(config).train.select(range(60))
    dataset, requests = TwoViews(images, config), list(DeviceBatches(images, config, 1, 0))
    expected = [TwoViews(images, config).__getitems__(request).crops for request in requests]
    loader = create_loader(dataset, requests, config)
    taken = []
    take = loader.dataset.buffers.take
    monkeypatch.setattr(loader.dataset.buffers, "take", lambda: taken.append(take()) or taken[-1])
    for batch, crops in zip(read(loader), expected, strict=True):
        assert torch.equal(batch.crops, crops)
    assert set(taken) == set(range(2 * num_workers + 2)), "a buffer was not free when it was needed, or never used"
    taken.clear()
    kept = [batch.crops for batch in read(loader)]
    assert None in taken
    assert all(map(torch.equal, kept, expected))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_loaders_of_the_same_dataset_can_be_read_at_once(num_workers):
    config = settings("digits", num_workers=num_workers)
    images = load_images(config).train.select(range(60))
    dataset, requests = TwoViews(images, config), list(DeviceBatches(images, config, 1, 0))
    expected = [dataset.__getitems__(request).crops for request in requests]
    loaders = [create_loader(dataset, part, config) for part in (requests, requests[::-1])]
    kept = [[batch.crops for batch in pair] for pair in zip(*map(read, loaders), strict=True)]
    assert all(map(torch.equal, [first for first, _ in kept], expected))
    assert all(map(torch.equal, [second for _, second in kept], expected[::-1]))


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [("SemLock", number, "/dev/shm .docker run --shm-size") for number in (0, 5, 11, 13)]
    + [("fork", number, "ulimit -n") for number in (0, 1)],
)
def test_workers_that_cannot_be_started_are_one_line(monkeypatch, capfd, name, number, words):
    """The first lock or process after `number` others fails."""
    module = multiprocessing.synchronize._multiprocessing if name == "SemLock" else os
    make, made = getattr(module, name), []

    def fail(*arguments):
        made.append(arguments)
        if len(made) > number:
            code = errno.ENOSPC if name == "SemLock" else errno.EAGAIN
            raise OSError(code, os.strerror(code))
        return make(*arguments)

    loader = loader_of(settings("digits", num_workers=2))
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(ConfigurationError, match=rf"cannot start the workers .*--num_workers, or .*{words}"):
        next(read(loader))
    assert len(made) == number + 1
    for worker in multiprocessing.active_children():
        worker.join(5)  # it is killed, but torch 2.11 does not wait for its end
    assert multiprocessing.active_children() == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", [TwoViews, FlippedCrops])
def test_a_batch_is_copied_to_a_gpu_on_its_own_stream(kind, monkeypatch):
    """The order of the operations on a GPU, recorded by a stand-in: the copy on one stream, then the other waits."""
    calls = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            calls.append(f"on {self.name}")

        def __exit__(self, *exception):
            calls.append(f"off {self.name}")

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    def send_to_device(values, device, non_blocking):
        calls.append(("sent", non_blocking))
        return values

    computing, copying = Stream("computing"), Stream("copying")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: calls.append((id(tensor), stream.name)))
    monkeypatch.setattr("m2t_accel.data.loader.send_to_device", send_to_device)
    config = settings("digits")
    batch = kind(load_images(config).train, config).__getitems__(Request(0, np.array([4, 2, 9]), None))
    sent = send(batch, torch.device("cuda", 0), copying)
    assert calls[:4] == ["on copying", ("sent", True), "off copying", "computing waits for copying"]
    sent_tensors = [sent.crops, *(sent.photometry if kind is TwoViews else [sent.photometry])]
    assert calls[4:] == [(id(tensor), "computing") for tensor in sent_tensors]
    assert sent.samples is batch.samples, "samples must stay in main memory"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_arrive_unchanged_on_a_gpu():
    """Many batches, each used after a long computation was queued: none is overwritten or read too early."""
    config, device = settings("digits", batch_size=64, num_workers=1), torch.device("cuda", 0)
    images = load_images(config).train
    requests = DeviceBatches(images, config, 1, 0)
    long = torch.rand(4096, 4096, device=device)
    arrived = []
    for batch in read(create_loader(TwoViews(images, config), requests, config, device), device):
        long = long @ long / 4096
        arrived.append([batch.crops.clone(), batch.photometry.order.clone()])
    for request, (crops, order_of_jitter) in zip(requests, arrived, strict=True):
        expected = TwoViews(images, config).__getitems__(request)
        assert torch.equal(crops.cpu(), expected.crops)
        assert torch.equal(order_of_jitter.cpu(), expected.photometry.order)


def test_a_shard_that_is_truncated_while_it_is_read_ends_the_run(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 0, 64, row_group_size=4)
    loader = loader_of(settings(tmp_path, streaming=True, validation_fraction=0, num_workers=1))
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigurationError, match=r"shard .*train-0\.parquet") as kept:
        list(read(loader))
    assert multiprocessing.active_children() == [], f"the workers live on while {kept} is referenced"


# Imports the libraries once, forks a process for each program, and prints what becomes of it. A program reads two
# batches or fewer, prints the numbers of its workers, and ends.
PROGRAMS = """
import json, os, signal, sys, tempfile, time
import torch
from helpers import settings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.loader import create_loader, dead_workers_in_one_line, read
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.sources import load_images
from m2t_accel.data.views import TwoViews
config = settings("digits", num_workers=2)
images = load_images(config).train
requests = list(DeviceBatches(images, config, 1, 0))

class HangingViews(TwoViews):
    def __getitems__(self, request):
        if request.samples[0] == requests[1].samples[0]:
            time.sleep(600)
        return super().__getitems__(request)

def begin(views):
    batches = read(create_loader(views(images, config), requests, config))
    next(batches)
    print(*(worker.pid for worker in torch.multiprocessing.active_children()), flush=True)
    return batches

running = []
for lines in json.loads(sys.argv[1]):
    files = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    process = os.fork()
    if process == 0:
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        exec(lines)
        sys.exit()
    running.append((process, *files))
found = []
for process, *files in running:
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    for file in files:
        file.seek(0)
    found.append([status, *(file.read() for file in files)])
print(json.dumps(found))
"""

KILLED_WORKER = """
for in_the_loop in (True, False):
    loader = create_loader(TwoViews(images, config), requests, config)
    try:
        with dead_workers_in_one_line():
            for i, _ in enumerate(read(loader)):
                if i == 0:
                    os.kill(torch.multiprocessing.active_children()[0].pid, signal.SIGKILL)
                if in_the_loop:
                    time.sleep(0.2)
    except ConfigurationError as error:
        print(error)
"""
HALF_READ = "batches = begin(TwoViews)"
HANGING = "batches = begin(HangingViews)"
ENDS = [HALF_READ, HANGING, f"{HANGING}; batches.close()", f"{HANGING}; raise SystemExit(0)"]
KILLED = f"{HANGING}; os.kill(os.getpid(), signal.SIGTERM)"


def is_running(process_id):
    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_programs_end_silently_and_leave_no_worker(run_script):
    """With idle workers, and with one that hangs in a read, as from a lost disk; and if a worker or they are killed."""
    done = run_script("-c", PROGRAMS, json.dumps([*ENDS, KILLED, KILLED_WORKER]), environment={"PYTHONPATH": "tests"})
    assert done.stderr == ""
    *ended, killed, killed_worker = json.loads(done.stdout)
    assert [(status, errors) for status, _, errors in ended] == [(0, "")] * len(ENDS)
    assert killed[0] == -signal.SIGTERM
    time.sleep(0.5)
    for _, printed, _ in (*ended, killed):
        workers = [int(word) for word in printed.split()]
        assert len(workers) == 2
        assert not any(map(is_running, workers))
    # Threads of the broken queues may still write errors after the lines.
    lines = killed_worker[1].splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.match(r"a worker process has died .*--num_workers", line)


class HangingViews(TwoViews):
    """Hangs at the second batch."""

    def __getitems__(self, request):
        if request.epoch > 0:
            time.sleep(600)
        return super().__getitems__(request)


def test_a_signal_ends_the_wait_for_a_worker_that_hangs(monkeypatch):
    monkeypatch.setattr(interruption, "BATCH_TIMEOUT", 0.5)
    config = settings("digits", num_workers=2, batch_size=1024)
    with StopSignals():
        batches = read(loader_of(config, HangingViews))
        next(batches)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.2)  # a long step is no wait
        started = time.monotonic()
        with pytest.raises(NoBatchError):
            next(batches)
    assert 0.4 < time.monotonic() - started < 3
    assert multiprocessing.active_children() == []


def test_workers_take_the_cores_that_training_leaves(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert default_num_workers() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS does not have it
    assert default_num_workers() == 5

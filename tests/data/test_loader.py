import multiprocessing
import os
import re

import numpy as np
import pytest
import torch
from helpers import settings, write_image, write_parquet

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.loader import create_loader, default_num_workers, read, send
from m2t_accel.data.requests import DeviceBatches, Request
from m2t_accel.data.sources import load_images
from m2t_accel.data.views import FlippedCrops, TwoViews


def test_the_loader_leaves_the_global_random_state_alone():
    config = settings("digits", batch_size=256, num_workers=1)
    images = load_images(config).train
    before = torch.get_rng_state()
    list(read(create_loader(TwoViews(images, config), DeviceBatches(images, config, 1, 0), config)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("num_workers", [0, 3])
def test_more_workers_than_cores_are_no_warning(num_workers, monkeypatch):
    """pytest makes errors of warnings."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    config = settings("digits", num_workers=num_workers)
    images = load_images(config).train
    next(read(create_loader(TwoViews(images, config), DeviceBatches(images, config, 1, 0), config)))


NOISY = """
import os, sys
import torch
from helpers import settings
from m2t_accel.data import views
from m2t_accel.data import requests
from m2t_accel.data import loader
from m2t_accel.data.sources import load_images
class Views(views.TwoViews):
    def __getitems__(self, request):
        os.write(2, b"libpng warning: iCCP: known incorrect sRGB profile")
        print("what Python says", file=sys.stderr)
        return super().__getitems__(request)
config = settings("digits", num_workers=1, epochs=2, batch_size=1024)
images = load_images(config).train
for _ in loader.read(loader.create_loader(Views(images, config), requests.DeviceBatches(images, config, 1, 0), config)):
    os.write(2, b"of the main process")
"""


def test_what_libraries_write_of_images_is_not_shown(run_script):
    done = run_script("-c", NOISY, environment={"PYTHONPATH": "tests"})
    assert "libpng" not in done.stderr
    assert "what Python says" in done.stderr
    assert "of the main process" in done.stderr


def test_nothing_to_show_ends_the_run(tmp_path):
    for i in range(8):
        write_image(tmp_path / f"{i}.png")
    config = settings(tmp_path)
    images = load_images(config).train
    for path in tmp_path.glob("*.png"):
        path.unlink()
    loader = create_loader(TwoViews(images, config), DeviceBatches(images, config, 1, 0), config)
    with pytest.raises(ConfigurationError, match=r"none of the 4 images of a batch .*No such file.* been moved"):
        list(read(loader))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_put_where_others_were_and_never_over_one_that_is_kept(num_workers, monkeypatch):
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
    assert set(taken) == set(range(2 * num_workers + 2)), "one was not free when it was needed, or never used"
    taken.clear()
    kept = [batch.crops for batch in read(loader)]
    assert None in taken
    assert all(map(torch.equal, kept, expected))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_loaders_of_the_same_images_at_once(num_workers):
    config = settings("digits", num_workers=num_workers)
    images = load_images(config).train.select(range(60))
    dataset, requests = TwoViews(images, config), list(DeviceBatches(images, config, 1, 0))
    expected = [dataset.__getitems__(request).crops for request in requests]
    loaders = [create_loader(dataset, part, config) for part in (requests, requests[::-1])]
    kept = [[batch.crops for batch in pair] for pair in zip(*map(read, loaders), strict=True)]
    assert all(map(torch.equal, [first for first, _ in kept], expected))
    assert all(map(torch.equal, [second for _, second in kept], expected[::-1]))


@pytest.mark.parametrize("kind", [TwoViews, FlippedCrops])
def test_a_batch_is_sent_beside_what_a_gpu_computes_and_waited_for(kind, monkeypatch):
    """The order of what is asked of a GPU, on a stand-in: the copy on a stream of its own, the waiting, the use."""
    asked = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            asked.append(f"on {self.name}")

        def __exit__(self, *exception):
            asked.append(f"off {self.name}")

        def wait_stream(self, other):
            asked.append(f"{self.name} waits for {other.name}")

    def send_to_device(values, device, non_blocking):
        asked.append(("sent", non_blocking))
        return values

    computing, copying = Stream("computing"), Stream("copying")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: asked.append((id(tensor), stream.name)))
    monkeypatch.setattr("m2t_accel.data.loader.send_to_device", send_to_device)
    config = settings("digits")
    batch = kind(load_images(config).train, config).__getitems__(Request(0, np.array([4, 2, 9]), None))
    sent = send(batch, torch.device("cuda", 0), copying)
    assert asked[:4] == ["on copying", ("sent", True), "off copying", "computing waits for copying"]
    sent_tensors = [sent.crops, *(sent.photometry if kind is TwoViews else [sent.photometry])]
    assert asked[4:] == [(id(tensor), "computing") for tensor in sent_tensors]
    assert sent.samples is batch.samples, "they stay in the main memory"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_arrives_on_a_gpu_is_what_was_sent():
    """Many batches, each used after a long computation was asked for: none is written over, none is read too early."""
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


def test_a_shard_that_is_cut_while_it_is_read_ends_the_run(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 0, 64, row_group_size=4)
    config = settings(tmp_path, streaming=True, validation_fraction=0, num_workers=1)
    images = load_images(config).train
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1")
    loader = create_loader(TwoViews(images, config), DeviceBatches(images, config, 1, 0), config)
    message = r"the shard .*train-0\.parquet cannot be read .* fetch it again"
    with pytest.raises(ConfigurationError, match=message) as kept:
        list(read(loader))
    assert multiprocessing.active_children() == [], f"they live with what {kept} refers to"


KILLED = """
import os, signal, time
import torch
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.views import TwoViews
from m2t_accel.data.loader import create_loader, dead_workers_in_one_line, read
from m2t_accel.config.recipes import build_config
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.sources import load_images
config = build_config({"recipe": "digits", "batch_size": 4, "num_workers": 2})
images = load_images(config).train
for in_the_loop in (True, False):
    loader = create_loader(TwoViews(images, config), DeviceBatches(images, config, 1, 0), config)
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


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run(run_script):
    """In a process of its own: what threads of the broken queues say later must not reach another test."""
    lines = run_script("-c", KILLED).stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.match(r"a process that decodes images has died .*give a smaller --num_workers", line)


STUCK = """
import os, signal, time
from helpers import settings
from m2t_accel.data import views
from m2t_accel.data import requests
from m2t_accel.data import loader
from m2t_accel.data.sources import load_images
class Views(views.TwoViews):
    def __getitems__(self, request):
        if request.samples[0] == asked[1].samples[0]:
            time.sleep(600)
        return super().__getitems__(request)
config = settings("digits", num_workers=2)
images = load_images(config).train
asked = list(requests.DeviceBatches(images, config, 1, 0))
for batch in loader.read(loader.create_loader(Views(images, config), asked, config)):
    raise SystemExit(7)
"""


@pytest.mark.slow
def test_a_worker_that_hangs_does_not_keep_the_end_waiting(run_script):
    """As in a read from a disk that has gone; five seconds are torch's."""
    assert run_script("-c", STUCK, environment={"PYTHONPATH": "tests"}, timeout=60).returncode == 7


LEFT = """
from helpers import settings
from m2t_accel.data import views
from m2t_accel.data import requests
from m2t_accel.data import loader
from m2t_accel.data import sources

config = settings("digits", num_workers=1)
images = sources.load_images(config).train
batches = loader.read(loader.create_loader(
    views.TwoViews(images, config), requests.DeviceBatches(images, config, 1, 0), config))
next(batches)
"""


def test_a_program_that_leaves_a_loader_in_the_middle_says_nothing(run_script):
    left = run_script("-c", LEFT, environment={"PYTHONPATH": "tests"}, timeout=60)
    assert (left.returncode, left.stdout, left.stderr) == (0, "", "")


def test_workers_take_the_cores_that_training_leaves(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert default_num_workers() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    assert default_num_workers() == 5

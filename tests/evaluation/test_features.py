import contextlib
import json
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from helpers import ROOT, encoded
from torch import nn

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.buffers import Buffers
from m2t_accel.data.sources import load_images
from m2t_accel.distributed.device import set_up_computation
from m2t_accel.evaluation import features
from m2t_accel.evaluation.features import BATCH_SIZE, fingerprint, process_batches
from m2t_accel.evaluation.knn import join_blocks, measure_knn
from m2t_accel.model import create_encoder


class MeanColour(nn.Module):
    """An encoder of two features: the mean colour, and 0.01."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        mean = images.mean(dim=(1, 2, 3), keepdim=True) * self.weight
        return torch.cat([mean, torch.full_like(mean, 0.01)], dim=1)


def test_features_are_in_the_order_of_the_images_and_broken_images_are_left_out(monkeypatch):
    rows = encoded(0, 8)
    rows[4] = {"bytes": b"broken", "path": None}
    images = Dataset.from_list([{"image": row, "label": i % 2} for i, row in enumerate(rows)])
    config = ImageSettings(dataset="digits", image_size=8, image_mean=(0, 0, 0), image_std=(1, 1, 1), num_workers=0)
    accelerator, encoder = Accelerator(), MeanColour()
    monkeypatch.setattr(features, "BATCH_SIZE", 3)
    parts = list(features.embed_images(encoder, images, config, accelerator))
    assert [len(part.samples) for part in parts] == [3, 2, 2]
    monkeypatch.setattr(features, "GATHERED_BATCHES", 2)
    found = features.gather_features(parts, len(images), accelerator, accelerator.device)
    assert found.samples.tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert torch.allclose(found.features[:, 0] * 255, found.samples.float(), atol=1e-4)
    assert encoder.training
    result = measure_knn(encoder, images, images, 2, config, accelerator, ks=(1, 4))
    assert (result.num_bank, result.num_queries, result.broken) == (7, 7, ({4}, {4}))
    assert result.accuracies[1] == 1.0, "each image is its own nearest neighbour"


@pytest.mark.parametrize("number", [7, 8, 9])
def test_features_are_gathered_while_they_are_computed(monkeypatch, number):
    """At most the features of two blocks are in memory besides the result, and the encoder returns to its mode."""
    images = Dataset.from_list([{"image": row, "label": 0} for row in encoded(0, number)])
    config = ImageSettings(dataset="digits", image_size=8, num_workers=0)
    accelerator, encoder, computed, alive = Accelerator(), MeanColour(), [], []
    monkeypatch.setattr(features, "BATCH_SIZE", 1)
    monkeypatch.setattr(features, "GATHERED_BATCHES", 2)

    def batches():
        for batch in features.embed_images(encoder, images, config, accelerator):
            computed.append(weakref.ref(batch.features))
            alive.append(sum(reference() is not None for reference in computed))
            yield batch

    found = features.gather_features(batches(), number, accelerator, torch.device("cpu"))
    assert found.samples.tolist() == list(range(number))
    assert max(alive) <= 4
    assert encoder.training


@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_two_processes_make_their_collective_calls_in_the_same_order(monkeypatch, number):
    """With two batches at a time, some numbers leave one process with fewer batches, or with fewer blocks."""
    images = Dataset.from_list([{"image": row, "label": 0} for row in encoded(0, number)])
    config = ImageSettings(dataset="digits", image_size=8, num_workers=0)
    monkeypatch.setattr(features, "BATCH_SIZE", 1)
    monkeypatch.setattr(features, "GATHERED_BATCHES", 2)
    calls, samples = [[], []], []
    for process_index in range(2):
        made = calls[process_index]
        accelerator = SimpleNamespace(
            process_index=process_index,
            num_processes=2,
            device=torch.device("cpu"),
            autocast=contextlib.nullcontext,
            pad_across_processes=lambda rows, pad_index: rows,
            gather=lambda rows, made=made: made.append("gather") or rows,
        )
        batches = features.embed_images(
            MeanColour(), images, config, accelerator, after_batch=lambda made=made: made.append("batch")
        )
        found = features.gather_features(batches, number, accelerator, accelerator.device)
        samples += found.samples.tolist()
    assert calls[0] == calls[1]
    assert sorted(samples) == list(range(number))


class Overflowing(MeanColour):
    """An encoder with an infinite feature of every image that is brighter than 5 of 255."""

    def forward(self, images):
        found = super().forward(images)
        return torch.where(found > 5.5 / 255, torch.inf, found)


def test_features_that_are_not_finite_are_refused():
    """Their neighbours and classes would be arbitrary."""
    images = Dataset.from_list([{"image": row, "label": i % 2} for i, row in enumerate(encoded(0, 8))])
    config = ImageSettings(dataset="digits", image_size=8, image_mean=(0, 0, 0), image_std=(1, 1, 1), num_workers=0)
    accelerator, encoder, dark = Accelerator(), Overflowing(), images.select(range(4))
    assert measure_knn(encoder, dark, dark, 2, config, accelerator).num_bank == 4
    for bank, queries in ((images, dark), (dark, images)):
        with pytest.raises(ConfigurationError, match=r"features are not finite: its weights are damaged$"):
            measure_knn(encoder, bank, queries, 2, config, accelerator)
    accelerator = SimpleNamespace(mixed_precision="fp16")
    assert "or fp16 overflows: type `accelerate launch --mixed_prec" in str(features.not_finite(accelerator))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_features_on_a_gpu_are_float32_and_their_batches_do_not_wait_for_it():
    """TF32 would differ by 1e-3. torch raises where a batch would wait for the device."""
    config = ImageSettings(dataset="digits", image_size=32)
    images = load_images(config).validation
    encoder = create_encoder("resnet18").eval()
    expected = list(features.embed_images(encoder, images, config, Accelerator()))
    set_up_computation(deterministic=False)
    device = torch.device("cuda", 0)
    gpu = SimpleNamespace(process_index=0, num_processes=1, device=device, autocast=contextlib.nullcontext)
    encoder.to(device, memory_format=torch.channels_last)
    batches = features.embed_images(encoder, images, config, gpu)
    found = [next(batches)]  # the first one starts cuDNN
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += batches
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.samples, b.samples)
        torch.testing.assert_close(b.features.cpu(), a.features, rtol=1e-4, atol=1e-5)


def test_a_batch_searches_kernels_only_if_it_is_whole(monkeypatch):
    """And a block of features leaves the device in one copy, because each copy waits for it."""
    images = Dataset.from_list([{"image": row, "label": 0} for row in encoded(0, 8)])
    config = ImageSettings(dataset="digits", image_size=8, num_workers=0)
    searched, copied = [], []

    class Encoder(MeanColour):
        def forward(self, images):
            searched.append((len(images), torch.backends.cudnn.benchmark))
            return super().forward(images)

    monkeypatch.setattr(features, "BATCH_SIZE", 3)
    set_up_computation(deterministic=False)
    batches = features.embed_images(Encoder(), images, config, Accelerator())
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (copied.append(len(tensor)), to_host(tensor))[1])
    assert [len(block.samples) for block in join_blocks(batches, 6)] == [6, 2]
    assert searched == [(3, True), (3, True), (2, False)]
    assert copied == 3 * [6] + 3 * [2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_buffers_are_reused_from_batch_to_batch(monkeypatch, num_workers):
    """Also by the last batch, which is smaller, and by the black view of a broken image."""
    rows = encoded(0, 40)
    rows[38] = {"bytes": b"broken", "path": None}
    images = Dataset.from_list([{"image": row, "label": 0} for row in rows])
    config = ImageSettings(dataset="digits", image_size=8, num_workers=num_workers)
    taken, take = [], Buffers.take
    monkeypatch.setattr(Buffers, "take", lambda self: taken.append(take(self)) or taken[-1])
    monkeypatch.setattr(features, "BATCH_SIZE", 3)
    seen = []
    monkeypatch.setattr(
        features, "evaluation_view", lambda crops, config: seen.append(crops[:, 0, 0, :1] * 1.0) or crops
    )
    monkeypatch.setattr(features, "embed", lambda encoder, images: seen[-1])
    parts = list(features.embed_images(MeanColour(), images, config, Accelerator()))
    assert torch.cat([part.features[:, 0] for part in parts]).tolist() == [*range(38), 39]
    assert torch.cat(seen)[38] == 0, "the broken image is black"
    assert set(taken) == set(range(2 * num_workers + 2)), "a buffer was not free when it was needed, or never used"


@pytest.mark.parametrize("batches_per_turn", [1, 2])
def test_processes_take_turns_and_the_first_has_the_most_batches(batches_per_turn):
    shares = [process_batches(i, 5 * BATCH_SIZE + 3, 2, batches_per_turn) for i in range(2)]
    assert sorted(sample for share in shares for batch in share for sample in batch) == list(range(5 * BATCH_SIZE + 3))
    assert len(shares[0]) >= len(shares[1])
    assert shares[1][0][0] == batches_per_turn * BATCH_SIZE


def test_a_fingerprint_of_files_is_that_of_their_features(monkeypatch):
    rows = encoded(0, 8)
    rows[4] = {"bytes": b"broken", "path": None}
    rows[6] = {"bytes": None, "path": "gone.png"}
    images = Dataset.from_list([{"image": row, "label": i % 2} for i, row in enumerate(rows)])
    config = ImageSettings(dataset="digits", image_size=8, num_workers=0)
    accelerator = Accelerator()
    batches = features.embed_images(MeanColour(), images, config, accelerator)
    found = features.gather_features(batches, len(images), accelerator, accelerator.device)
    expected = fingerprint(found.digests, found.samples % 2)
    assert features.fingerprint_of_files(images, {4}, accelerator) == expected
    assert features.fingerprint_of_files(images, set(), accelerator) != expected


def test_a_fingerprint_depends_on_files_and_labels_but_not_on_their_order():
    digests, labels = torch.tensor([5, -3, 5, 9]), torch.tensor([0, 1, 1, 0])
    name = fingerprint(digests, labels)
    order = torch.tensor([2, 0, 3, 1])
    assert fingerprint(digests[order], labels[order]) == name
    assert fingerprint(digests, labels.roll(1)) != name
    assert fingerprint(digests + 1, labels) != name
    assert len(name) == 16


@pytest.mark.slow
@pytest.mark.parametrize("size", ["16k", "1m"])
def test_a_small_dev_shm_is_enough_or_one_line(given, tmp_path, size):
    """The batches of the workers take more than any of these sizes, but only their locks are in /dev/shm."""
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no /dev/shm can be mounted here")
    training = {"epochs": 1, "batch_size": 42, "device_batch_size": 42}
    scripts = {
        "knn": {},
        "linear_probe": training,
        "finetune": {**training, "labels": 1.0},
        "embed": {},
        "pretrain": {**training, "recipe": "digits", "warmup_epochs": 0, "encoder": "resnet10-quarter"},
    }
    lines = []
    for script, others in scripts.items():
        settings = {**given, "num_workers": 2, "image_size": 384, "output_dir": tmp_path / script, **others}
        words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        lines.append([f"scripts/{script}.py", *words])
    command += [sys.executable, "tests/several_scripts.py", json.dumps(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for (script, *_), (status, _, error) in zip(lines, json.loads(done.stdout)["answers"], strict=True):
        assert status == (2 if size == "16k" else 0), error
        if size == "16k":
            line = f"{script.removeprefix('scripts/')}: error: cannot start the workers (No space left on device): "
            assert error.splitlines()[-1].startswith(f"{line}give a smaller --num_workers, or"), error
        assert "Traceback" not in error

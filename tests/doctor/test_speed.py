from types import SimpleNamespace

import pytest
import torch

from m2t_accel.doctor import speed
from m2t_accel.doctor.findings import DOUBTFUL, GOOD
from m2t_accel.doctor.speed import LoaderSpeed, StepSpeed

STEP = StepSpeed(64, 10, 0.1, 0.12, 300.0, None, None, 1)  # 640 images/s
CPU = SimpleNamespace(device=torch.device("cpu"), num_processes=1, mixed_precision="no")


@pytest.mark.parametrize(
    ("loader", "mark", "words"),
    [
        (LoaderSpeed(1, 6400.0, 6400.0), GOOD, "delivers 10.0 times as many images; 1 worker is enough"),
        (LoaderSpeed(4, 800.0, 200.0), GOOD, "4 workers are enough"),
        (LoaderSpeed(2, 320.0, 160.0), DOUBTFUL, "waits 50% of the time for images: --num_workers 4"),
        (LoaderSpeed(4, 1280.0, 500.0), GOOD, "4 workers are enough"),  # two have not been measured
        (LoaderSpeed(4, 600.0, 640.0), DOUBTFUL, "waits 6% of the time for images: --num_workers 5"),
        (LoaderSpeed(2, 64.0, 32.0), DOUBTFUL, "it needs 20 workers a process, which has 8 cores: smaller images"),
        (LoaderSpeed(0, 640.0, 640.0), DOUBTFUL, "waits 50% of the time while its process decodes: --num_workers 1"),
    ],
)
def test_the_slower_of_loader_and_step_is_named_with_the_workers_to_use(monkeypatch, loader, mark, words):
    monkeypatch.setattr(speed, "num_cores", lambda: 8)
    (finding,) = speed.describe_limit(loader, STEP)
    assert finding.mark == mark
    assert words in finding.text


def test_the_images_of_all_processes_count():
    assert STEP._replace(num_processes=4).images_per_second == pytest.approx(2560)


def test_a_smaller_sub_batch_than_that_of_the_run_is_doubtful(monkeypatch):
    monkeypatch.setattr(speed, "available_memory", lambda: 10**9)
    whole = list(speed.describe_step(SimpleNamespace(device_batch_size=64), STEP, CPU))
    assert [finding.mark for finding in whole] == [GOOD, GOOD]
    assert "300 MB at 64 images for each process; 1.3 GB are free" in whole[1].text
    part = list(speed.describe_step(SimpleNamespace(device_batch_size=128), STEP, CPU))
    assert [finding.mark for finding in part] == [DOUBTFUL, DOUBTFUL]
    assert "not measured at 128" in part[1].text


def test_more_memory_than_there_is_is_doubtful_and_names_the_flag(monkeypatch):
    monkeypatch.setattr(speed, "available_memory", lambda: -(10**6))
    _, memory = speed.describe_step(SimpleNamespace(device_batch_size=64), STEP, CPU)
    assert (memory.mark, "--device_batch_size" in memory.text) == (DOUBTFUL, True)


def test_the_loader_of_images_that_will_be_copied_is_not_that_of_the_run():
    (finding,) = speed.describe_loader(LoaderSpeed(1, 100.0, 100.0), in_place=True)
    assert (finding.mark, "not measured from the copy" in finding.text) == (DOUBTFUL, True)


def test_the_energy_is_read_where_the_processor_tells_it(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "POWER", tmp_path)
    assert speed.read_energy() is None
    for package, microjoules in (("intel-rapl:0", 3_000_000), ("intel-rapl:1", 1_000_000)):
        (tmp_path / package).mkdir()
        (tmp_path / package / "energy_uj").write_text(f"{microjoules}\n")
    assert speed.read_energy() == 4.0
    assert speed.gpu_power(torch.device("cpu")) is None

from types import SimpleNamespace

import pytest
import torch
from helpers import settings, tiny, write_parquet

import m2t_accel
from m2t_accel.config.recipes import build_config
from m2t_accel.doctor import machine
from m2t_accel.doctor.findings import BAD, DOUBTFUL, GOOD
from m2t_accel.run.folder import Start


def marks(findings):
    return [finding.mark for finding in findings]


def test_a_checkpoint_takes_as_much_as_is_computed(tmp_path):
    config = build_config(tiny(tmp_path / "run", max_steps=2, evaluate_every=0, keep=(2, 0)))
    size, encoder = machine.checkpoint_bytes(config)
    m2t_accel.pretrain(config)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    written = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert written == pytest.approx(size, rel=0.05)
    assert (tmp_path / "run" / "encoder" / "model.safetensors").stat().st_size == pytest.approx(encoder, rel=0.02)


def test_too_little_disk_is_bad_and_names_the_flag(tmp_path, monkeypatch):
    config = build_config(tiny(tmp_path / "run"))
    size, encoder = machine.checkpoint_bytes(config)
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 6 * size + encoder)
    assert marks(machine.check_disk(config)) == [GOOD]
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 3 * size + encoder)
    (finding,) = machine.check_disk(config)
    assert finding.mark == BAD
    assert "4 checkpoints" in finding.text  # three are kept, and a fourth is written before one is removed
    assert "type --keep 2 0, or give an --output_dir on another disk" in finding.text


def test_the_checkpoints_of_a_run_that_resumes_are_there_already(tmp_path, monkeypatch):
    config = build_config(tiny(tmp_path / "run"))
    size, encoder = machine.checkpoint_bytes(config)
    for step in (1, 2, 3):
        (tmp_path / "run" / "checkpoints" / f"step-{step}").mkdir(parents=True)
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 2 * size + encoder)
    assert marks(machine.check_disk(config)) == [GOOD]


def test_the_free_space_is_that_of_a_folder_that_does_not_exist_yet(small_disk):
    disk = small_disk(512)
    assert machine.free_bytes(disk / "runs" / "new") == 512 * 1024


def test_too_little_shared_memory_is_bad_and_names_the_flag(tmp_path, monkeypatch):
    config = build_config(tiny(tmp_path, num_workers=4))
    monkeypatch.setattr(machine, "SHARED_MEMORY", str(tmp_path))
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 81_000)
    assert marks(machine.check_memory(config)) == [GOOD, GOOD]
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 79_000)
    _, shared = machine.check_memory(config)
    assert shared.mark == BAD
    assert "--num_workers 0" in shared.text
    assert "--shm-size" in shared.text


def test_too_little_memory_for_the_batches_is_bad(tmp_path, monkeypatch):
    config = build_config(tiny(tmp_path, num_workers=4))
    needed = 10 * 2 * 32 * config.image_size**2 * 3  # two batches of each worker and two more, two views, 32 images
    monkeypatch.setattr(machine, "available_memory", lambda: needed - 1)
    finding = next(machine.check_memory(config))
    assert (finding.mark, "--num_workers" in finding.text) == (BAD, True)
    monkeypatch.setattr(machine, "available_memory", lambda: 3 * needed)
    assert next(machine.check_memory(config)).mark == GOOD


@pytest.mark.parametrize("files", machine.MEMORY_FILES, ids=["cgroup 2", "cgroup 1"])
def test_the_limit_of_a_container_counts_without_its_inactive_files(tmp_path, monkeypatch, files):
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    (tmp_path / "memory").mkdir()
    limit, used, statistics, inactive = files
    (tmp_path / limit).write_text("300000\n")
    (tmp_path / used).write_text("299000\n")
    (tmp_path / statistics).write_text(f"anon 90000\n{inactive} 199000\nactive_file 10000\n")
    assert machine.available_memory() == 200_000
    (tmp_path / limit).write_text("max\n" if limit == "memory.max" else "9223372036854771712\n")
    assert machine.available_memory() > 200_000


def test_too_few_open_files_are_bad(tmp_path, monkeypatch):
    config = build_config(tiny(tmp_path, num_workers=8))
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, 4096))
    assert marks(machine.check_open_files(config)) == [GOOD]
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (100, 4096))
    (finding,) = machine.check_open_files(config)
    assert (finding.mark, "ulimit -n 4096" in finding.text) == (BAD, True)


def test_bf16_on_a_cpu_that_emulates_it_is_doubtful(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert marks(machine.check_devices()) == [DOUBTFUL]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert marks(machine.check_devices()) == [GOOD]


def test_a_hub_dataset_needs_room_in_the_cache_until_it_is_there(tmp_path, dataset_hub, monkeypatch):
    write_parquet(tmp_path / "hub" / "someone" / "pictures" / "train-00000-of-00001.parquet", 10, 4, row_group_size=4)
    config = settings("someone/pictures")
    (finding,) = machine.check_cache(config)
    assert finding.mark == DOUBTFUL  # this Hub does not say the size
    assert machine.missing_copy(config)
    monkeypatch.setattr(machine, "size_of_copy", lambda config: 10**6)
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 10**5)
    (finding,) = machine.check_cache(config)
    assert (finding.mark, "--streaming" in finding.text) == (BAD, True)
    assert list(machine.check_cache(settings("someone/pictures", streaming=True))) == []
    monkeypatch.undo()


def test_gpus_that_are_not_used_are_doubtful(tmp_path, monkeypatch):
    config = build_config(tiny(tmp_path))
    accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"), mixed_precision="no")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (finding,) = machine.check_processes(config, accelerator)
    assert "64 images a step = 2 × 32, 2 in turn on each" in finding.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert marks(machine.check_processes(config, accelerator)) == [GOOD, DOUBTFUL]


def test_a_complete_run_would_train_nothing(tmp_path):
    config = build_config(tiny(tmp_path))
    assert marks(machine.describe_start(config, Start(complete=True))) == [DOUBTFUL]
    assert marks(machine.describe_start(config, Start(remarks=("damaged, not used: x",)))) == [GOOD, DOUBTFUL]


def test_equal_gpus_share_a_line_with_their_precisions(monkeypatch):
    def properties(index):
        old = SimpleNamespace(name="Tesla V100", total_memory=16 * 10**9, major=7)
        return old if index == 8 else SimpleNamespace(name="NVIDIA H100", total_memory=80 * 10**9, major=9)

    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert [finding.text for finding in machine.check_devices()][:2] == [
        "8 × NVIDIA H100, 80 GB; float32, bf16, fp16",
        "1 × Tesla V100, 16 GB; float32, fp16, not bf16",
    ]

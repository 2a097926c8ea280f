"""What a GPU can compute, and a lack of memory in one line: on stand-ins for GPUs."""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from helpers import tiny

from m2t_accel.config.evaluation import build_knn, build_linear_probe
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.distributed import device
from m2t_accel.distributed.device import check_gpu, describe_device_error, kernel_search, set_up_computation
from m2t_accel.distributed.launch import start_accelerator
from m2t_accel.pretrain import pretrain
from m2t_accel.step import TrainingStep

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90a"]
GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that the machine has a GPU, and that torch is built for one list of kernels."""

    def pretend(capability, kernels, cuda="13.0"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "Card")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: kernels)

    return pretend


@pytest.mark.parametrize(
    ("capability", "kernels", "cuda", "precision"),
    [
        ((8, 0), CUDA_13, "13.0", "bf16"),
        ((8, 9), CUDA_13, "13.0", "bf16"),  # runs the code of 8.6
        ((9, 0), CUDA_12_6, "12.6", "bf16"),
        ((7, 5), CUDA_13, "13.0", "fp16"),
        ((6, 1), CUDA_12_6, "12.6", "no"),
        ((13, 0), [*CUDA_13, "compute_120"], "13.0", "bf16"),  # compiled by the driver
        ((9, 4), ["gfx90a"], None, "bf16"),  # AMD
    ],
)
def test_a_gpu_that_torch_can_use_is_accepted(gpu, capability, kernels, cuda, precision):
    gpu(capability, kernels, cuda)
    check_gpu(0, precision)


@pytest.mark.parametrize(
    ("capability", "kernels", "precision", "message"),
    [
        (
            (7, 0),
            CUDA_13,
            "fp16",
            r"no kernels for Card \(compute capability 7\.0\), only for 7\.5 to 12\.0: .*cu126`$",
        ),
        (
            (5, 2),
            CUDA_13,
            "no",
            r"no kernels .*pip uninstall -y torch torchvision && pip install .torch<2\.15. torchvi",
        ),
        ((3, 5), CUDA_12_6, "no", r"no kernels .* no wheel of torch supports it any more.*cpu\.yaml$"),
        ((13, 0), CUDA_13, "bf16", r"no kernels .*`pip install --upgrade torch torchvision`$"),
        ((8, 0), ["sm_86"], "no", "no kernels"),  # machine code does not run on an older GPU
        ((7, 5), CUDA_13, "bf16", r"^--mixed_precision bf16: Card .*7\.5.* type --mixed_precision fp16 before"),
        ((7, 0), CUDA_12_6, "bf16", "type --mixed_precision fp16"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_one_line(gpu, monkeypatch, capability, kernels, precision, message):
    gpu(capability, kernels)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ConfigurationError, match=message) as caught:
        start_accelerator()
    assert "\n" not in str(caught.value)


@pytest.fixture
def unchanged():
    """Restore torch's settings after the test."""
    benchmark, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    torch.set_float32_matmul_precision(precision)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_float32_is_float32(unchanged):
    torch.set_float32_matmul_precision("high")
    set_up_computation(deterministic=False)
    # torch raises in the first line if the older and the newer names of these settings contradict each other.
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"


def test_kernels_are_searched_for_shapes_that_repeat_unless_runs_must_repeat(unchanged):
    set_up_computation(deterministic=False)
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    for allowed in (True, False):
        with kernel_search(allowed):
            assert torch.backends.cudnn.benchmark == allowed
        assert torch.backends.cudnn.benchmark
    set_up_computation(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with kernel_search(True):
        assert not torch.backends.cudnn.benchmark


def test_a_deterministic_run_searches_no_kernels(unchanged):
    start_accelerator(build_config({"deterministic": "true"}))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


def pretraining(**settings):
    return build_config({"batch_size": 1024, "device_batch_size": 128, **settings})


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB"


@pytest.mark.parametrize(
    ("settings", "processes", "size"),
    [
        ({}, 1, 64),
        ({}, 8, 64),
        ({"batch_size": 24, "device_batch_size": 12}, 2, 6),
        ({"batch_size": 30, "device_batch_size": 10}, 3, 5),
        ({"batch_size": 60, "device_batch_size": 20}, 3, 10),
        ({"batch_size": 14, "device_batch_size": 7}, 2, None),
        ({"batch_size": 1024, "device_batch_size": 2}, 1, None),
    ],
)
def test_out_of_memory_names_a_batch_that_the_processes_can_share(gpu, monkeypatch, settings, processes, size):
    gpu((8, 0), CUDA_13)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 75 * GIB)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = pretraining(**settings)
    message = describe_device_error(torch.OutOfMemoryError(OUT_OF_MEMORY), config)
    assert message.startswith(
        f"out of memory at --device_batch_size {config.device_batch_size} on Card (80.0 GiB: 75.0 taken by tensors of "
        "this process, 4.0 by CUDA and other programs): try "
    )
    assert "--mixed_precision" not in message
    assert (f"--device_batch_size {size} in another --output_dir" in message) == (size is not None)
    if size is not None:
        build_config({**settings, "batch_size": config.batch_size, "device_batch_size": size})
        assert config.batch_size // size % processes == 0
        assert f"--batch_size stays {config.batch_size}" in message


def test_out_of_memory_without_a_training_offers_no_batch(gpu, monkeypatch):
    gpu((8, 0), CUDA_13)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: GIB)
    for config in (build_knn({"encoder": "x", "dataset": "x"}), build_linear_probe({"encoder": "x", "dataset": "x"})):
        message = describe_device_error(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), config)
        assert "or end other programs" in message
        assert "--mixed_precision bf16" in message, "float32 takes twice the memory"
        assert "in another --output_dir" not in message


@pytest.mark.parametrize(
    "text",
    ["GET was unable to find an engine to execute this computation", "Unable to find a valid cuDNN algorithm to run"],
)
@pytest.mark.parametrize(("free", "is_lack"), [(3, True), (5, False)])
def test_a_convolution_without_an_algorithm_lacks_memory_if_the_gpu_is_nearly_full(
    gpu, monkeypatch, text, free, is_lack
):
    gpu((8, 0), CUDA_13)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 75 * GIB)
    message = describe_device_error(RuntimeError(text), pretraining())
    assert (message or "").startswith("out of memory at --device_batch_size 128 on Card") == is_lack
    assert (message is None) == (not is_lack)


def test_a_full_main_memory_is_one_line():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (caught.value, MemoryError()):
        message = describe_device_error(error, pretraining())
        assert "main memory (" in message
        assert "--device_batch_size 64 in another --output_dir" in message
        assert "a smaller --num_workers" in message
        assert "\n" not in message


def test_other_errors_are_not_changed():
    assert describe_device_error(RuntimeError("shapes do not fit"), pretraining()) is None
    text = "put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'."
    assert describe_device_error(RuntimeError(text), pretraining()).startswith("--deterministic: torch has no deter")


def test_pretraining_that_runs_out_of_memory_ends_with_one_line_and_no_partial_file(tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(TrainingStep, "forward_backward", fail)
    monkeypatch.setattr(device, "describe_gpu_memory", lambda: "Card")
    with pytest.raises(ConfigurationError, match=r"^out of memory at --device_batch_size 32 on Card: try .* 16 in"):
        pretrain(build_config(tiny(tmp_path / "run", evaluate_every=0, device_batch_size=32)))
    assert not any(Path(tmp_path / "run").rglob("*.safetensors*"))
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {
        ".lock",
        "config.yaml",
        "checkpoints",
        "pictures",
        "report.html",
    }


# Memory runs out on process 1 alone.
PLANTED = """
import os, runpy
import torch
from m2t_accel.step import TrainingStep

def fail(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

if os.environ["RANK"] == "1":
    TrainingStep.forward_backward = fail
runpy.run_path("scripts/pretrain.py", run_name="__main__")
"""


@pytest.mark.slow
def test_out_of_memory_on_one_process_ends_both(run_script, tmp_path):
    (tmp_path / "pretrain.py").write_text(PLANTED)
    words = [
        f"--{name}={value}" for name, value in tiny(tmp_path / "run", evaluate_every=0, device_batch_size=32).items()
    ]
    done = run_script(
        *("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu2.yaml"),
        *(tmp_path / "pretrain.py", *words),
        timeout=120,
    )
    assert done.returncode != 0
    assert "pretrain.py: error: out of memory at --device_batch_size 32 on this device: try " in done.stderr
    assert not any((tmp_path / "run").rglob("*.safetensors*"))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@needs_gpu
def test_a_full_gpu_is_one_line():
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    message = describe_device_error(caught.value, pretraining())
    assert f"--device_batch_size 128 on {torch.cuda.get_device_name()} (" in message
    assert "\n" not in message


@pytest.mark.gpu
@needs_gpu
def test_deterministic_runs_are_equal_to_the_last_bit_on_a_gpu(run_script, tmp_path):
    weights = []
    for name in ("a", "b"):
        words = ["--deterministic", "--max_steps", 50, "--evaluate_every", 1, "--output_dir", tmp_path / name]
        done = run_script("scripts/pretrain.py", *words)
        assert done.returncode == 0, done.stderr
        assert torch.cuda.get_device_name() in done.stdout
        weights.append((tmp_path / name / "encoder" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


FAULTS = """
import resource
import torch
from m2t_accel.distributed.device import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for keep in (False, True):  # in this order: what is kept is used again
    keep_freed_memory(keep)
    print(min(page_faults() for _ in range(5)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_kept_only_where_it_is_asked_for(run_script):
    """Memory that the process still holds causes no page fault; a tensor of 64 MiB has 16 384 pages."""
    done = run_script("-c", FAULTS)
    returned, kept = map(int, done.stdout.split())
    assert kept < 1000 < returned, done.stderr

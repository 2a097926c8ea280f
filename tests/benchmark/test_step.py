import json
import runpy

import pytest
import torch
from accelerate import Accelerator
from helpers import ROOT
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from m2t_accel.benchmark import step as benchmark
from m2t_accel.benchmark.variants import VARIANTS, create_work
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config

SMALL = ("--encoder", "resnet10-quarter", "--image_size", 32, "--device_batch_size", 4, "--hidden_size", 32)


@pytest.fixture
def work():
    config = build_config(
        {
            "recipe": "8x2080Ti-b256-100ep",
            "dataset": "random",
            "encoder": "resnet10-quarter",
            "image_size": 32,
            "batch_size": 8,
            "device_batch_size": 8,
            "hidden_size": 32,
            "projection_size": 16,
        }
    )
    return create_work(config, Accelerator(cpu=True))


def test_the_benchmark_measures_the_variants_in_one_run(ask, tmp_path, monkeypatch):
    """With images it measures the wait for them, too; --device_batch_size need not divide the recipe's batch."""
    monkeypatch.setattr(benchmark, "DATA_STEPS", 2)
    sizes = []
    monkeypatch.setattr(benchmark, "limit_threads", sizes.append)
    figures, trace = tmp_path / "figures.json", tmp_path / "trace.json"
    more = ("--variants", "eager,floor", "--dataset", "digits", "--num_workers", 0, "--repeats", 2)
    done = ask("scripts/benchmark.py", "step", *SMALL, *more, "--json", figures, "--profile", trace)
    assert done.status == 0, done.err
    assert sizes == [32]  # so the threads are those of a run on such images
    result = json.loads(figures.read_text())
    assert list(result["variants"]) == ["eager", "floor"]
    for name, values in result["variants"].items():
        assert len(values["ms_of_turns"]) == 2
        assert values["images_per_second"] == pytest.approx(4000 / values["ms"])
        assert result["profile"][name]["convolution"] > 0
        assert f"\n{name:<10}{values['ms']:11.1f}" in done.out
    assert result["profile"]["eager"]["teacher's statistics"] > 0
    assert "optimizer" not in result["profile"]["floor"]
    assert 0 < result["data_wait"]["share"] < 1
    assert done.out.splitlines()[-1] == f"eager: {result['ratios']['eager / floor']:.3f} of the floor"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"variant eager", "variant floor", "photometry", "teacher's weights"} <= names


@pytest.mark.slow
def test_two_processes_share_a_step(run_script, tmp_path):
    """Their images count together, the bytes that each sends are measured, and what is for one process is left out."""
    figures = tmp_path / "figures.json"
    launch = ("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu2.yaml")
    script = ("scripts/benchmark.py", "step", *SMALL, "--variants", "plain,eager", "--repeats", 2, "--json", figures)
    done = run_script(*launch, *script, environment={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads(figures.read_text())
    assert done.stdout.count("plain is left out: it is for one process") == 1
    values = result["variants"]["eager"]
    assert values["images_per_second"] == pytest.approx(8000 / values["ms"])
    # A ring all-reduce among two sends the gradients once; networks add their headers.
    assert 1 < result["megabytes_sent"] < 2


def test_the_plain_step_is_the_step_of_pretraining(float64, work):
    """Three steps of both, from the same weights, end with the same student."""
    plain, eager = VARIANTS["plain"](work), VARIANTS["eager"](work)
    for _ in range(3):
        student, training = plain(), eager()
    for (name, mine), theirs in zip(student.named_parameters(), training.student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=name)


def test_the_peer_is_a_step_of_lightly(work):
    pytest.importorskip("lightly")
    step = VARIANTS["peer"](work)
    step()
    step()


def test_what_cannot_run_is_named_in_one_line(monkeypatch, capsys, work):
    def missing(work):
        raise ConfigurationError("needs something: type `pip install something`")

    monkeypatch.setitem(VARIANTS, "peer", missing)
    monkeypatch.setitem(VARIANTS, "floor", lambda work: lambda: None)
    ready, _ = benchmark.start_variants(["peer", "floor"], work)
    assert list(ready) == ["floor"]
    assert capsys.readouterr().out == "peer is left out: it needs something: type `pip install something`\n"
    with pytest.raises(ConfigurationError, match="--variants eager,floor"):
        benchmark.start_variants(["peer"], work)


def test_bf16_is_refused_on_a_cpu_that_emulates_it(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    benchmark.check_precision("no", torch.device("cpu"))
    benchmark.check_precision("bf16", torch.device("cuda"))
    with pytest.raises(ConfigurationError, match=r"--mixed_precision bf16: .* leave the flag out"):
        benchmark.check_precision("bf16", torch.device("cpu"))


def test_ratios_compare_turns_that_followed_each_other():
    """The machine is ten times slower in the last turn, which must not change the ratio."""
    times = {"eager": [1.0, 1.0, 10.0], "floor": [0.5, 0.8, 8.0], "peer": [2.0, 2.0, 20.0]}
    assert benchmark.ratios(times) == {"eager / peer": 2.0, "eager / floor": 0.8}


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["aten::mkldnn_convolution", "aten::conv2d", "variant eager"], "convolution"),
        (["aten::native_batch_norm_backward", "variant eager"], "batch norm"),
        (["aten::addmm", "variant eager"], "linear"),
        (["aten::copy_", "photometry", "variant eager"], "photometry"),
        (["aten::_foreach_add_", "Optimizer.step#SGD.step", "variant eager"], "optimizer"),
        (["aten::threshold_backward", "variant eager"], "ReLU, sums and other operators"),
        (["triton_poi_fused_add_convolution_2", "variant compiled"], "compiled kernels"),
        (["variant eager"], benchmark.OUTSIDE),
    ],
)
def test_operators_are_grouped(names, group):
    assert benchmark.group_of(names) == group


def test_launches_are_the_calls_that_start_kernels():
    calls = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch"]
    others = ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaFuncGetAttributes", "aten::add"]
    assert [name for name in calls + others if benchmark.LAUNCH.match(name)] == calls


def test_the_peak_of_the_memory_is_that_of_the_process():
    device = torch.device("cpu")
    used = benchmark.reset_peak(device)
    if used is None:
        pytest.skip("this system does not tell the peak")
    block = torch.ones(50_000_000, dtype=torch.uint8)
    del block
    assert benchmark.peak_memory(device) - used == pytest.approx(50e6, abs=10e6)


def test_the_script_names_all_variants():
    names = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))["VARIANTS"]
    assert names == tuple(VARIANTS)


def event(name, start, end, parent=None, kernels=(), device=DeviceType.CPU, is_user_annotation=False):
    """Return an event of a profile, in the form of torch; times in microseconds, kernels as (name, microseconds)."""
    made = FunctionEvent(0, name, 1, start, end, device_type=device, is_user_annotation=is_user_annotation)
    made.use_device = "cuda"
    made.cpu_parent = parent
    for kernel in kernels:
        made.append_kernel(kernel[0], 0, kernel[1])
    return made


def test_the_backward_of_a_gpu_counts_for_its_variant():
    """It runs in a thread of its own, so its operators have no parent in the thread of the variant.

    The GPU reports its kernels, and the time from the first to the last of a range, beside the operators.
    """
    step = event("variant eager", 0, 1000, kernels=[("variant eager", 5000)], is_user_annotation=True)
    convolution = event("aten::conv2d", 10, 20, step, kernels=[("fprop", 2000)])
    backward = event("aten::convolution_backward", 500, 700, kernels=[("dgrad", 3000), ("wgrad", 4000)])
    gpu = {"device": DeviceType.CUDA}
    events = [
        event("aten::conv2d", -20, -10, kernels=[("fprop", 1000)]),  # before the first variant
        *(step, convolution, event("cudaLaunchKernel", 11, 12, convolution)),
        *(backward, event("cudaLaunchKernel", 510, 511, backward), event("cuLaunchKernelEx", 520, 521, backward)),
        *(event("fprop", 100, 2100, **gpu), event("dgrad", 2100, 5100, **gpu), event("wgrad", 5100, 9100, **gpu)),
        event("variant eager", 100, 9100, is_user_annotation=True, **gpu),
        event("variant floor", 9500, 9600, is_user_annotation=True),
    ]
    found = benchmark.group_events(events, on_gpu=True)
    assert found == {
        "eager": {"convolution": 9.0, "launches": 3, benchmark.OUTSIDE: 0.0},
        "floor": {benchmark.OUTSIDE: 0},
    }

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from m2t_accel.benchmark.estimate import Counter


def test_operations_and_bytes_of_an_operator_are_counted():
    with Counter() as counter:
        a, b = torch.zeros(2, 3), torch.zeros(3, 4)
        a @ b.t().t()
        a.relu_()
        torch._foreach_add_([a], [a])
    assert [tuple(cost) for cost in counter.costs["mm"]] == [(2 * 2 * 3 * 4, 4 * (6 + 12 + 8))]
    assert [cost.bytes for cost in counter.costs["relu_"]] == [2 * 24]  # read and written
    assert [cost.bytes for cost in counter.costs["_foreach_add_"]] == [3 * 24]
    assert "t" not in counter.costs


@pytest.fixture
def new_accelerator():
    """Let the test choose the precision, which a process otherwise keeps."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.slow
@pytest.mark.usefixtures("new_accelerator")
def test_a_step_is_counted_without_computing_it(ask, tmp_path):
    """A student's image costs three forwards in each of two views, a teacher's one: eight forwards in all."""
    from m2t_accel.model import create_encoder

    with Counter() as counter, torch.no_grad():
        create_encoder("resnet10-quarter")(torch.zeros(1, 3, 64, 64))
    forward = sum(cost.flops for calls in counter.costs.values() for cost in calls)
    figures = {}
    for size in (2, 64):
        file = tmp_path / f"{size}.json"
        flags = ("--encoder", "resnet10-quarter", "--image_size", 64, "--hidden_size", 8, "--device_batch_size", size)
        done = ask("scripts/benchmark.py", "estimate", *flags, "--json", file)
        assert done.status == 0, done.err
        figures[size] = json.loads(file.read_text())
    # The gradient of the pixels is not needed; heads and blur are small.
    assert figures[64]["flops"] / 64 == pytest.approx(8 * forward, rel=0.15)
    assert figures[64]["flops"] == pytest.approx(32 * figures[2]["flops"], rel=0.01)
    assert 1.5 * figures[2]["bytes"] < figures[64]["bytes"] < 32 * figures[2]["bytes"]
    for least in figures[64]["least"].values():
        assert least["ms"] > least["ms_of_computation"]
    sent = figures[64]["bytes_to_average"]
    assert sent["gradients"] > 100 * sent["statistics"] / 10 > sent["agreement"]
    assert "128x2080Ti-b4096-100ep   128 processes" in done.out

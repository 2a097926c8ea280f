import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from m2t_accel.momentum_norm import (
    MomentumBatchNorm,
    commit_statistics,
    convert_batch_norm,
    copy_histories,
    momentum_layers,
    set_statistics_momentum,
)
from m2t_accel.schedules import statistics_momentum

SHAPES = [(6, 5), (6, 5, 7), (6, 5, 7, 3), (4, 5, 3, 2, 2)]


def plain_statistics(batch):
    """Return mean and unbiased variance per channel, computed by the textbook formulas."""
    values = batch.transpose(0, 1).flatten(1)
    mean = values.sum(dim=1) / values.shape[1]
    var = ((values - mean[:, None]) ** 2).sum(dim=1) / (values.shape[1] - 1)
    return mean, var


def normalised(layer, batch, mean, var):
    shape = (1, -1) + (1,) * (batch.dim() - 2)
    scaled = (batch - mean.view(shape)) / torch.sqrt(var.view(shape) + layer.eps)
    return scaled * layer.weight.view(shape) + layer.bias.view(shape)


def random_layer(num_features=5):
    layer = MomentumBatchNorm(num_features, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
def test_two_lazy_steps_equal_the_formula(shape, alpha):
    torch.manual_seed(0)
    layer = random_layer()
    history_mean, history_var = layer.running_mean.clone(), layer.running_var.clone()
    for _ in range(2):
        set_statistics_momentum([layer], alpha)
        batches = [torch.randn(shape, dtype=torch.float64) * 3 + 1 for _ in range(3)]
        statistics = [plain_statistics(batch) for batch in batches]
        for batch, (mean, var) in zip(batches, statistics, strict=True):
            expected = normalised(
                layer, batch, alpha * mean + (1 - alpha) * history_mean, alpha * var + (1 - alpha) * history_var
            )
            torch.testing.assert_close(layer(batch), expected, rtol=0, atol=1e-12)
        # Lazy: nothing has moved yet.
        torch.testing.assert_close(layer.running_mean, history_mean, rtol=0, atol=1e-12)
        commit_statistics([layer])
        history_mean = alpha * torch.stack([m for m, _ in statistics]).mean(dim=0) + (1 - alpha) * history_mean
        history_var = alpha * torch.stack([v for _, v in statistics]).mean(dim=0) + (1 - alpha) * history_var
        torch.testing.assert_close(layer.running_mean, history_mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.running_var, history_var, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["batch", "running"])
def test_the_other_kinds_of_statistics_are_torchs_batch_norm(shape, kind):
    """`batch` is torch's in training; `running` is torch's in evaluation, with a history that moves all the same."""
    torch.manual_seed(0)
    first = random_layer()
    plain = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](5).double()
    plain.load_state_dict(first.state_dict())
    layer = convert_batch_norm(copy.deepcopy(plain), kind)
    for _ in range(3):
        set_statistics_momentum([layer], statistics_momentum(1, 2, kind))
        batch = torch.randn(shape, dtype=torch.float64) * 3 + 1
        in_training = plain(batch)  # moves its running statistics by 0.1
        moved = copy.deepcopy(plain.state_dict())
        if kind == "running":
            plain.load_state_dict(layer.state_dict())
            in_training = plain.eval()(batch)
            plain.train()
        torch.testing.assert_close(layer(batch), in_training, rtol=0, atol=1e-12)
        commit_statistics([layer])
        plain.load_state_dict(moved)
        torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.running_var, plain.running_var, rtol=0, atol=1e-12)
    assert not torch.allclose(layer.running_var, first.running_var)


def test_copies_of_all_histories_change_no_bit():
    """The second forward of a layer, which has no copy left, makes its own."""
    torch.manual_seed(0)
    layers = [random_layer(), random_layer()]
    others = copy.deepcopy(layers)
    histories = [layer.running_mean.clone() for layer in layers]
    for layer in (*layers, *others):
        set_statistics_momentum([layer], 0.3)
    for _ in range(2):
        copy_histories(layers)
        for batch in torch.randn(2, 6, 5, dtype=torch.float64):
            for layer, other in zip(layers, others, strict=True):
                assert layer(batch).equal(other(batch))
    assert all(layer.running_mean.equal(history) for layer, history in zip(layers, histories, strict=True))
    commit_statistics(layers)
    commit_statistics(others)
    for layer, other in zip(layers, others, strict=True):
        assert layer.running_mean.equal(other.running_mean)
        assert layer.running_var.equal(other.running_var)


def test_an_unknown_kind_of_statistics_is_refused():
    with pytest.raises(ValueError, match="statistics 'none': give one of momentum, batch, running"):
        convert_batch_norm(nn.BatchNorm1d(5), "none")


@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_is_plain_batch_norm_with_the_history(shape):
    layer = random_layer().eval()
    plain = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](5).double().eval()
    plain.load_state_dict(layer.state_dict(), strict=True)
    batch = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(layer(batch), plain(batch))
    layer.train()
    layer(batch)
    assert layer.eval()(batch).equal(plain(batch)), "a forward in training without a commit changed evaluation"


def test_statistics_stay_float32_under_bfloat16_autocast():
    torch.manual_seed(0)
    module = convert_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    seen = []
    module[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = module(torch.randn(4, 3, 64, 64) + 10)
    assert seen[0].dtype == out.dtype == torch.bfloat16
    commit_statistics(momentum_layers(module))
    assert module[1].running_mean.dtype == torch.float32
    mean, var = plain_statistics(seen[0].double())
    # Float32 sums over 15 376 values; statistics rounded to bfloat16 would be off by 4e-3 of themselves.
    torch.testing.assert_close(module[1].running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module[1].running_var.double(), var, rtol=1e-6, atol=1e-6)


def test_a_layer_that_no_forward_used_keeps_its_history():
    used, unused = random_layer(), random_layer()
    before = {k: v.clone() for k, v in unused.state_dict().items() if "running" in k}
    used(torch.randn(6, 5, dtype=torch.float64))
    commit_statistics([used, unused])
    assert all(torch.equal(unused.state_dict()[k], v) for k, v in before.items())


class Operators(TorchDispatchMode):
    """Counts the operators that compute, each of which is at least one kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not function.is_view
        return function(*args, **(kwargs or {}))


def test_the_number_of_operators_of_a_commit_does_not_grow_with_the_layers():
    numbers = []
    for depth in (2, 20):
        layers = [random_layer() for _ in range(depth)]
        for _ in range(2):
            for layer in layers:
                layer(torch.randn(6, 5, dtype=torch.float64))
        with Operators() as operators:
            commit_statistics(layers)
        numbers.append(operators.number)
    assert numbers[0] == numbers[1] < 35


def test_a_forward_takes_one_operator_for_its_statistics():
    layer = random_layer()
    batch = torch.randn(6, 5, dtype=torch.float64)
    with Operators() as operators:
        layer(batch)
    # A copy of the history, the statistics mixed with it, the normalisation (and two buffers of the latter).
    assert operators.number <= 5


def test_layers_that_were_used_differently_are_averaged_each_by_its_own_number():
    once, twice, never = (random_layer() for _ in range(3))
    before = never.running_mean.clone()
    batches = torch.randn(3, 6, 5, dtype=torch.float64)
    once(batches[0])
    twice(batches[1])
    twice(batches[2])
    commit_statistics([once, twice, never])
    torch.testing.assert_close(once.running_mean, batches[0].mean(dim=0), rtol=0, atol=1e-12)
    torch.testing.assert_close(twice.running_mean, batches[1:].mean(dim=(0, 1)), rtol=0, atol=1e-12)
    assert never.running_mean.equal(before)


def test_a_copy_of_a_layer_has_its_own_statistics():
    layer = random_layer()
    set_statistics_momentum([layer], 0.5)
    layer(torch.randn(6, 5, dtype=torch.float64))
    other = copy.deepcopy(layer)
    before = layer.running_mean.clone()
    commit_statistics([other])
    assert layer.running_mean.equal(before)
    commit_statistics([layer])
    assert layer.running_mean.equal(other.running_mean)


def test_the_buffers_move_with_the_layer():
    layer = MomentumBatchNorm(5)
    set_statistics_momentum([layer], 0.5)
    layer = layer.double()
    layer(torch.randn(6, 5, dtype=torch.float64))
    commit_statistics([layer])
    assert {buffer.dtype for name, buffer in layer.named_buffers() if name != "num_batches_tracked"} == {torch.float64}
    assert {buffer.device.type for buffer in copy.deepcopy(layer).to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_forward_that_is_not_finite_does_not_reach_the_history(value):
    layer = random_layer()
    before = layer.running_mean.clone(), layer.running_var.clone()
    set_statistics_momentum([layer], 0.5)
    batch = torch.randn(6, 5, dtype=torch.float64)
    batch[2, 3] = value
    layer(batch)
    commit_statistics([layer])
    assert torch.equal(layer.running_mean[3], before[0][3])
    assert torch.equal(layer.running_var[3], before[1][3])
    assert not torch.equal(layer.running_mean[0], before[0][0])
    assert not layer.forwards
    assert layer.pending.eq(0).all()
    assert layer.collected.eq(0).all()


def test_one_value_per_channel_is_refused():
    with pytest.raises(ValueError, match=r"more than one value per channel.*\(1, 5\)"):
        random_layer()(torch.randn(1, 5, dtype=torch.float64))


def test_the_statistics_momentum_is_a_tensor_and_the_state_dict_is_that_of_batch_norm():
    layer = MomentumBatchNorm(5)
    assert isinstance(layer.statistics_momentum, torch.Tensor)
    assert layer.state_dict().keys() == nn.BatchNorm2d(5).state_dict().keys()


@pytest.mark.parametrize("kind", ["momentum", "batch", "running"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_computes_the_same_and_compiles_once(dtype, kind):
    """α is a tensor, so a change does not compile again. aot_eager traces as the compiler does, and runs eager code."""
    torch.manual_seed(0)
    layer = convert_batch_norm(nn.Sequential(nn.BatchNorm2d(5)), kind)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(layer), backend=count)
    for alpha in (1.0, 0.9, 0.8, 0.7):
        batches = [3 * torch.randn(6, 5, 7, 3, dtype=dtype) + 1 for _ in range(2)]
        for module in (layer, compiled):
            set_statistics_momentum(momentum_layers(module), alpha)
        for batch in batches:
            with torch.no_grad():
                torch.testing.assert_close(compiled(batch), layer(batch))
        for module in (layer, compiled):
            commit_statistics(momentum_layers(module))
        torch.testing.assert_close(momentum_layers(compiled)[0].running_var, layer[0].running_var)
    assert layer[0].running_var.mean() > 4
    assert len(graphs) == 1


def test_a_layer_that_a_module_holds_twice_is_converted_in_both_places():
    shared = nn.BatchNorm1d(4)
    converted = convert_batch_norm(nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared))
    assert converted[1] is converted[3]
    assert momentum_layers(converted) == [converted[1]]


def test_every_batch_norm_of_a_module_is_converted_with_its_weights():
    shared = nn.BatchNorm2d(4)
    module = nn.ModuleDict(
        {
            "one": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=1e-3)),
            "two": nn.Sequential(nn.Conv2d(3, 4, 1), shared),
            "again": nn.Sequential(shared, nn.SyncBatchNorm(4), nn.BatchNorm3d(4, affine=False)),
        }
    )
    with torch.no_grad():
        shared.weight.fill_(2)
        shared.running_var.fill_(3)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    converted = convert_batch_norm(module)
    assert len(momentum_layers(converted)) == 4
    assert converted["two"][1] is converted["again"][0]
    assert converted["one"][1].eps == 1e-3
    assert converted["again"][2].weight is None
    assert converted.state_dict().keys() == state.keys()
    assert all(torch.equal(converted.state_dict()[k], v) for k, v in state.items())


def test_a_batch_norm_itself_is_converted():
    assert isinstance(convert_batch_norm(nn.BatchNorm2d(3)), MomentumBatchNorm)


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "Sequential.*no BatchNorm"),
        (nn.Sequential(WithActivation(2)), r"Sequential\.0.*WithActivation"),
        (nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)), r"Sequential\.0.*track_running_stats"),
    ],
)
def test_a_layer_that_cannot_be_converted_is_named(module, message):
    with pytest.raises(ValueError, match=message):
        convert_batch_norm(module)

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, ViTConfig, ViTModel

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.evaluation.heads import Heads, build_classifier, fold_batch_norm, rate_factor
from m2t_accel.model import create_encoder, embed


def trained_by_hand(weight, features, labels, rates, momentum=0.9):
    """Return weight, bias, gain, shift and statistics after Linear, BatchNorm1d, cross entropy and SGD in numpy."""
    num_classes = len(weight)
    parameters = [weight.copy(), np.zeros(num_classes), np.ones(num_classes), np.zeros(num_classes)]
    buffers = [np.zeros_like(p) for p in parameters]
    mean_history, var_history = np.zeros(num_classes), np.ones(num_classes)
    for x, y, rate in zip(features, labels, rates, strict=True):
        weight, bias, gain, shift = parameters
        z = x @ weight.T + bias
        mean, var, n = z.mean(0), z.var(0), len(x)
        std = np.sqrt(var + 1e-5)
        normal = (z - mean) / std
        logits = normal * gain + shift
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        error = (shares - np.eye(num_classes)[y]) / n
        inner = error * gain
        back = (inner - inner.mean(0) - normal * (inner * normal).mean(0)) / std
        gradients = [back.T @ x, back.sum(0), (error * normal).sum(0), error.sum(0)]
        for i, gradient in enumerate(gradients):
            buffers[i] = momentum * buffers[i] + gradient
            parameters[i] = parameters[i] - rate * buffers[i]
        mean_history = 0.9 * mean_history + 0.1 * mean
        var_history = 0.9 * var_history + 0.1 * var * n / (n - 1)
    return [*parameters, mean_history, var_history]


def random_batches(num_steps=7, batch=12, num_features=6, num_classes=4):
    rng = np.random.default_rng(0)
    return rng.normal(size=(num_steps, batch, num_features)), rng.integers(0, num_classes, (num_steps, batch))


def test_every_head_equals_one_trained_by_hand():
    torch.manual_seed(0)
    features, labels = random_batches()
    learning_rates = (0.05, 0.5, 3.0)
    heads = Heads(6, 4, learning_rates).double()
    start = heads.heads[0][0].weight.detach().numpy().copy()
    factors = [rate_factor("cosine", step, 7) for step in range(7)]
    for x, y, factor in zip(features, labels, factors, strict=True):
        losses = heads.train_step(torch.from_numpy(x), torch.from_numpy(y), factor)
        assert losses.shape == (3,)
    for rate, (linear, norm) in zip(learning_rates, heads.heads, strict=True):
        expected = trained_by_hand(start, features, labels, [rate * factor for factor in factors])
        found = [linear.weight, linear.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a.detach().numpy(), b, rtol=1e-9, atol=1e-12)


def test_heads_start_with_the_same_small_weights():
    torch.manual_seed(0)
    heads = Heads(2048, 1000, (0.1, 1.0))
    for linear, norm in heads.heads:
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.01)
        assert abs(linear.weight.mean().item()) < 1e-4
        assert linear.bias.abs().max() == 0
        assert torch.equal(norm.weight, torch.ones(1000))
    assert torch.equal(heads.heads[0][0].weight, heads.heads[1][0].weight)
    assert heads.heads[0][0].weight is not heads.heads[1][0].weight


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        ("cosine", 0, 1.0),
        ("cosine", 50, 0.5),
        ("cosine", 75, (1 + math.cos(0.75 * math.pi)) / 2),
        ("steps", 59, 1.0),
        ("steps", 60, 0.1),
        ("steps", 79, 0.1),
        ("steps", 80, 0.01),
        ("steps", 99, 0.01),
    ],
)
def test_schedules_of_the_learning_rate(schedule, step, factor):
    assert rate_factor(schedule, step, 100) == pytest.approx(factor, rel=1e-12)


def test_a_folded_head_gives_the_same_logits():
    torch.manual_seed(0)
    features, labels = random_batches(num_steps=20)
    heads = Heads(6, 4, (1.0,))
    for x, y in zip(torch.from_numpy(features).float(), torch.from_numpy(labels), strict=True):
        heads.train_step(x, y, 1.0)
    head = heads.eval().heads[0]
    x = torch.randn(50, 6)
    torch.testing.assert_close(fold_batch_norm(head)(x), head(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["resnet", "regnet"])
def test_a_stock_classifier_gives_the_logits_of_encoder_and_head(kind):
    torch.manual_seed(0)
    encoder = create_encoder("resnet10-quarter")
    if kind == "regnet":
        config = AutoConfig.for_model("regnet", depths=[1, 1], hidden_sizes=[16, 32], embedding_size=8, groups_width=8)
        encoder = AutoModel.from_config(config)
    encoder.eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        features = embed(encoder, images)
        heads = Heads(features.shape[1], 3, (1.0,))
        heads.heads[0][1].running_mean.normal_()
        model = build_classifier(encoder, fold_batch_norm(heads.eval().heads[0]), ["cat", "dog", "owl"])
        torch.testing.assert_close(model(images).logits, heads.heads[0](features), rtol=0, atol=1e-5)
    assert type(model).__name__ == {"resnet": "ResNet", "regnet": "RegNet"}[kind] + "ForImageClassification"
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda encoder: setattr(encoder, "config", AutoConfig.for_model("clap")), "no image classifier with a ResNet"),
        (lambda encoder: setattr(encoder.config, "hidden_sizes", [8] * 4), "does not end in one linear layer"),
    ],
)
def test_an_encoder_without_a_stock_classifier_is_refused(change, message):
    encoder = create_encoder("resnet10-quarter")
    linear = torch.nn.Linear(encoder.config.hidden_sizes[-1], 3)
    change(encoder)
    with pytest.raises(ConfigurationError, match=message):
        build_classifier(encoder, linear, ["cat", "dog", "owl"])


def test_an_encoder_whose_classifier_has_no_pooler_is_refused():
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    with pytest.raises(ConfigurationError, match=r"ViTForImageClassification computes other features .* pooler\."):
        build_classifier(ViTModel(config), torch.nn.Linear(8, 3), ["cat", "dog", "owl"])

import importlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image
from helpers import ROOT, tiny
from torch import nn
from torch.utils.data import TensorDataset
from transformers import AutoModel, ResNetConfig

import m2t_accel
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.data import sources
from m2t_accel.model import is_stock


def test_every_public_name_can_be_imported():
    for name in m2t_accel.__all__:
        assert callable(getattr(m2t_accel, name)), name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = m2t_accel.no_such_name


def test_pretrain_stays_a_function_when_its_module_is_imported():
    module = importlib.import_module("m2t_accel.pretrain")
    assert m2t_accel.pretrain is module.pretrain


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys\n"
        "from m2t_accel import PretrainConfig, build_config\n"
        "print(sorted({'torch', 'numpy', 'datasets', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("given", "count"), [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_waiting_threads_soon_leave_their_core_to_others_unless_the_user_says_otherwise(given, count):
    code = "import os, m2t_accel; print(os.environ.get('GOMP_SPINCOUNT'))"
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env={**clean, **given}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{count}\n"


def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = sources.load_digits()
    some = {place: images.select(range(0, len(images), 4)) for place, images in digits.items()}
    monkeypatch.setattr(sources, "load_digits", lambda: some.copy())  # all of them would take ten seconds
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(examples) == 4
    names = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), names)
    assert names["knn"]["figures"]["top1_k20"] > 0.7
    assert names["probe"]["figures"]["top1"] > 0.3
    assert names["encoder"][1].num_batches_tracked == 0, "a copy is trained"
    assert (tmp_path / "runs" / "own" / "encoder" / "model.safetensors").exists()


@pytest.mark.parametrize("change", ["no pooling", "another first convolution"])
def test_a_changed_transformers_model_is_refused_before_the_training(tmp_path, change):
    encoder = AutoModel.from_config(ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8))
    state = torch.get_rng_state()
    assert is_stock(encoder, 24)
    assert torch.get_rng_state().equal(state)
    if change == "no pooling":  # no tensor changes
        encoder.embedder.pooler = nn.Identity()
    else:
        encoder.embedder.embedder.convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    with pytest.raises(ConfigurationError, match=r"the ResNetModel .* has been changed, .*module of your own"):
        m2t_accel.pretrain(build_config(tiny(tmp_path / "run")), encoder=encoder)
    assert not (tmp_path / "run").exists()


def test_an_encoder_without_batch_norm_is_one_line(tmp_path):
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ConfigurationError, match=r"Sequential.*BatchNorm"):
        m2t_accel.pretrain(build_config(tiny(tmp_path / "run")), encoder=encoder)
    assert not (tmp_path / "run").exists()


def noise(number):
    pixels = np.random.default_rng(number).integers(0, 256, (number, 24, 24, 3), np.uint8)
    return Dataset.from_dict({"image": list(pixels)}, features=Features({"image": Image()}))


def network(width):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1))


def test_a_complete_run_is_only_that_of_the_given_encoder(tmp_path, capsys):
    stock = [
        AutoModel.from_config(ResNetConfig(depths=[1, 1], hidden_sizes=[8, size], embedding_size=8))
        for size in (16, 32)
    ]
    for name, (encoder, other) in {"own": (network(8), network(16)), "stock": stock}.items():
        config = build_config(tiny(tmp_path / name, dataset="noise", batch_size=16, device_batch_size=8, max_steps=2))
        assert m2t_accel.pretrain(config, noise(16), encoder) is not None
        before = {tensor: value.clone() for tensor, value in encoder.state_dict().items()}
        capsys.readouterr()
        assert m2t_accel.pretrain(config, noise(16), encoder) is None
        printed = capsys.readouterr().out
        assert printed.startswith(f"{tmp_path / name} is complete, trained on noise: 16 images"), printed
        assert printed.endswith(f": {tmp_path / name}/encoder\n")
        assert all(value.equal(before[tensor]) for tensor, value in encoder.state_dict().items())
        with pytest.raises(ConfigurationError, match=rf"{name} is complete with another .*another output_dir"):
            m2t_accel.pretrain(config, noise(16), other)


def test_an_input_of_another_type_is_one_line(tmp_path):
    config = build_config(tiny(tmp_path / "run"))
    for dataset, words in (
        (np.zeros((4, 24, 24, 3), np.uint8), "numpy.ndarray: a datasets.Dataset is needed; docs/python.md"),
        (TensorDataset(torch.zeros(4, 3, 24, 24)), r"torch\S*TensorDataset: a datasets.Dataset is needed"),
        (DatasetDict({"train": noise(4)}), "DatasetDict: a datasets.Dataset is needed; give one of its splits"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            m2t_accel.pretrain(config, dataset=dataset)
    with pytest.raises(ConfigurationError, match=r"type str: a torch.nn.Module is needed; .* encoder=\"resnet18\""):
        m2t_accel.pretrain(config, encoder="resnet18")
    assert not (tmp_path / "run").exists()

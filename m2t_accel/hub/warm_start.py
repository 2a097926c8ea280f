"""Start a run from the weights and BatchNorm statistics of an encoder that exists: `--init_from`."""

from __future__ import annotations

import copy
import os
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, ResNetConfig, ResNetModel

from m2t_accel.config.evaluation import check_encoder
from m2t_accel.config.fields import ConfigurationError, count, is_hub_id
from m2t_accel.config.pretrain import ENCODERS, PretrainConfig
from m2t_accel.distributed.processes import broadcast_from_main, broadcast_object, on_all_processes
from m2t_accel.hub.encoders import LoadedEncoder, load_encoder, weights_fingerprint
from m2t_accel.hub.tensor_names import first_names
from m2t_accel.model import create_encoder, embed
from m2t_accel.momentum_norm import convert_batch_norm


class WarmStart(NamedTuple):
    """An encoder to start from; every process holds the same."""

    encoder: str  # the setting `encoder`: the name of the architecture, or else the source
    architecture: PretrainedConfig
    state: dict[str, Tensor]  # weights and statistics
    lines: tuple[str, ...]  # for the user: the source, what was not used, and another normalisation of images
    record: dict[str, str | None]  # source, fingerprint of the weights, and the Hub id if the source has one


def load_warm_start(config: PretrainConfig, accelerator: Accelerator) -> WarmStart:
    """Load the source of `config.init_from` on process 0, which sends it to the others. A collective call.

    Raises:
        ConfigurationError: the source cannot be loaded, or does not fit `config.encoder`; the same on every process.
    """
    is_main = accelerator.is_main_process
    found = on_all_processes(accelerator, lambda: read_source(config) if is_main else None)
    state = broadcast_from_main({"encoder": found.state} if is_main else None)["encoder"]
    return broadcast_object(found._replace(state={}) if is_main else None)._replace(state=state)


def read_source(config: PretrainConfig) -> WarmStart:
    """Load the source of `config.init_from`.

    Raises:
        ConfigurationError: the source cannot be loaded, or does not fit `config.encoder`.
    """
    source = config.init_from
    try:
        check_encoder(source)
        loaded = load_encoder(source)
    except ConfigurationError as error:
        raise ConfigurationError(f"--init_from {str(error).removeprefix('--encoder ')}") from None
    is_given = config.encoder != source
    model = fit(loaded, config) if is_given else loaded.model
    try:
        convert_batch_norm(copy.deepcopy(model))
    except ValueError as error:
        raise ConfigurationError(f"--init_from {source}: {error}; give a model with plain BatchNorm") from None
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise ConfigurationError(f"--init_from {source}: its weights hold values that are not finite")
    architecture = copy.deepcopy(model.config)
    # Evaluations read the network from this entry. The teacher's encoder gets its own when the run ends.
    vars(architecture).pop("momentum2_teacher", None)
    lines = [f"starts from {loaded.note}"]
    if (config.image_mean, config.image_std) != (loaded.image_mean, loaded.image_std):
        lines.append(
            f"note: images are normalised by mean {rounded(config.image_mean)} and deviation "
            f"{rounded(config.image_std)}, for {source} by {rounded(loaded.image_mean)} and "
            f"{rounded(loaded.image_std)}; --image_mean and --image_std change it"
        )
    hub_id = source if is_hub_id(source) and not os.path.exists(source) else None
    record = {"source": source, "weights": weights_fingerprint(model), "hub_id": hub_id}
    encoder = config.encoder if is_given else standard_name(model) or source
    return WarmStart(encoder, architecture, model.state_dict(), tuple(lines), record)


def rounded(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def fit(loaded: LoadedEncoder, config: PretrainConfig) -> PreTrainedModel:
    """Return the encoder `config.encoder` with the weights and statistics of the source, which must fit strictly.

    Raises:
        ConfigurationError: names or shapes differ, or the same weights compute other features.
    """
    problem = f"--init_from {config.init_from} does not fit --encoder {config.encoder}: "
    remedy = "; leave --encoder out, and the architecture is the source's"
    model = create_encoder(config.encoder).float().eval()
    needed, given = model.state_dict(), loaded.model.state_dict()
    names = {
        "missing": [name for name in needed if name not in given],
        "not used": [name for name in given if name not in needed],
        "of another shape": [name for name in needed if name in given and needed[name].shape != given[name].shape],
    }
    differing = [
        f"{count(len(found), 'tensor')} {what} ({first_names(found)})" for what, found in names.items() if found
    ]
    if differing:
        raise ConfigurationError(problem + ", ".join(differing) + remedy)
    model.load_state_dict(given, strict=True)
    images = torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, features = embed(loaded.model, images), embed(model, images)
    if expected.shape != features.shape or not torch.allclose(features, expected, rtol=1e-4, atol=1e-5):
        raise ConfigurationError(f"{problem}the tensors have the same names, but the features differ{remedy}")
    return model


def standard_name(model: PreTrainedModel) -> str | None:
    """Return the name in ENCODERS that creates this architecture; None if there is none."""
    if type(model) is not ResNetModel:
        return None
    names = ("num_channels", "embedding_size", "hidden_sizes", "depths", "layer_type", "hidden_act")
    names += ("downsample_in_first_stage", "downsample_in_bottleneck")
    for name, arguments in ENCODERS.items():
        standard = ResNetConfig(**arguments)
        if all(getattr(standard, key) == getattr(model.config, key) for key in names):
            return name
    return None

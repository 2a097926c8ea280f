"""Settings of the evaluations, and the published protocols. This module imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

from m2t_accel.config.data import ImageSettings, TrainingSettings, check_push
from m2t_accel.config.fields import ConfigurationError, convert_all, did_you_mean, is_hub_id, setting

Config = TypeVar("Config")
PUSH_TO_HUB = setting(None, "publish the encoder's run with this result on the Hub, as USER/NAME")
HUB_PRIVATE_REPO = setting(False, "create the repository of --push_to_hub as a private one")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(ImageSettings):
    """Settings of every evaluation. A view setting of None is read from the encoder's image processor.

    Raises:
        ConfigurationError: the encoder is missing, or a value is not allowed, or the default `output_dir` is in the
            folder of a run that the encoder does not belong to.
    """

    evaluation: ClassVar[str]  # name of the evaluation, in its result and its default output folder

    encoder: str | None = setting(
        None, "a run, its encoder/ folder, or a transformers or timm ResNet (folder, file or Hub id)", heading="the run"
    )
    dataset: str | None = setting(None, "labelled images: `digits`, a folder, or a Hub id, as in pretraining")
    output_dir: str | None = setting(None, "folder of the result (default: in the folder of the run)")
    random_weights: bool = setting(False, "evaluate the same network before any training, as a baseline")

    image_size: int | None = setting(
        None, "width and height of a view, in pixels (default: the encoder's)", at_least=8, heading="views"
    )
    image_mean: tuple[float, float, float] | None = setting(
        None, "mean of each channel, from 0 to 1 (default: the encoder's)", at_least=0, at_most=1
    )
    image_std: tuple[float, float, float] | None = setting(
        None, "standard deviation of each channel, from 0 to 1 (default: the encoder's)", above=0
    )
    evaluation_crop: float | None = setting(
        None,
        "side of the centre crop, as a share of the image's shorter side (default: the encoder's)",
        above=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        if self.encoder is None:
            raise ConfigurationError(
                "--encoder is needed: the folder of a run such as runs/digits, its encoder/, or a Hub id USER/NAME"
            )
        super().__post_init__()
        if self.output_dir is None:
            name = self.evaluation.replace(" ", "_").replace("-", "")
            name += "_random_weights" if self.random_weights else ""
            folder = run_folder(self.encoder)
            if own_run(self.encoder) is None and is_run(folder) and is_elsewhere(self.encoder, folder):
                raise ConfigurationError(
                    f"--encoder {self.encoder} is not the encoder of the run {folder}, which has the same name: type "
                    f"--encoder {folder} if you mean that run, else --output_dir FOLDER for the result"
                )
            object.__setattr__(self, "output_dir", str(folder / name))


def own_run(encoder: str) -> Path | None:
    """Return the folder of the run that an encoder belongs to, or None."""
    path = Path(encoder)
    if (path / "encoder").is_dir():
        return path
    return path.parent if path.is_dir() and path.resolve().name == "encoder" else None


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, which may not have ended."""
    return (folder / "config.yaml").is_file() or (folder / "encoder").is_dir()


def is_elsewhere(encoder: str, folder: Path) -> bool:
    """Return whether an encoder exists, maybe on the Hub, outside of a folder."""
    exists = os.path.exists(encoder) or is_hub_id(encoder)  # what does not exist is refused later
    return exists and not Path(encoder).resolve().is_relative_to(folder.resolve())


def run_folder(encoder: str) -> Path:
    """Return the folder of the run that an encoder belongs to, or else a folder in runs/ for its results."""
    run = own_run(encoder)
    if run is not None:
        return run
    path = Path(encoder)
    return Path("runs") / (path.resolve().stem if path.is_file() else path.resolve().name)


def check_encoder(encoder: str) -> None:
    """Check that an encoder exists, or has the form of a Hub id.

    Raises:
        ConfigurationError: the encoder does not exist, and its name is no Hub id.
    """
    is_run = encoder.startswith("runs/")  # a missing run rather than a Hub id
    if not os.path.exists(encoder) and (is_run or not is_hub_id(encoder)):
        raise ConfigurationError(
            f"--encoder {encoder}: no such file or folder; give a run such as runs/digits, a folder with a "
            "transformers or timm model, or a Hub id USER/NAME"
        )


def check_publishing(config: LinearProbeConfig | FinetuneConfig) -> None:
    """Check that the result can be published with its run, if `--push_to_hub` is given.

    Raises:
        ConfigurationError: the result cannot be published.
    """
    check_push(config.push_to_hub)
    home = run_folder(config.encoder)
    if config.push_to_hub is not None and (
        not (home / "training.json").is_file() or Path(config.output_dir).resolve().parent != home.resolve()
    ):
        raise ConfigurationError(
            f"--push_to_hub {config.push_to_hub}: a result is published with its run, but --encoder {config.encoder} "
            "is not a completed run, or --output_dir is not directly in its folder"
        )


@dataclass(frozen=True, kw_only=True)
class KnnConfig(EvaluationSettings):
    """Weighted kNN. Source: Wu et al. (arXiv 1805.01978), section 3.4, whose k and temperature are the defaults."""

    evaluation: ClassVar[str] = "knn"

    k: tuple[int, ...] = setting((20, 200), "numbers of neighbours that vote", at_least=1, heading="kNN")
    temperature: float = setting(0.07, "a neighbour votes with the weight exp(cosine / temperature)", above=0)


def build_knn(given: Mapping[str, object]) -> KnnConfig:
    """Create the configuration of a kNN evaluation.

    Raises:
        ConfigurationError: a setting is unknown, or its value is not allowed.
    """
    return KnnConfig(**convert_all(KnnConfig, given))


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(EvaluationSettings, TrainingSettings):
    """A linear classifier on the frozen encoder: Linear and BatchNorm1d, SGD with momentum 0.9, no weight decay.

    Source: arXiv 2101.07525 and its published code, for the protocols byol and moco.
    """

    evaluation: ClassVar[str] = "linear probe"

    protocol: str = setting("byol", "byol, moco or digits; `list` prints them", heading="the run")
    push_to_hub: str | None = PUSH_TO_HUB
    hub_private_repo: bool = HUB_PRIVATE_REPO

    learning_rates: tuple[float, ...] = setting(
        (0.2,),
        "peak learning rate per 256 images of batch_size; of several, the best on held-out training images is chosen",
        above=0,
        heading="training",
    )
    schedule: str = setting(
        "cosine",
        "of the learning rate: cosine (falls to 0) or steps (a tenth after 60 % and again after 80 % of the epochs)",
        choices=("cosine", "steps"),
    )
    features: str = setting(
        "augmented",
        "augmented (a new random crop in each epoch) or cached (the centre crop, once: quick, but not the protocol)",
        choices=("augmented", "cached"),
    )
    batch_size: int = setting(256, "images per optimizer step, over all devices", at_least=2, at_most=2**20)
    device_batch_size: int | None = setting(
        32, "images that go through the encoder together; the head trains on the whole batch", at_least=2
    )


class Protocol(NamedTuple):
    """A named set of settings of an evaluation, and its source."""

    settings: Mapping[str, object]
    source: str


PROTOCOLS: Mapping[str, Protocol] = {
    "byol": Protocol(
        {"learning_rates": (0.2,), "epochs": 80, "schedule": "cosine"},
        "ImageNet: BYOL's protocol, as used in arXiv 2101.07525",
    ),
    "moco": Protocol(
        {"learning_rates": (30.0,), "epochs": 100, "schedule": "steps"},
        "ImageNet: MoCo's protocol, as used in arXiv 2101.07525",
    ),
    "digits": Protocol(
        {
            "learning_rates": (0.2,),
            "epochs": 40,
            "batch_size": 64,
            "device_batch_size": 32,
            "crop_scale": (0.6, 1.0),
            "flip_probability": 0.0,
        },
        "the quickstart",
    ),
}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(EvaluationSettings, TrainingSettings):
    """Fine-tuning of the whole network with the labels of all or some images, by SGD with Nesterov momentum 0.9.

    Source: BYOL (arXiv 2006.07733), appendix C.1: batches of 1024, crops and flips, no weight decay. BYOL chooses the
    learning rate (of the whole batch) among 0.005, 0.01, 0.02, 0.05 and 0.1, and the epochs among 30 and 50, on
    held-out images. Each preset fixes one of these. No preset has been run on ImageNet by this project.

    Deviations: BYOL names no schedule; this project uses a cosine. BYOL resizes test images bicubically; this project
    resizes them bilinearly. BYOL uses SimCLR's image lists for 1 % and 10 % of the labels; this project draws the
    images by the seed, as BYOL does for other shares.
    """

    evaluation: ClassVar[str] = "fine-tuning"

    protocol: str = setting("1percent", "1percent, 10percent, all or digits; `list` prints them", heading="the run")
    push_to_hub: str | None = PUSH_TO_HUB
    hub_private_repo: bool = HUB_PRIVATE_REPO

    labels: float = setting(
        0.01,
        "share of each class's training images whose labels are used",
        above=0,
        at_most=1,
        heading="training",
    )
    learning_rate_per_256: float = setting(
        0.0125, "initial learning rate per 256 images of batch_size; it falls to 0 along a cosine", above=0
    )
    weight_decay: float = setting(0.0, "weight decay", at_least=0)
    epochs: int = setting(50, "passes over the images", at_least=1)
    batch_size: int = setting(1024, "images per optimizer step, over all devices", at_least=2, at_most=2**20)
    device_batch_size: int | None = setting(128, "images that go through the network together", at_least=2)


FINETUNE_PROTOCOLS: Mapping[str, Protocol] = {
    "1percent": Protocol({"labels": 0.01, "epochs": 50}, "ImageNet: the semi-supervised evaluation of BYOL"),
    "10percent": Protocol({"labels": 0.1, "epochs": 50}, "ImageNet: the semi-supervised evaluation of BYOL"),
    "all": Protocol({"labels": 1.0, "epochs": 30}, "ImageNet: the same, with all labels"),
    "digits": Protocol(
        {
            "labels": 0.1,
            "learning_rate_per_256": 0.2,
            "epochs": 60,
            "batch_size": 32,
            "device_batch_size": 16,
            "crop_scale": (0.6, 1.0),
            "flip_probability": 0.0,
        },
        "the quickstart",
    ),
}


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(EvaluationSettings):
    """Features of a dataset's images, written to a file, and pictures of them. Labels are optional."""

    evaluation: ClassVar[str] = "embedding"

    dataset: str | None = setting(None, "`digits`, a folder, or a Hub id, as in pretraining", heading="the run")
    split: str = setting("train", "train or validation", choices=("train", "validation"))
    format: str = setting("parquet", "parquet or safetensors", choices=("parquet", "safetensors"))

    map_images: int = setting(
        2000, "evenly spaced images on the map; 0: no map", at_least=0, at_most=20000, heading="pictures"
    )
    query_images: int = setting(8, "images shown with their nearest neighbours; 0: no picture", at_least=0, at_most=64)
    nearest: int = setting(8, "neighbours shown of each image", at_least=1, at_most=32)

    @property
    def evaluates(self) -> bool:
        return False

    @property
    def uses_labels(self) -> bool:
        return True


def build_embed(given: Mapping[str, object]) -> EmbedConfig:
    """Create the configuration of an embedding; it raises the errors of `build_knn`."""
    return EmbedConfig(**convert_all(EmbedConfig, given))


def build_linear_probe(given: Mapping[str, object]) -> LinearProbeConfig:
    """Create the configuration of a linear probe: the settings of its protocol, replaced by those given.

    The default protocol is `digits` for that dataset, otherwise `byol`.

    Raises:
        ConfigurationError: a protocol or setting is unknown, or a value is not allowed.
    """
    return build_with_protocol(LinearProbeConfig, PROTOCOLS, "byol", given)


def build_finetune(given: Mapping[str, object]) -> FinetuneConfig:
    """Create the configuration of a fine-tuning, as `build_linear_probe` does. The default protocol is `1percent`."""
    return build_with_protocol(FinetuneConfig, FINETUNE_PROTOCOLS, "1percent", given)


def build_with_protocol(
    kind: type[Config], protocols: Mapping[str, Protocol], default: str, given: Mapping[str, object]
) -> Config:
    converted = convert_all(kind, given)
    protocol = converted.setdefault("protocol", "digits" if converted.get("dataset") == "digits" else default)
    if protocol not in protocols:
        raise ConfigurationError(
            f"--protocol {protocol}: unknown{did_you_mean(protocol, protocols)}; one of {', '.join(protocols)}"
        )
    return kind(**{**protocols[protocol].settings, **converted})


def probe_table() -> str:
    """Return the protocols of the linear probe as a text table."""
    lines = ["protocol  lr/256  epochs  batch  schedule"]
    for name, protocol in PROTOCOLS.items():
        config = build_linear_probe({"protocol": name, "encoder": "any", "dataset": "digits"})
        lines.append(
            f"{name:8}  {config.learning_rates[0]:<6g}  {config.epochs:<6}  {config.batch_size:<5}  {config.schedule:8}"
            f"  {protocol.source}"
        )
    return "\n".join(lines)


def finetune_table() -> str:
    """Return the protocols of fine-tuning as a text table."""
    lines = ["protocol   labels  lr/256  epochs  batch"]
    for name, protocol in FINETUNE_PROTOCOLS.items():
        config = build_finetune({"protocol": name, "encoder": "any", "dataset": "digits"})
        lines.append(
            f"{name:9}  {config.labels:<6g}  {config.learning_rate_per_256:<6g}  {config.epochs:<6}  "
            f"{config.batch_size:<5}  {protocol.source}"
        )
    return "\n".join(lines)

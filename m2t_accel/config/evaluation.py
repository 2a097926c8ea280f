"""How an encoder is evaluated: the settings of each kind, checked, and the published protocols. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from m2t_accel.config.data import ImageSettings, TrainingSettings, check_push
from m2t_accel.config.fields import ConfigurationError, convert_all, did_you_mean, is_hub_id, setting

Config = TypeVar("Config")
PUSH_TO_HUB = setting(None, "where on the Hub the encoder's run is published, with this result: USER/NAME")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(ImageSettings):
    """Which encoder is evaluated. What is None of how it sees images is taken from the encoder's image processor.

    Raises:
        ConfigurationError: no encoder, or as ImageSettings.
    """

    evaluation: ClassVar[str]  # its name: of the folder it is written to, and in its result

    encoder: str | None = setting(
        None, "a run, its encoder/ folder, a transformers or timm ResNet (folder, file or Hub id)", heading="the run"
    )
    dataset: str | None = setting(None, "as of pretraining: `digits`, a folder, or a Hub id; with labels")
    output_dir: str | None = setting(None, "folder of the result (default: beside the encoder)")
    random_weights: bool = setting(False, "the same encoder before any training: the baseline")

    image_size: int | None = setting(
        None, "side of a view, in pixels (default: the encoder's)", at_least=8, heading="views"
    )
    image_mean: tuple[float, float, float] | None = setting(
        None, "mean per channel, 0 to 1 (default: the encoder's)", at_least=0, at_most=1
    )
    image_std: tuple[float, float, float] | None = setting(
        None, "standard deviation per channel, of 0 to 1 (default: the encoder's)", above=0
    )
    evaluation_crop: float | None = setting(
        None, "the centre is seen: this share of the shorter side (default: the encoder's)", above=0, at_most=1
    )

    def __post_init__(self) -> None:
        if self.encoder is None:
            raise ConfigurationError(
                "--encoder is needed: the folder of a run such as runs/digits, its encoder/, or a Hub id USER/NAME"
            )
        super().__post_init__()
        if self.output_dir is None:
            name = self.evaluation.replace(" ", "_").replace("-", "") + (
                "_random_weights" if self.random_weights else ""
            )
            object.__setattr__(self, "output_dir", str(home_of(self.encoder) / name))


def home_of(encoder: str) -> Path:
    """The folder that holds what belongs to an encoder: its run's, or one below runs/ for others."""
    folder = Path(encoder)
    if (folder / "encoder").is_dir():
        return folder
    if folder.is_dir() and folder.resolve().name == "encoder":
        return folder.parent
    return Path("runs") / folder.resolve().stem if folder.exists() else Path("runs") / encoder.split("/")[-1]


def check_encoder(encoder: str) -> None:
    """Check that an encoder can be found, as far as this machine knows.

    Raises:
        ConfigurationError: it cannot.
    """
    is_path = encoder.startswith("runs/")  # a run that is not there, most likely, and no Hub id
    if not os.path.exists(encoder) and (is_path or not is_hub_id(encoder)):
        raise ConfigurationError(
            f"--encoder {encoder}: no such file or folder; give a run such as runs/digits, a folder with a "
            "transformers or timm model, or a Hub id USER/NAME"
        )


def check_publishing(config: LinearProbeConfig | FinetuneConfig) -> None:
    """Check that the result can be published in the end, if that is asked for: it is, with the run that it is of.

    Raises:
        ConfigurationError: it cannot.
    """
    check_push(config.push_to_hub)
    home = home_of(config.encoder)
    if config.push_to_hub is not None and (
        not (home / "training.json").is_file() or Path(config.output_dir).resolve().parent != home.resolve()
    ):
        raise ConfigurationError(
            f"--push_to_hub {config.push_to_hub}: a run is published with its results, but {config.encoder} is none, "
            "or --output_dir is not directly in its folder"
        )


@dataclass(frozen=True, kw_only=True)
class KnnConfig(EvaluationSettings):
    """Weighted kNN. Source: Wu et al. (arXiv 1805.01978), section 3.4, whose k and temperature are the defaults."""

    evaluation: ClassVar[str] = "knn"

    k: tuple[int, ...] = setting((20, 200), "numbers of neighbours that vote, each measured", at_least=1, heading="kNN")
    temperature: float = setting(0.07, "a neighbour's vote weighs exp(cosine / this)", above=0)


def build_knn(given: Mapping[str, object]) -> KnnConfig:
    """The configuration of the settings given.

    Raises:
        ConfigurationError: an unknown setting, or a value that is not allowed.
    """
    return KnnConfig(**convert_all(KnnConfig, given))


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(EvaluationSettings, TrainingSettings):
    """A linear classifier on the frozen encoder: Linear and BatchNorm1d, SGD with momentum 0.9, no weight decay.

    Source: arXiv 2101.07525 and its published code, for both protocols.
    """

    evaluation: ClassVar[str] = "linear probe"

    protocol: str = setting("byol", "byol, moco or digits; `list` prints them", heading="the run")
    push_to_hub: str | None = PUSH_TO_HUB

    learning_rates: tuple[float, ...] = setting(
        (0.2,),
        "peak learning rates for each 256 images of batch_size: a head is trained with each, and the best on images "
        "held out of the training split is chosen",
        above=0,
        heading="training",
    )
    schedule: str = setting(
        "cosine",
        "cosine: to 0 over the run, step by step; steps: a tenth after 60 and again after 80 % of the epochs",
        choices=("cosine", "steps"),
    )
    features: str = setting(
        "augmented",
        "augmented: of a new crop in each epoch; cached: of the centre crop, once, which is quick and no protocol",
        choices=("augmented", "cached"),
    )
    batch_size: int = setting(256, "images per optimizer step, over all devices", at_least=2, at_most=2**20)
    device_batch_size: int | None = setting(
        32, "images that go through the encoder together; the head sees the whole batch", at_least=2
    )


@dataclass(frozen=True)
class Protocol:
    """A named set of settings of an evaluation."""

    settings: Mapping[str, object]
    source: str


PROTOCOLS: Mapping[str, Protocol] = {
    "byol": Protocol(
        {"learning_rates": (0.2,), "epochs": 80, "schedule": "cosine"}, "ImageNet: BYOL's, as arXiv 2101.07525 uses it"
    ),
    "moco": Protocol(
        {"learning_rates": (30.0,), "epochs": 100, "schedule": "steps"}, "ImageNet: MoCo's, as arXiv 2101.07525 uses it"
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
        "the quickstart's",
    ),
}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(EvaluationSettings, TrainingSettings):
    """The whole network trained with labels, of all or of some images: SGD with Nesterov momentum 0.9.

    Source: BYOL (arXiv 2006.07733), appendix C.1: batches of 1024, crops and flips, no weight decay; it chooses the
    learning rate among 0.005, 0.01, 0.02, 0.05 and 0.1 (of the whole batch) and the epochs among 30 and 50 on images
    held out. The presets take one of these; none has been run here on ImageNet. Deviations: it names no schedule, here
    it is a cosine; its test images are resized bicubically, here bilinearly; its 1 and 10 % are SimCLR's lists of
    images, here they are drawn by the seed, as it does for other shares.
    """

    evaluation: ClassVar[str] = "fine-tuning"

    protocol: str = setting("1percent", "1percent, 10percent, all or digits; `list` prints them", heading="the run")
    push_to_hub: str | None = PUSH_TO_HUB

    labels: float = setting(
        0.01,
        "share of the training images whose labels are used, the same of each class",
        above=0,
        at_most=1,
        heading="training",
    )
    learning_rate_per_256: float = setting(
        0.0125, "learning rate at the start for each 256 images; by a cosine to 0", above=0
    )
    weight_decay: float = setting(0.0, "weight decay", at_least=0)
    epochs: int = setting(50, "passes over the images", at_least=1)
    batch_size: int = setting(1024, "images per optimizer step, over all devices", at_least=2, at_most=2**20)
    device_batch_size: int | None = setting(128, "images that one BatchNorm sees", at_least=2)


FINETUNE_PROTOCOLS: Mapping[str, Protocol] = {
    "1percent": Protocol({"labels": 0.01, "epochs": 50}, "ImageNet: BYOL's semi-supervised evaluation"),
    "10percent": Protocol({"labels": 0.1, "epochs": 50}, "ImageNet: BYOL's semi-supervised evaluation"),
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
        "the quickstart's",
    ),
}


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(EvaluationSettings):
    """Features of a dataset's images, written to a file, and pictures of them; labels are not needed."""

    evaluation: ClassVar[str] = "embedding"

    dataset: str | None = setting(None, "as of pretraining: `digits`, a folder, or a Hub id", heading="the run")
    split: str = setting("train", "train or validation", choices=("train", "validation"))
    format: str = setting("parquet", "parquet or safetensors", choices=("parquet", "safetensors"))

    map_images: int = setting(
        2000, "images on the map, evenly chosen; 0 for no map", at_least=0, at_most=20000, heading="pictures"
    )
    query_images: int = setting(8, "images shown with their nearest; 0 for no sheet", at_least=0, at_most=64)
    nearest: int = setting(8, "how many nearest", at_least=1, at_most=32)

    @property
    def evaluates(self) -> bool:
        return False


def build_embed(given: Mapping[str, object]) -> EmbedConfig:
    """As build_knn."""
    return EmbedConfig(**convert_all(EmbedConfig, given))


def build_linear_probe(given: Mapping[str, object]) -> LinearProbeConfig:
    """The configuration of the settings given over those of the protocol they name.

    Without a name it is `byol`, or `digits` for that dataset.

    Raises:
        ConfigurationError: an unknown protocol or setting, or a value that is not allowed.
    """
    return build(LinearProbeConfig, PROTOCOLS, "byol", given)


def build_finetune(given: Mapping[str, object]) -> FinetuneConfig:
    """As build_linear_probe; without a name it is `1percent`, or `digits` for that dataset."""
    return build(FinetuneConfig, FINETUNE_PROTOCOLS, "1percent", given)


def build(kind: type[Config], protocols: Mapping[str, Protocol], usual: str, given: Mapping[str, object]) -> Config:
    converted = convert_all(kind, given)
    protocol = converted.setdefault("protocol", "digits" if converted.get("dataset") == "digits" else usual)
    if protocol not in protocols:
        raise ConfigurationError(
            f"--protocol {protocol}: unknown{did_you_mean(protocol, protocols)}; one of {', '.join(protocols)}"
        )
    return kind(**{**protocols[protocol].settings, **converted})


def protocol_table() -> str:
    """The protocols of linear probes as a table of text."""
    lines = ["protocol  lr/256  epochs  batch  schedule"]
    for name, protocol in PROTOCOLS.items():
        config = build_linear_probe({"protocol": name, "encoder": "any", "dataset": "digits"})
        lines.append(
            f"{name:8}  {config.learning_rates[0]:<6g}  {config.epochs:<6}  {config.batch_size:<5}  {config.schedule:8}"
            f"  {protocol.source}"
        )
    return "\n".join(lines)


def finetune_table() -> str:
    """The protocols of fine-tuning as a table of text."""
    lines = ["protocol   labels  lr/256  epochs  batch"]
    for name, protocol in FINETUNE_PROTOCOLS.items():
        config = build_finetune({"protocol": name, "encoder": "any", "dataset": "digits"})
        lines.append(
            f"{name:9}  {config.labels:<6g}  {config.learning_rate_per_256:<6g}  {config.epochs:<6}  "
            f"{config.batch_size:<5}  {protocol.source}"
        )
    return "\n".join(lines)

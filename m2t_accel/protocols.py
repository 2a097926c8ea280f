"""How an encoder is evaluated: the settings of each kind, checked, and the published protocols. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from m2t_accel.data_settings import ImageSettings, TrainingSettings
from m2t_accel.settings import ConfigurationError, convert_all, did_you_mean, is_hub_id, setting


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
    """A named set of settings of a linear probe."""

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


def build_linear_probe(given: Mapping[str, object]) -> LinearProbeConfig:
    """The configuration of the settings given over those of the protocol they name.

    Without a name it is `byol`, or `digits` for that dataset.

    Raises:
        ConfigurationError: an unknown protocol or setting, or a value that is not allowed.
    """
    converted = convert_all(LinearProbeConfig, given)
    protocol = converted.setdefault("protocol", "digits" if converted.get("dataset") == "digits" else "byol")
    if protocol not in PROTOCOLS:
        raise ConfigurationError(
            f"--protocol {protocol}: unknown{did_you_mean(protocol, PROTOCOLS)}; one of {', '.join(PROTOCOLS)}"
        )
    return LinearProbeConfig(**{**PROTOCOLS[protocol].settings, **converted})


def protocol_table() -> str:
    """The protocols as a table of text."""
    lines = ["protocol  lr/256  epochs  batch  schedule"]
    for name, protocol in PROTOCOLS.items():
        config = build_linear_probe({"protocol": name, "encoder": "any", "dataset": "digits"})
        lines.append(
            f"{name:8}  {config.learning_rates[0]:<6g}  {config.epochs:<6}  {config.batch_size:<5}  {config.schedule:8}"
            f"  {protocol.source}"
        )
    return "\n".join(lines)

"""The settings of a pretraining run, with their limits and help. This module imports no torch."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m2t_accel.config.data import TrainingSettings, check_dataset, check_ordered, check_push
from m2t_accel.config.fields import ConfigurationError, did_you_mean, is_hub_id, setting
from m2t_accel.schedules import KINDS_OF_STATISTICS, Schedule, schedule

# Arguments of transformers.ResNetConfig, by encoder name. All but the last two are the standard ResNets.
ENCODERS: Mapping[str, Mapping[str, object]] = {
    "resnet18": {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
    "resnet34": {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
    "resnet50": {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck"},
    "resnet101": {"depths": [3, 4, 23, 3], "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck"},
    "resnet152": {"depths": [3, 8, 36, 3], "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck"},
    "resnet10-quarter": {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [16, 32, 64, 128],
        "embedding_size": 16,
        "layer_type": "basic",
    },
    "resnet10-half": {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [32, 64, 128, 256],
        "embedding_size": 32,
        "layer_type": "basic",
    },
}


# The trackers of Accelerate. Each is also the name of its module, and of its package on PyPI.
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab", "clearml", "aim", "dvclive")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingSettings):
    """All settings of a pretraining run, checked when they are created. The defaults are those for ImageNet.

    Raises:
        ConfigurationError: a value is out of range, or two values contradict each other.
    """

    recipe: str = setting("digits", "name of a recipe; `list` prints all recipes", heading="the run")
    output_dir: str | None = setting(None, "folder that the run writes to (default: runs/RECIPE)")
    resume: str = setting(
        "auto",
        "auto: from the newest checkpoint in output_dir, if any; never: from step 0, in a folder without a run; or "
        "the folder of a checkpoint",
    )

    encoder: str = setting(
        "resnet50",
        f"{', '.join(ENCODERS)}, or a transformers model: its folder or Hub id",
        heading="student and teacher",
    )
    init_from: str | None = setting(
        None,
        "weights to start from instead of random ones: a run, a folder, a Hub id or a file; without --encoder it also "
        "gives the architecture",
    )
    hidden_size: int = setting(4096, "hidden width of the projector and the predictor", at_least=2)
    projection_size: int = setting(256, "output width of the projector and the predictor", at_least=2)
    weight_momentum: float = setting(
        0.99, "weight momentum of the teacher at step 0; it rises to 1 along a cosine", at_least=0, at_most=1
    )

    teacher_statistics: str = setting(
        "momentum",
        "what the teacher's BatchNorm normalises with in training; momentum: momentum statistics, this method; batch: "
        "the statistics of the batch, as BYOL; running: the running average",
        choices=KINDS_OF_STATISTICS,
    )

    optimizer: str = setting("sgd", "sgd or lars", choices=("sgd", "lars"), heading="training")
    learning_rate_per_256: float = setting(0.05, "peak learning rate per 256 images of batch_size", above=0)
    warmup_epochs: float = setting(10.0, "epochs of linear warmup from 1e-6; a cosine to 0 follows", at_least=0)
    weight_decay: float = setting(1e-4, "weight decay of the optimizer", at_least=0)
    optimizer_momentum: float = setting(0.9, "momentum of the optimizer", at_least=0, below=1)

    jitter_probability: float = setting(0.8, "probability of colour jitter", at_least=0, at_most=1, heading="views")
    brightness: float = setting(0.4, "brightness jitter: a factor of 1 ± this", at_least=0, at_most=1)
    contrast: float = setting(0.4, "contrast jitter: a factor of 1 ± this", at_least=0, at_most=1)
    saturation: float = setting(0.2, "saturation jitter: a factor of 1 ± this", at_least=0, at_most=1)
    hue: float = setting(0.1, "hue jitter: ± this fraction of the colour circle", at_least=0, at_most=0.5)
    grayscale_probability: float = setting(0.2, "probability of conversion to grayscale", at_least=0, at_most=1)
    blur_probability: tuple[float, float] = setting(
        (1.0, 0.1), "probability of Gaussian blur, for view 1 and view 2", at_least=0, at_most=1
    )
    blur_sigma: tuple[float, float] = setting((0.1, 2.0), "smallest and largest sigma of the blur, in pixels", above=0)
    solarize_probability: tuple[float, float] = setting(
        (0.0, 0.2), "probability of solarization, for view 1 and view 2", at_least=0, at_most=1
    )

    streaming: bool = setting(
        False,
        "read datasets on the Hub, local parquet files and tars in place, without copying them first",
        heading="data",
    )
    images_per_epoch: int | None = setting(
        None, "images of an epoch of a streamed Hub dataset (default: their number, if the Hub knows it)", at_least=2
    )
    max_bad_fraction: float = setting(
        0.001,
        "stop the run when more than this fraction of the images cannot be decoded; ten are always allowed",
        at_least=0,
        at_most=1,
    )

    checkpoint_every: tuple[str, ...] = setting(
        ("15min",),
        "intervals between checkpoints, such as 500steps 1epoch 15min; never: only when the run ends or is stopped",
        heading="checkpoints",
    )
    keep: tuple[int, int] = setting(
        (3, 0), "checkpoints to keep: the last N, and every Mth for ever (0: only the last N)", at_least=0
    )
    stop_on_collapse: bool = setting(
        False, "stop the run instead of printing a warning when the embeddings collapse to one point"
    )
    collective_timeout: float = setting(
        10.0, "minutes that a process waits for the others in a step before it reports them as lost", above=0
    )

    log_every: int = setting(10, "steps between lines of metrics.jsonl", at_least=1, heading="reports")
    evaluate_every: int | None = setting(
        None,
        "epochs between kNN evaluations; 0: never, and no images are held out (default: about ten evaluations per run "
        "if the images have labels)",
        at_least=0,
    )
    push_to_hub: str | None = setting(None, "publish the finished run to this Hub repository: USER/NAME")
    hub_private_repo: bool = setting(False, "create the repository of --push_to_hub as a private one")
    report_to: tuple[str, ...] = setting(
        ("none",),
        f"also send the metrics to {', '.join(TRACKERS)}; all (installed) or none",
        choices=(*TRACKERS, "all", "none"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ordered(self, "blur_sigma")
        if self.warmup_epochs >= self.epochs:
            raise ConfigurationError(
                f"--warmup_epochs {self.warmup_epochs:g} must be less than --epochs {self.epochs}: "
                f"add --warmup_epochs {self.epochs / 10:g}"
            )
        if self.keep[0] < 1:
            raise ConfigurationError(f"--keep {self.keep[0]} {self.keep[1]}: at least the last one must be kept")
        read_intervals(self.checkpoint_every)
        object.__setattr__(self, "output_dir", self.output_dir or f"runs/{self.recipe}")

    @property
    def evaluates(self) -> bool:
        """Return whether kNN evaluations run during training."""
        return self.evaluate_every != 0

    @property
    def checkpoint_intervals(self) -> Mapping[str, float]:
        """Return the given intervals between checkpoints, by unit (`step`, `epoch`, `minute`)."""
        return read_intervals(self.checkpoint_every)

    @property
    def trackers(self) -> tuple[str, ...]:
        """Return the names of the trackers, each once; for `all`, those that are installed."""
        if "all" in self.report_to:
            return tuple(name for name in TRACKERS if importlib.util.find_spec(name) is not None)
        return tuple(dict.fromkeys(name for name in self.report_to if name != "none"))

    @property
    def learning_rate(self) -> float:
        """Return the peak learning rate for the whole batch."""
        return self.learning_rate_per_256 * self.batch_size / 256

    def schedule(self, step: int, steps_per_epoch: int) -> Schedule:
        """Return the scheduled values of optimizer step `step`, counted from 0."""
        total_steps = self.total_steps(steps_per_epoch)
        warmup_steps = self.warmup_epochs * steps_per_epoch
        if self.max_steps is not None:
            warmup_steps = self.warmup_epochs / self.epochs * total_steps  # the same share of the run
        return schedule(
            step, total_steps, warmup_steps, self.learning_rate, self.weight_momentum, self.teacher_statistics
        )


def initial_weights(config: PretrainConfig) -> str:
    """Return the weights that a run starts from, such as "with random weights"."""
    if config.init_from is not None:
        return f"with the weights of {config.init_from}"
    return "with random weights" if config.encoder in ENCODERS else "at the start"  # pretrain() may be given any


def check_inputs(config: PretrainConfig, check_images: bool = True, check_encoder: bool = True) -> None:
    """Check that the dataset, the encoder and the trackers exist, and that a Hub login exists if the run is pushed.

    Args:
        check_images: False if the caller passes a dataset object.
        check_encoder: False if the caller passes an encoder object.

    Raises:
        ConfigurationError: one of them is missing.
    """
    if check_images:
        check_dataset(config.dataset)
        if os.path.realpath(config.dataset) == os.path.realpath(config.output_dir):
            raise ConfigurationError(
                f"--output_dir {config.output_dir} is the folder of --dataset, whose images the run would mix with its "
                "own files: give another folder"
            )
    is_known = config.encoder in ENCODERS or os.path.exists(config.encoder) or is_hub_id(config.encoder)
    if check_encoder and not is_known and config.encoder != config.init_from:
        raise ConfigurationError(
            f"--encoder {config.encoder}: unknown{did_you_mean(config.encoder, ENCODERS)}; give one of "
            f"{', '.join(ENCODERS)}, a folder with a transformers config.json, or a Hub id USER/NAME"
        )
    check_push(config.push_to_hub)
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigurationError(
                f"--report_to {name}: not installed; type `pip install {name}`, or leave the name out"
            )


def read_intervals(words: Sequence[str]) -> dict[str, float]:
    """Read words such as `500steps`, `1epoch`, `15min`, and return the numbers by unit.

    Raises:
        ConfigurationError: a word is not an interval, or two words have the same unit.
    """
    intervals: dict[str, float] = {}
    for word in words if tuple(words) != ("never",) else ():
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(step|epoch|min(?:ute)?)s?", word)
        unit = {"min": "minute"}.get(match[2], match[2]) if match else ""
        if not match or unit in intervals or not float(match[1]) or (unit == "step" and "." in match[1]):
            raise ConfigurationError(
                f"--checkpoint_every {' '.join(words)}: a number of steps, epochs or minutes is needed, such as "
                "500steps, 1epoch, 15min or several of them; or never"
            )
        intervals[unit] = float(match[1])
    return intervals

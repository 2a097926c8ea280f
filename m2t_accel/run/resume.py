"""Resume a run: restore the state of a checkpoint, check the images, and list what has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.sources import ImageData
from m2t_accel.model import quiet_transformers
from m2t_accel.run.checkpoint import Checkpoint, read_tensors
from m2t_accel.run.folder import RunFolder, Start
from m2t_accel.run.state import RunState
from m2t_accel.run.trackers import Trackers


@dataclass
class Progress:
    """The position of a run: steps done, and what has been reported and saved."""

    step: int = 0  # optimizer steps done
    skipped: int = 0  # steps in which float16 overflowed: their images were used, but nothing moved
    reported: int = -1  # the last step that has a line in metrics.jsonl
    seconds: float = 0.0  # of training before this start
    num_saved: int = 0  # checkpoints written so far
    parts: list[dict[str, object]] = field(default_factory=list)  # for each start: step, command, hardware, versions
    health: dict[str, object] = field(default_factory=dict)  # figures of the monitor for the next line of metrics
    alarms: list[str] = field(default_factory=list)  # kinds of alarms that the run has had

    @property
    def num_batches(self) -> int:
        """Global batches used so far: the position in the order of the images."""
        return self.step + self.skipped


def restore_progress(manifest: Mapping[str, object] | None) -> Progress:
    """Return the progress that the manifest of a checkpoint records; for None, the progress of a new run."""
    if manifest is None:
        return Progress()
    saved = manifest["progress"]
    return Progress(
        manifest["step"],
        saved.get("skipped", 0),
        saved["reported"],
        saved["seconds"],
        manifest["number"],
        list(saved["parts"]),
        saved.get("health", {}),
        saved.get("alarms", []),
    )


def with_settled_settings(config: PretrainConfig, manifest: Mapping[str, object]) -> PretrainConfig:
    """Return the configuration with its missing values replaced by those that the run chose at its start."""
    saved = manifest["config"]
    if config.evaluate_every is None:
        config = dataclasses.replace(config, evaluate_every=saved["evaluate_every"])
    if config.init_from is not None and config.encoder == config.init_from:
        config = dataclasses.replace(config, encoder=saved["encoder"])
    return config


def saved_architecture(config: PretrainConfig, start: Start) -> PretrainedConfig | None:
    """Return the encoder's configuration of a run that has started from `--init_from`, which may be gone."""
    saved = start.checkpoint.manifest.get("architecture") if start.checkpoint is not None else None
    if config.init_from is None or saved is None:
        return None
    return CONFIG_MAPPING[saved["model_type"]].from_dict(saved)


def restore_state(
    state: RunState, checkpoint: Checkpoint, accelerator: Accelerator
) -> tuple[list[Tensor], Tensor | None]:
    """Restore the state of a checkpoint on every process; process 0 reads it. A collective call.

    Returns:
        (2,) loss and spread of each sub-batch of this process since the last line of metrics.
        (V, 2) where each virtual device resumes in a stream; None without a stream.

    Raises:
        ConfigurationError: the tensors are those of another network.
    """
    files = read_tensors(checkpoint) if accelerator.is_main_process else None
    try:
        return state.restore(files, checkpoint.manifest)
    except ValueError as error:  # an encoder may differ between versions of transformers
        raise ConfigurationError(f"{checkpoint.path} does not fit: {error}") from None


def check_same_images(data: ImageData, manifest: Mapping[str, object]) -> None:
    """Check that the images are the same as in the run that wrote the checkpoint.

    Raises:
        ConfigurationError: the images differ.
    """
    saved = manifest["data"]
    if saved["fingerprint"] != data.fingerprint:
        raise ConfigurationError(
            f"--dataset: other images than before (then {saved['note']}; now {data.note}; the names, the order or the "
            "sizes of the shards differ): give the same --dataset, or another --output_dir"
        )


def check_same_encoder(folder: Path, encoder: nn.Module) -> None:
    """Load the weights of a complete run into an encoder, to check that its tensors have the same names and shapes.

    Raises:
        ConfigurationError: they do not.
    """
    trained = folder / "encoder"
    try:
        if isinstance(encoder, PreTrainedModel):
            with quiet_transformers():  # the names in its file may be others than those in the model
                encoder.load_state_dict(type(encoder).from_pretrained(trained).state_dict())
        else:
            load_model(encoder, trained / "model.safetensors")
    except RuntimeError:
        raise ConfigurationError(
            f"{folder} is complete with another {type(encoder).__name__} than the given encoder (names or shapes of "
            "the tensors differ): give the same encoder, or another output_dir"
        ) from None


def describe_changes(
    config: PretrainConfig, manifest: Mapping[str, object], accelerator: Accelerator, steps_per_epoch: int
) -> list[str]:
    """Return one line for each thing that differs from the run that wrote the checkpoint."""
    lines = []
    if manifest["mixed_precision"] != accelerator.mixed_precision:
        lines.append(f"note: mixed_precision is {accelerator.mixed_precision}, was {manifest['mixed_precision']}")
    if manifest["config"].get("deterministic", False) != config.deterministic:
        lines.append(f"note: deterministic is {str(config.deterministic).lower()} from this step on")
    if manifest["num_processes"] != accelerator.num_processes:
        lines.append(
            f"note: on {accelerator.num_processes} processes, was on {manifest['num_processes']}: the same images in "
            "the same sub-batches, and the same numbers up to rounding"
        )
    saved = {name: manifest["config"].get(name) for name in ("epochs", "max_steps")}
    earlier = dataclasses.replace(config, **saved)
    if earlier != config:
        before, now = (each.schedule(manifest["step"], steps_per_epoch) for each in (earlier, config))
        values = ", ".join(f"{name} {getattr(before, name):.4g} → {getattr(now, name):.4g}" for name in vars(before))
        lines.append(
            f"note: {config.length} instead of {earlier.max_steps or earlier.epochs}; from this step on the schedules "
            f"are those of {config.length}: {values}"
        )
    return lines


def open_folder(folder: RunFolder, start: Start, config_text: str, progress: Progress, trackers: Trackers) -> list[str]:
    """Lock the run's folder, start the trackers, and prepare the folder for this start.

    Returns:
        A line for each tracker, and for each checkpoint set aside.

    Raises:
        ConfigurationError: the folder cannot be written, another run has locked it, or a tracker does not start.
    """
    try:
        folder.acquire_lock()
        lines = trackers.start(progress.reported, resumes=start.checkpoint is not None)
        return lines + folder.prepare(start, config_text)
    except OSError as error:
        raise ConfigurationError(f"--output_dir {folder.path} cannot be written ({error.strerror})") from None

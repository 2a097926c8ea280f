"""Decide after each step whether to continue, save, stop or fail; all processes decide the same."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, NoReturn

from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.shards import Shards
from m2t_accel.data.streams import HubStream
from m2t_accel.data.views import describe_image, read_rows
from m2t_accel.distributed.interruption import HostCopy, StopRequestedError, StopSignals, Trouble, reach_agreement
from m2t_accel.distributed.launch import collective_timeout
from m2t_accel.distributed.processes import gather_to_all
from m2t_accel.files import write_text
from m2t_accel.run.folder import RunFolder
from m2t_accel.run.saving import Saver
from m2t_accel.schedules import Schedule
from m2t_accel.step import SubBatchResult

MIN_GRADIENT_SCALE = 1.0  # below it, the gradients in float16 are smaller than the true ones and still overflow


class Decision(NamedTuple):
    """The decisions that all processes share after a step."""

    stop: int  # the signal that asks for a stop, or 0
    save: bool
    images_lost: bool  # some process cannot read the images of the next step


class ImagesLostError(ConfigurationError):
    """The images of the next step cannot be read; the state of the run is valid, so it can be saved."""


@dataclass
class Guard:
    """Agrees with the other processes on what happens after a step, before any weight is changed."""

    config: PretrainConfig
    images: Dataset | Shards | HubStream
    folder: RunFolder
    accelerator: Accelerator
    saver: Saver
    signals: StopSignals
    steps_per_epoch: int

    @property
    def timeout(self) -> timedelta:
        return collective_timeout(self.config)

    def is_stopping(self) -> bool:
        """Return whether this process has received a signal to end the run."""
        return bool(self.signals.received)

    def agree(
        self,
        step: int,
        now: Schedule,
        results: Sequence[SubBatchResult],
        samples: Sequence[Tensor],
        lost: str | None = None,
    ) -> Decision:
        """Decide what all processes do after this step. A collective call.

        Args:
            step: optimizer steps done before this one.
            now: the scheduled values of this step.
            results: results of the sub-batches of this process.
            samples: (N,) int64 for each of these sub-batches.
            lost: why this process cannot read the images of the next step; None if it can.

        Raises:
            ConfigurationError: a loss of this step, or a state to be saved, is not finite; on every process.
        """
        self.saver.collect()
        trouble = Trouble.NONE if lost is None else Trouble.IMAGES_LOST
        if self.saver.not_finite:
            trouble = Trouble.STATE_NOT_FINITE
        awaited = [result.loss_on_host for result in results]
        skips = self.accelerator.scaler is not None
        if skips:
            # The scaler will wait for the gradients. So wait for them now, where a lost process is noticed.
            awaited.append(HostCopy(results[-1].loss))

        def find_trouble() -> Trouble:
            # With float16 the gradients of a loss that is not finite are not finite either: the step will be skipped.
            is_finite = skips or all(math.isfinite(copy.item()) for copy in awaited)
            return trouble if is_finite else Trouble.LOSS_NOT_FINITE

        agreed, stop, save = reach_agreement(
            self.timeout,
            find_trouble,
            self.signals.received,
            self.saver.is_time(),
            has_arrived=lambda: all(copy.has_arrived() for copy in awaited),
        )
        if agreed is Trouble.LOSS_NOT_FINITE:
            self.fail(step, now, results, samples)
        if agreed is Trouble.STATE_NOT_FINITE:
            self.saver.wait()
        return Decision(stop, save, agreed is Trouble.IMAGES_LOST)

    def check_scale(
        self, step: int, now: Schedule, results: Sequence[SubBatchResult], samples: Sequence[Tensor]
    ) -> None:
        """Check after a skipped step that a lower gradient scale can still help. A collective call.

        Each skipped step halves the scale; it starts at 65 536, and 2 000 steps without an overflow double it.

        Args:
            step, now, results, samples: as for `agree`.

        Raises:
            ConfigurationError: float16 has overflowed although the gradients were not scaled up; on every process.
        """
        if self.accelerator.scaler.get_scale() < MIN_GRADIENT_SCALE:
            self.fail(step, now, results, samples)

    def check_images(self, lost: str | None) -> None:
        """Check that every process can read the images of the next step. A collective call.

        Args:
            lost: why this process cannot read them; None if it can.

        Raises:
            ImagesLostError: on every process, with the reason of the first process that has one.
        """
        reason = next((reason for reason in gather_to_all(lost) if reason is not None), None)
        if reason is not None:
            raise ImagesLostError(reason)

    def stop_if_asked(self) -> None:
        """Stop if any process has received a signal. A collective call.

        Raises:
            StopRequestedError: on every process.
        """
        _, stop, _ = reach_agreement(self.timeout, stop_signal=self.signals.received)
        if stop:
            raise StopRequestedError(stop)

    def fail(self, step: int, now: Schedule, results: Sequence[SubBatchResult], samples: Sequence[Tensor]) -> NoReturn:
        """End the run because a loss or a gradient is not finite, and record the samples. A collective call.

        Raises:
            ConfigurationError: always, and on every process.
        """
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        rank, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        losses = [result.loss_on_host.item() for result in results]
        mine = [
            {"process": rank, "virtual_device": rank + turn * num_processes, "loss": str(loss)}
            | {"samples": numbers.tolist(), "images": image_paths(self.images, numbers)}
            for turn, (loss, numbers) in enumerate(zip(losses, samples, strict=True))
        ]
        parts = [part for parts in gather_to_all(mine) for part in parts]
        bad = [part for part in parts if not math.isfinite(float(part["loss"]))]
        last_good = self.saver.wait()
        file = self.folder.path / "not_finite.json"
        content = {"step": step + 1, "epoch": epoch, "step_of_epoch": step_of_epoch, "seed": self.config.seed}
        content |= {**dataclasses.asdict(now), "sub_batches": bad or parts}
        recorded = f"its samples are in {file}"
        if self.accelerator.is_main_process:
            try:
                write_text(file, json.dumps(content, indent=1) + "\n")
            except OSError as error:
                recorded = f"its samples could not be written to {file} ({error.strerror})"
        cause = f"the gradients overflow float16 in step {step + 1}"
        if bad:
            processes = ", ".join(map(str, sorted({part["process"] for part in bad})))
            cause = f"the loss is {bad[0]['loss']} in step {step + 1} on process {processes}"
        if self.accelerator.scaler is not None:
            cause += f" (at a gradient scale of {2 * self.accelerator.scaler.get_scale():g})"
            last_good += ". Try accelerate launch --mixed_precision bf16, or no"
        raise ConfigurationError(
            f"{cause}, at learning rate {now.learning_rate:.4g}; this step has changed no weight, and {recorded}. "
            f"{last_good}. Try a --learning_rate_per_256 below {self.config.learning_rate_per_256:g} or more "
            "--warmup_epochs, in another --output_dir"
        )


def image_paths(images: Dataset | Shards | HubStream, samples: Tensor) -> list[str] | None:
    """Return a readable path of each image; None for shards, which cannot be read row by row."""
    if not isinstance(images, Dataset):
        return None
    rows = read_rows(images, samples.tolist())
    return [describe_image(row, sample) for row, sample in zip(rows, samples.tolist(), strict=True)]

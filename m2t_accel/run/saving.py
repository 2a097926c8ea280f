"""When a run's state is saved, and what is done where it cannot be: the loop's side of checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path

from accelerate import Accelerator

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.sources import ImageData
from m2t_accel.distributed.processes import broadcast_object
from m2t_accel.run.checkpoint import CheckpointWriter, NotFiniteError
from m2t_accel.run.completion import VERSIONS
from m2t_accel.run.folder import RunFolder
from m2t_accel.run.report import Report
from m2t_accel.run.resume import Progress
from m2t_accel.run.state import RunState


class Saver:
    """Saves a run's state by steps, epochs and minutes, beside training: the loop waits for a copy in memory only.

    What cannot be written (a full disk) is told, and tried again at the next time; the run goes on.
    """

    def __init__(
        self,
        state: RunState,
        folder: RunFolder,
        config: PretrainConfig,
        accelerator: Accelerator,
        progress: Progress,
        report: Report,
        data: ImageData,
        steps_per_epoch: int,
    ) -> None:
        self.state = state
        self.folder = folder
        self.config = config
        self.accelerator = accelerator
        self.progress = progress
        self.report = report
        self.data = data
        self.steps_per_epoch = steps_per_epoch
        self.last_good: Path | None = None  # the last whole checkpoint that the run can go on from
        every = config.saves_every
        self.every_steps = int(every.get("step", 0)) or None
        self.every_epochs = every.get("epoch", 0) * steps_per_epoch or None
        self.every_seconds = every.get("minute", 0) * 60 or None
        self.saved_at = time.monotonic()  # not the wall clock, which may be set back
        self.last_saved = (progress.step, progress.reported)
        self.reason: str | None = None  # why the last checkpoint could not be written
        self.not_finite = False
        self.writer = CheckpointWriter(folder.checkpoints, *config.keep)

    def is_due(self, step: int) -> bool:
        """Whether the state after so many steps is to be saved, by steps or epochs."""
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        # The first step at or after each multiple, which need not be whole.
        by_epochs = self.every_epochs is not None and step // self.every_epochs > (step - 1) // self.every_epochs
        return by_steps or by_epochs

    def is_time(self) -> bool:
        """Whether it is time to save, by minutes; the first process decides for all."""
        return (
            self.accelerator.is_main_process
            and self.every_seconds is not None
            and time.monotonic() - self.saved_at >= self.every_seconds
        )

    def begin(self) -> None:
        """Copy the run's state, and start to write it while the run goes on. A collective call."""
        self.report.report_bad_images()  # a run that goes on from here does not see them again
        self.last_saved = (self.progress.step, self.progress.reported)
        self.collect(wait=True)  # the copy of the last state is about to be overwritten
        files = self.state.copy(self.report.rows)
        self.saved_at = time.monotonic()
        if files is None:  # not process 0
            return
        try:
            self.folder.hold()  # again: the folder may have been deleted
        except OSError as error:
            self.reason = self.failed(error)
            return
        self.progress.num_saved += 1
        self.writer.submit(files, self.manifest())

    def save_now(self) -> str:
        """Save the run's state if it is not saved yet, and wait. Return what there is to go on from. A collective call.

        Raises:
            ConfigurationError: the state is not finite.
        """
        if self.last_saved != (self.progress.step, self.progress.reported) or self.failing():
            self.begin()
        return self.finish()

    def manifest(self) -> dict[str, object]:
        """Return what a checkpoint says of the run, in JSON's types."""
        epoch, step_of_epoch = divmod(self.progress.step, self.steps_per_epoch)
        config = dataclasses.replace(self.config, resume="auto")
        return {
            "step": self.progress.step,
            "epoch": epoch,
            "step_of_epoch": step_of_epoch,
            "number": self.progress.num_saved,
            "num_processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "gradient_scaler": self.state.gradient_scaler(),
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()},
            "data": {"note": self.data.note, "images": len(self.data.train), "fingerprint": self.data.fingerprint},
            "progress": {
                "reported": self.progress.reported,
                "seconds": round(self.report.seconds(), 3),
                "parts": self.progress.parts,
            },
            "versions": VERSIONS,
        }

    def collect(self, wait: bool = False) -> None:
        """Take note of a checkpoint that has been written, or of why it could not be."""
        try:
            written = self.writer.finished(wait)
        except OSError as error:
            self.reason = self.failed(error)
        except NotFiniteError as error:
            self.reason, self.not_finite = str(error), True
        else:
            if written is not None:
                self.last_good, self.reason = written, None

    def failed(self, error: OSError) -> str:
        reason = error.strerror or str(error)
        self.report.say(f"warning: a checkpoint could not be written ({reason}); the run goes on. {self.whats_left()}")
        return reason

    def finish(self) -> str:
        """Wait until the last checkpoint is written; what is there in words, on every process. A collective call.

        Raises:
            ConfigurationError: it holds numbers that are not finite.
        """
        self.collect(wait=True)
        reason, not_finite, left = broadcast_object((self.reason, self.not_finite, self.whats_left()))
        if not_finite:
            raise ConfigurationError(f"{reason}, and no checkpoint is made of it. {left}")
        return left if reason is None else f"but it could not be saved ({reason}). {left}"

    def failing(self) -> bool:
        """Whether the last checkpoint could not be written; the same on every process. A collective call."""
        self.collect(wait=True)
        return broadcast_object(self.reason) is not None

    def whats_left(self) -> str:
        """The last good checkpoint, in words."""
        if self.last_good is None:
            return "There is no checkpoint yet"
        return f"The last good checkpoint is {self.last_good}"

    def close(self) -> None:
        """Let a write that has begun come to its end, whatever it is."""
        with contextlib.suppress(OSError, NotFiniteError):
            self.writer.finished()
        self.writer.close()

"""Decide when a run is saved, save it while training continues, and handle failed writes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.sources import ImageData
from m2t_accel.distributed.interruption import HostCopy, reach_agreement
from m2t_accel.distributed.launch import collective_timeout
from m2t_accel.distributed.processes import broadcast_object
from m2t_accel.run.checkpoint import CheckpointWriter, NotFiniteError
from m2t_accel.run.completion import VERSIONS
from m2t_accel.run.folder import RunFolder
from m2t_accel.run.report import Report
from m2t_accel.run.resume import Progress
from m2t_accel.run.state import RunState


@dataclass
class Saver:
    """Saves the state of a run at intervals of steps, epochs or minutes.

    The training loop waits only for a copy in memory; a thread writes it. If a write fails, for example on a full disk,
    a warning is printed and the next save tries again.
    """

    state: RunState
    folder: RunFolder
    config: PretrainConfig
    accelerator: Accelerator
    progress: Progress
    report: Report
    data: ImageData
    requests: DeviceBatches
    steps_per_epoch: int
    last_good: Path | None = None  # the newest checkpoint that the run can resume from
    reason: str | None = None  # why the last checkpoint could not be written
    not_finite: bool = False  # whether the reason is a value that is not finite

    def __post_init__(self) -> None:
        self.intervals = self.config.checkpoint_intervals
        self.saved_at = time.monotonic()  # the wall clock may be set back
        self.last_saved = (self.progress.step, self.progress.reported)
        self.writer = CheckpointWriter(self.folder.checkpoints, *self.config.keep)

    def is_due(self, step: int) -> bool:
        """Return whether the intervals in steps and epochs ask for a save after `step` steps."""
        if "step" in self.intervals and step % int(self.intervals["step"]) == 0:
            return True
        every = self.intervals.get("epoch", 0) * self.steps_per_epoch
        # The first step at or after each multiple; multiples need not be whole steps.
        return bool(every) and step // every > (step - 1) // every

    def is_time(self) -> bool:
        """Return whether the interval in minutes asks for a save now; False on all processes but process 0."""
        is_late = time.monotonic() - self.saved_at >= 60 * self.intervals.get("minute", math.inf)
        return self.accelerator.is_main_process and is_late

    def begin(self) -> None:
        """Copy the state of the run, and start to write it. A collective call."""
        self.report.report_bad_images()  # a run that resumes from this state does not report them again
        self.report.collect_health()  # it is not part of the state
        self.last_saved = (self.progress.step, self.progress.reported)
        self.collect(wait=True)  # the last write reads the memory that the new copy overwrites
        # The copy waits for the device, so wait for it now, where a lost process is noticed.
        marker = HostCopy(torch.zeros((), device=self.accelerator.device))
        reach_agreement(collective_timeout(self.config), has_arrived=marker.has_arrived)
        positions = self.requests.positions(self.progress.num_batches)
        files = self.state.copy(self.report.rows, None if positions is None else torch.from_numpy(positions))
        self.saved_at = time.monotonic()
        if files is None:  # not process 0
            return
        try:
            self.folder.acquire_lock()  # again, because the folder may have been deleted
        except OSError as error:
            self.record_failure(error)
            return
        self.progress.num_saved += 1
        self.writer.submit(files, self.manifest())

    def save_now(self) -> str:
        """Save the state of the run unless it is already saved, and wait for the write. A collective call.

        Returns:
            A sentence for the user about the checkpoint that the run can resume from.

        Raises:
            ConfigurationError: the state is not finite.
        """
        self.collect(wait=True)
        has_failed = broadcast_object(self.reason) is not None
        if has_failed or self.last_saved != (self.progress.step, self.progress.reported):
            self.begin()
        return self.wait()

    def manifest(self) -> dict[str, object]:
        """Return what a checkpoint records besides tensors, as JSON types."""
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
            "architecture": self.state.architecture(),
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()},
            "data": {"note": self.data.note, "images": len(self.data.train), "fingerprint": self.data.fingerprint},
            "progress": {
                "skipped": self.progress.skipped,
                "reported": self.progress.reported,
                "seconds": round(self.report.seconds(), 3),
                # Copies, because a thread writes them while the run continues.
                "parts": list(self.progress.parts),
                "health": dict(self.progress.health),
                "alarms": list(self.progress.alarms),
            },
            "versions": VERSIONS,
        }

    def collect(self, wait: bool = False) -> None:
        """Record which checkpoint has been written, or why it could not be."""
        try:
            written = self.writer.result(wait)
        except OSError as error:
            self.record_failure(error)
        except NotFiniteError as error:
            self.reason, self.not_finite = str(error), True
        else:
            if written is not None:
                self.last_good, self.reason = written, None

    def record_failure(self, error: OSError) -> None:
        """Print a warning about a checkpoint that could not be written."""
        self.reason = error.strerror or str(error)
        self.report.print_line(
            f"warning: a checkpoint could not be written ({self.reason}); the run continues. "
            f"{self.describe_last_good()}"
        )

    def wait(self) -> str:
        """Wait until the last checkpoint is written. A collective call.

        Returns:
            A sentence for the user, on every process, about the checkpoint that the run can resume from.

        Raises:
            ConfigurationError: the state to be saved is not finite.
        """
        self.collect(wait=True)
        reason, not_finite, last_good = broadcast_object((self.reason, self.not_finite, self.describe_last_good()))
        if not_finite:
            raise ConfigurationError(f"{reason}, so this state is not saved. {last_good}")
        return last_good if reason is None else f"This state could not be saved ({reason}). {last_good}"

    def describe_last_good(self) -> str:
        """Return a sentence about the checkpoint that the run can resume from; only process 0 knows its name."""
        if not self.accelerator.is_main_process:
            return f"The checkpoints are in {self.folder.checkpoints}"
        if self.last_good is None:
            return "There is no checkpoint yet"
        return f"The last good checkpoint is {self.last_good}"

    def close(self) -> None:
        """Wait for a write that is in progress, and ignore its errors."""
        with contextlib.suppress(OSError, NotFiniteError):
            self.writer.result()
        self.writer.close()

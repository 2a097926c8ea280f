"""When a run's state is saved, and what is done where it cannot be: the loop's side of checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate import Accelerator

from m2t_accel.checkpoint import CheckpointWriter, NotFiniteError
from m2t_accel.launch import tell_all
from m2t_accel.recipes import PretrainConfig
from m2t_accel.run_folder import RunFolder
from m2t_accel.run_state import RunState
from m2t_accel.settings import ConfigurationError


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
        steps_an_epoch: int,
        say: Callable[[str], None],
        last_good: Path | None = None,
        number: int = 0,
    ) -> None:
        """last_good, number: the checkpoint from which the run went on, and how many were written before."""
        self.state = state
        self.folder = folder
        self.accelerator = accelerator
        self.say = say
        self.last_good = last_good
        self.number = number
        every = config.saves_every
        self.every_steps = int(every.get("step", 0)) or None
        self.every_epochs = every.get("epoch", 0) * steps_an_epoch or None
        self.every_seconds = every.get("minute", 0) * 60 or None
        self.saved = time.monotonic()  # which a clock that is set back does not move
        self.reason: str | None = None  # why the last one could not be written
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
            and time.monotonic() - self.saved >= self.every_seconds
        )

    def save(self, manifest: Mapping[str, object], rows: list) -> None:
        """Copy the state and begin to write it; a collective call.

        manifest: what is known of the run beside its tensors; rows: as RunState.copy.
        """
        self.collect(wait=True)  # its copy is about to be used again
        files = self.state.copy(rows)
        self.saved = time.monotonic()
        if files is None:
            return
        try:
            self.folder.hold()  # again: it may have been deleted
        except OSError as error:
            self.reason = self.failed(error)
            return
        self.number += 1
        self.writer.submit(files, {**manifest, "number": self.number})

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
        self.say(f"warning: a checkpoint could not be written ({reason}); the run goes on. {self.whats_left()}")
        return reason

    def finish(self) -> str:
        """Wait until the last checkpoint is written; what is there in words, on every process. A collective call.

        Raises:
            ConfigurationError: it holds numbers that are not finite.
        """
        self.collect(wait=True)
        reason, not_finite, left = tell_all((self.reason, self.not_finite, self.whats_left()))
        if not_finite:
            raise ConfigurationError(f"{reason}, and no checkpoint is made of it. {left}")
        return left if reason is None else f"but it could not be saved ({reason}). {left}"

    def failing(self) -> bool:
        """Whether the last checkpoint could not be written; the same on every process. A collective call."""
        self.collect(wait=True)
        return tell_all(self.reason) is not None

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

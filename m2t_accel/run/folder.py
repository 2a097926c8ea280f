"""The folder of a run: its lock, its files, and the checkpoint that a run resumes from."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.files import JsonLines, write_text
from m2t_accel.run.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    good_checkpoints,
    list_checkpoints,
    remove_leftovers,
    set_aside,
    verify,
)
from m2t_accel.run.output_dir import COMPLETE, check_same_settings, missing_files, read_training


class Start(NamedTuple):
    """The start of a run: at step 0, from a checkpoint, or not at all because it is complete."""

    checkpoint: Checkpoint | None = None  # None: at step 0
    remarks: tuple[str, ...] = ()  # lines for the user about damaged checkpoints
    complete: bool = False  # nothing is left to train
    init_from: Mapping[str, str | None] | None = None  # source and fingerprint of the weights of a warm start


class RunFolder:
    """The folder of a run; only process 0 writes to it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self.bad_images = JsonLines(self.path / "bad_images.jsonl")
        self.lock_file = self.path / ".lock"
        self.lock: int | None = None  # the descriptor of the lock file, while it is locked

    def find_start(self, config: PretrainConfig) -> Start:
        """Return where the run starts, as `config.resume` asks. Write nothing.

        Raises:
            ConfigurationError: the checkpoint is damaged or of another run, or all checkpoints are damaged.
        """
        if config.resume == "never":
            return Start()
        if config.resume != "auto" and self.continues_from(config):
            start = self.find_start(dataclasses.replace(config, resume="auto"))
            remark = f"{self.path} already continues from {config.resume}; to start there again, give another folder"
            return start._replace(remarks=(remark, *start.remarks))
        if config.resume != "auto":
            path = Path(config.resume)
            if not path.is_dir():
                raise ConfigurationError(
                    f"--resume {path}: no such folder; give auto, never, or a checkpoint such as "
                    f"{self.checkpoints}/step-N"
                )
            try:
                start = Start(verify(path))
            except DamagedCheckpointError as error:
                others = ", ".join(map(str, list_checkpoints(path.parent))) or "none"
                raise ConfigurationError(
                    f"--resume {path} is not a complete checkpoint ({error}): give another of that folder ({others}), "
                    "or --resume auto"
                ) from None
        else:
            training = read_training(self.path)
            missing = missing_files(self.path, training) if training is not None else []
            remarks = []
            if self.metrics.path.name in missing:  # no checkpoint holds the metrics
                missing.remove(self.metrics.path.name)
                remarks.append(f"{self.metrics.path} is missing, and cannot be written again")
            if training is not None and not missing:
                return Start(complete=True, remarks=tuple(remarks))
            if missing:
                remarks.append(f"missing in {self.path}: {', '.join(missing)}; written again from the last checkpoint")
            damaged: list[tuple[Path, str]] = []
            start = Start(next(good_checkpoints(self.checkpoints, damaged), None))
            remarks += [f"damaged, not used: {path} ({why})" for path, why in damaged]
            start = start._replace(remarks=tuple(remarks))
            if missing and start.checkpoint is None:
                raise ConfigurationError(
                    f"--output_dir {self.path}: the run was complete, but lacks {', '.join(missing)}, and no intact "
                    "checkpoint is left to write that from: remove the folder to train again, or give another one"
                )
            if missing and start.checkpoint.manifest["step"] * config.batch_size < training.get("images_seen", 0):
                raise ConfigurationError(
                    f"--output_dir {self.path}: the run was complete, but lacks {', '.join(missing)}, and its newest "
                    "checkpoint is of an earlier step: to train again from there, type --resume "
                    f"{start.checkpoint.path}"
                )
            if damaged and start.checkpoint is None:
                raise ConfigurationError(
                    f"--output_dir {self.path}: all checkpoints are damaged ({'; '.join(start.remarks)}): repair one, "
                    "or remove the folder checkpoints/ to start over"
                )
        if start.checkpoint is not None:
            path = str(start.checkpoint.path)
            check_same_settings(config, start.checkpoint.manifest["config"], path, more_epochs=config.resume != "auto")
        return start

    def continues_from(self, config: PretrainConfig) -> bool:
        """Return whether an earlier start with the same settings has resumed from `config.resume`, and has saved."""
        newest = next(good_checkpoints(self.checkpoints, []), None)
        parts = newest.manifest["progress"].get("parts", []) if newest is not None else []
        if all(part.get("resume") != config.resume for part in parts):
            return False
        try:
            check_same_settings(config, newest.manifest["config"], str(newest.path), more_epochs=False)
        except ConfigurationError:  # even more epochs
            return False
        return True

    def acquire_lock(self) -> None:
        """Create the folder if it is missing, and lock it for as long as this process lives.

        Call it before each save: the folder may have been deleted since the last call.

        Raises:
            ConfigurationError: another run has locked it.
            OSError: the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.lock is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.lock), os.stat(self.lock_file)):
                    return
            self.close()
        lock = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # lockf locks for this process alone: forked workers, which survive a kill for seconds, hold no lock.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            holder = os.read(lock, 200).decode(errors="replace").strip()
            os.close(lock)
            raise ConfigurationError(
                f"--output_dir {self.path}: another run is writing to it ({holder}): wait, or give another folder"
            ) from None
        except OSError:
            pass  # some network disks have no locks; the run continues without one
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self.lock = lock

    def close(self) -> None:
        """Release the lock."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def prepare(self, start: Start, config_text: str) -> list[str]:
        """Bring the folder to the state it had at the step of the start, and write config.yaml.

        Call `acquire_lock` first. Metrics of later steps are removed, and checkpoints of later steps are set aside.

        Returns:
            A line for the user about each checkpoint set aside.

        Raises:
            ConfigurationError: another run has started in the folder since `find_start`.
            OSError: the folder cannot be written.
        """
        lines = []
        remove_leftovers(self.checkpoints)
        if start.checkpoint is None:
            if list_checkpoints(self.checkpoints):
                raise ConfigurationError(f"--output_dir {self.path}: another run has just started in it")
            self.metrics.filter(lambda row: False)
            self.bad_images.filter(lambda row: False)
        else:
            step, origin = start.checkpoint.manifest["step"], start.checkpoint.path.parent.parent
            # This step has no line yet if the run was stopped before its evaluation.
            reported = start.checkpoint.manifest["progress"]["reported"]
            if origin.resolve() != self.path.resolve():
                for path in (self.metrics.path, self.bad_images.path):
                    if (origin / path.name).exists() and not path.exists():
                        shutil.copyfile(origin / path.name, path)
            self.metrics.filter(lambda row: row["step"] <= reported)
            self.bad_images.filter(lambda row: True)
            for path in list_checkpoints(self.checkpoints):
                if int(path.name.removeprefix("step-")) > step:
                    lines.append(f"{path} is set aside as {set_aside(path).name}; you may remove it")
        (self.path / COMPLETE).unlink(missing_ok=True)
        write_text(self.path / "config.yaml", config_text)
        return lines

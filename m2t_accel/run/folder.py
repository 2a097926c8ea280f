"""The folder of a run: held by one run at a time, its files whole, and where a run in it goes on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
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
from m2t_accel.run.output_dir import check_same_settings

COMPLETE = "training.json"  # written last of all: where it is, the run is complete


class Start(NamedTuple):
    """Where a run begins."""

    checkpoint: Checkpoint | None = None  # None: at step 0
    remarks: tuple[str, ...] = ()  # for people: what is damaged
    complete: bool = False  # there is nothing left to train


class RunFolder:
    """The folder of a run, as its first process sees it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self.bad_images = JsonLines(self.path / "bad_images.jsonl")
        self.lock_file = self.path / ".lock"
        self.lock: int | None = None

    def find_start(self, config: PretrainConfig) -> Start:
        """Where the run goes on, by `--resume`; nothing is written.

        Raises:
            ConfigurationError: the checkpoint is of another run or damaged, or all checkpoints are damaged.
        """
        if config.resume == "never":
            return Start()
        if config.resume != "auto":
            path = Path(config.resume)
            try:
                start = Start(verify(path))
            except DamagedCheckpointError as error:
                others = ", ".join(map(str, list_checkpoints(path.parent))) or "none"
                raise ConfigurationError(
                    f"--resume {path}: not a whole checkpoint ({error}); those beside it: {others}; or --resume auto"
                ) from None
        else:
            if (self.path / COMPLETE).exists():
                return Start(complete=True)
            damaged: list[tuple[Path, str]] = []
            start = Start(next(good_checkpoints(self.checkpoints, damaged), None))
            start = start._replace(remarks=tuple(f"damaged, not used: {path} ({why})" for path, why in damaged))
            if damaged and start.checkpoint is None:
                raise ConfigurationError(
                    f"--output_dir {self.path}: no checkpoint is whole ({'; '.join(start.remarks)}): repair one, or "
                    "remove the folder checkpoints/ to begin anew"
                )
        if start.checkpoint is not None:
            where = str(start.checkpoint.path)
            check_same_settings(config, start.checkpoint.manifest["config"], where, grown=config.resume != "auto")
        return start

    def hold(self) -> None:
        """Make the folder where it is missing, and let no other run write to it while this process lives.

        To be called again now and then: the folder may have been deleted meanwhile.

        Raises:
            ConfigurationError: another run holds it.
            OSError: it cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.lock is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.lock), os.stat(self.lock_file)):
                    return
            self.close()
        lock = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Of the process alone: after a kill the workers that it forked, which live on for seconds, hold nothing.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # either, says POSIX
            holder = os.read(lock, 200).decode(errors="replace").strip()
            os.close(lock)
            raise ConfigurationError(
                f"--output_dir {self.path}: another run is writing to it ({holder}): wait, or give another folder"
            ) from None
        except OSError:
            pass  # a network's disk without locks: nothing is worse than before
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self.lock = lock

    def close(self) -> None:
        """Let others have the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def prepare(self, start: Start, config_text: str) -> list[str]:
        """Make the folder what it was at the start's step; what was done comes back in words. It must be held.

        Raises:
            ConfigurationError: another run has begun there since `find_start`.
            OSError: it cannot be written.
        """
        told = []
        remove_leftovers(self.checkpoints)
        if start.checkpoint is None:
            if list_checkpoints(self.checkpoints):
                raise ConfigurationError(f"--output_dir {self.path}: another run has just begun there")
            self.metrics.keep(lambda row: False)
            self.bad_images.keep(lambda row: False)
        else:
            step, origin = start.checkpoint.manifest["step"], start.checkpoint.path.parent.parent
            # Not that of the step itself where its evaluation was still to come.
            reported = start.checkpoint.manifest["progress"]["reported"]
            if origin.resolve() != self.path.resolve():
                for mine, name in ((self.metrics, "metrics.jsonl"), (self.bad_images, "bad_images.jsonl")):
                    if (origin / name).exists() and not mine.path.exists():
                        shutil.copyfile(origin / name, mine.path)
            self.metrics.keep(lambda row: row["step"] <= reported)
            self.bad_images.keep(lambda row: True)
            for path in list_checkpoints(self.checkpoints):
                if int(path.name.removeprefix("step-")) > step:
                    told.append(f"{path} is set aside as {set_aside(path).name}; remove it when you like")
        (self.path / COMPLETE).unlink(missing_ok=True)
        write_text(self.path / "config.yaml", config_text)
        return told

"""Checkpoints on the disk: write, verify, read, prune.

A checkpoint is a folder `step-N` with safetensors files and a manifest.json, which records the size and the SHA-256 of
each file. It is written under a temporary name, flushed to the disk and renamed. So a folder `step-N` was complete when
it was written, and `verify` checks that it still is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2t_accel.files import flush, let_others_read, replace_folder

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest and the names of the tensors; `verify` refuses any other
Manifest = Mapping[str, object]


class DamagedCheckpointError(Exception):
    """A checkpoint has changed since it was written; the message names the file and the damage."""


class NotFiniteError(Exception):
    """A tensor to be saved holds values that are not finite."""


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    path: Path
    manifest: Manifest


def write_checkpoint(folder: Path, files: Mapping[str, Mapping[str, Tensor]], manifest: Manifest) -> Path:
    """Write the checkpoint `folder/step-N`, which replaces an older one of that name. Return its path.

    Args:
        files: tensors by name, for each file.
        manifest: everything else that the checkpoint records, as JSON types; its `step` is N.

    Raises:
        OSError: the checkpoint cannot be written; the partial files are removed.
        NotFiniteError: a tensor is not finite; the partial files are removed.
    """
    target = folder / f"step-{manifest['step']}"
    temporary = folder / f".{target.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        described = {}
        for name, tensors in files.items():
            check_finite(tensors)
            path = temporary / f"{name}.safetensors"
            try:
                save_file(dict(tensors), path)
            except SafetensorError as error:  # raised for a full disk
                raise OSError(None, str(error), str(path)) from None
            let_others_read(path)
            described[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
            flush(path)
        text = serialize({**manifest, "format": FORMAT, "files": described})
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        flush(temporary / MANIFEST)
        flush(temporary)
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check that all values are finite.

    This takes one pass over each tensor and no mask of its size: minimum and maximum are NaN if any value is NaN.

    Raises:
        NotFiniteError: a value is not finite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise NotFiniteError(f"{name} holds values that are not finite")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def serialize(content: Manifest) -> str:
    """Return the text of a manifest.json: the content and its own hash."""
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    return json.dumps({"manifest": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, damaged or not, the one with the highest step first."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    found = [(int(match[1]), folder / name) for name in names if (match := re.fullmatch(r"step-(\d+)", name))]
    return [path for _, path in sorted(found, reverse=True)]


def verify(path: Path) -> Checkpoint:
    """Check every byte of a checkpoint. Return it with its manifest.

    Raises:
        DamagedCheckpointError: a file is missing, cut or changed, or the format is that of another version.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)["manifest"]
        if serialize(manifest) != text:
            raise DamagedCheckpointError(f"{MANIFEST} has changed since it was written")
        if manifest["format"] != FORMAT:
            raise DamagedCheckpointError(
                f"{MANIFEST} is of format {manifest['format']}, and this version reads {FORMAT}"
            )
        for name, described in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != described["size"]:
                raise DamagedCheckpointError(f"{name} has {size:,} bytes instead of {described['size']:,}")
            if sha256(path / name) != described["sha256"]:
                raise DamagedCheckpointError(f"{name} has changed since it was written")
    except OSError as error:
        raise DamagedCheckpointError(f"{Path(error.filename or path).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpointError(f"{MANIFEST} has changed since it was written") from None
    return Checkpoint(path, manifest)


def good_checkpoints(folder: Path, damaged: list[tuple[Path, str]]) -> Iterator[Checkpoint]:
    """Yield the intact checkpoints of a folder, the newest first; append the damaged ones to `damaged`.

    Args:
        damaged: list to which this adds the path and the damage of each damaged checkpoint that it finds.
    """
    for path in list_checkpoints(folder):
        try:
            yield verify(path)
        except DamagedCheckpointError as error:
            damaged.append((path, str(error)))


def read_tensors(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file, in main memory."""
    names = sorted(checkpoint.manifest["files"])
    return {name.removesuffix(".safetensors"): load_file(checkpoint.path / name) for name in names}


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Remove old checkpoints.

    A folder `step-N` without a readable manifest stays.

    Args:
        keep_last: number of the newest checkpoints to keep.
        keep_every: also keep each checkpoint whose number is a multiple of this; 0: none.
    """
    for path in list_checkpoints(folder)[keep_last:]:
        try:
            number = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["manifest"]["number"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not keep_every or number % keep_every:
            # Renamed first, so that a half-removed folder does not look like a checkpoint.
            doomed = path.with_name(f".{path.name}.pruned")
            shutil.rmtree(doomed, ignore_errors=True)
            with contextlib.suppress(OSError):  # a checkpoint that cannot be removed only takes space
                os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of a killed writer; no writer may be running."""
    for path in folder.glob(".step-*"):
        whole = path.with_name(path.name[1:].removesuffix(".old"))
        if path.suffix == ".old" and not whole.exists():
            os.rename(path, whole)  # killed between the two renames of replace_folder
        else:
            shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that resume and pruning ignore it. Return the new path."""
    for attempt in range(1000):
        renamed = path.with_name(f"set-aside-{path.name}" + (f"-{attempt}" if attempt else ""))
        if not renamed.exists():
            os.rename(path, renamed)
            return renamed
    raise OSError(None, "too many checkpoints were set aside", str(path))


class CheckpointWriter:
    """Writes checkpoints one at a time, in a background thread."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None

    def submit(self, files: Mapping[str, Mapping[str, Tensor]], manifest: Manifest) -> None:
        """Start to write a checkpoint. Call `result` for the previous one first.

        The tensors must not change until `result` returns.
        """
        self.pending = self.thread.submit(self.write, files, manifest)

    def write(self, files: Mapping[str, Mapping[str, Tensor]], manifest: Manifest) -> Path:
        path = write_checkpoint(self.folder, files, manifest)
        prune(self.folder, self.keep_last, self.keep_every)
        return path

    def result(self, wait: bool = True) -> Path | None:
        """Return the checkpoint that has been written since the last call; None if there is none.

        Args:
            wait: whether to wait for a write that is in progress.

        Raises:
            OSError: the checkpoint could not be written.
            NotFiniteError: its values are not finite.
        """
        if self.pending is None or not (wait or self.pending.done()):
            return None
        pending, self.pending = self.pending, None
        return pending.result()

    def close(self) -> None:
        """Wait for a write that is in progress, and end the thread."""
        self.thread.shutdown(wait=True)

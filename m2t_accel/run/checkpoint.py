"""Checkpoints as files: written whole or not at all, verified before they are read, kept or removed.

A checkpoint is a folder `step-N` of safetensors files and a manifest.json, which holds the size and the SHA-256 of each
file. It is written under another name, flushed to the disk and renamed; what bears the name `step-N` was whole once,
and `verify` tells whether it still is.
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
FORMAT = 1  # of the manifest and the names of tensors; a reader refuses another
Manifest = Mapping[str, object]


class DamagedCheckpointError(Exception):
    """A checkpoint is not what was written; the message says which file, and how."""


class NotFiniteError(Exception):
    """A tensor that was to be saved holds values that are not finite."""


class Checkpoint(NamedTuple):
    """A checkpoint that was verified."""

    path: Path
    manifest: Manifest


def write_checkpoint(folder: Path, files: Mapping[str, Mapping[str, Tensor]], manifest: Manifest) -> Path:
    """Write `folder/step-N` with a file of tensors for each name in `files`; its path out.

    manifest: what to know beside the tensors, in JSON's types, with `step` among it.

    Raises:
        OSError: it cannot be written; nothing is left of it.
        NotFiniteError: a tensor is not finite; nothing is left of it.
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
            except SafetensorError as error:  # its way to say that the disk is full
                raise OSError(None, str(error), str(path)) from None
            let_others_read(path)
            described[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
            flush(path)
        text = serialised({**manifest, "format": FORMAT, "files": described})
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        flush(temporary / MANIFEST)
        flush(temporary)
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check that all values are finite, in one pass over each tensor and without a mask of its size.

    Raises:
        NotFiniteError: some are not.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise NotFiniteError(f"{name} holds values that are not finite")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def serialised(content: Manifest) -> str:
    """The text of a manifest: JSON, with a hash of its own."""
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    return json.dumps({"manifest": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest (by its step, whatever the clock said) first."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    found = [(int(match[1]), folder / name) for name in names if (match := re.fullmatch(r"step-(\d+)", name))]
    return [path for _, path in sorted(found, reverse=True)]


def verify(path: Path) -> Checkpoint:
    """The checkpoint in a folder `step-N`, every byte of it checked.

    Raises:
        DamagedCheckpointError: a file is missing, cut or changed, or of another version's format.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)["manifest"]
        if serialised(manifest) != text:
            raise DamagedCheckpointError(f"{MANIFEST} is not what was written")
        if manifest["format"] != FORMAT:
            raise DamagedCheckpointError(
                f"{MANIFEST} is of format {manifest['format']}, and this version reads {FORMAT}"
            )
        for name, described in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != described["size"]:
                raise DamagedCheckpointError(f"{name} has {size:,} bytes instead of {described['size']:,}")
            if sha256(path / name) != described["sha256"]:
                raise DamagedCheckpointError(f"{name} is not what was written")
    except OSError as error:
        raise DamagedCheckpointError(f"{Path(error.filename or path).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpointError(f"{MANIFEST} is not what was written") from None
    return Checkpoint(path, manifest)


def good_checkpoints(folder: Path, damaged: list[tuple[Path, str]]) -> Iterator[Checkpoint]:
    """Those that verify, the newest first; the others are added to `damaged`, with the reason."""
    for path in list_checkpoints(folder):
        try:
            yield verify(path)
        except DamagedCheckpointError as error:
            damaged.append((path, str(error)))


def read_tensors(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file, in the main memory."""
    names = sorted(checkpoint.manifest["files"])
    return {name.removesuffix(".safetensors"): load_file(checkpoint.path / name) for name in names}


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Remove all checkpoints but the last `keep_last` and those whose number is a multiple of `keep_every`, if not 0.

    A folder that is in the way, such as one without a manifest, stays.
    """
    for path in list_checkpoints(folder)[keep_last:]:
        try:
            number = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["manifest"]["number"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not keep_every or number % keep_every:
            # First another name: what is half removed must not look like a checkpoint.
            doomed = path.with_name(f".{path.name}.pruned")
            shutil.rmtree(doomed, ignore_errors=True)
            with contextlib.suppress(OSError):  # what cannot be removed costs room, and no more
                os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a writer that was killed has left. No other may be at work."""
    for path in folder.glob(".step-*"):
        whole = path.with_name(path.name[1:].removesuffix(".old"))
        if path.suffix == ".old" and not whole.exists():
            os.rename(path, whole)  # killed between two renames; whether it is good, `verify` will say
        else:
            shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Give a checkpoint a name under which no run takes it up, and nothing removes it; its new path out."""
    for attempt in range(1000):
        other = path.with_name(f"set-aside-{path.name}" + (f"-{attempt}" if attempt else ""))
        if not other.exists():
            os.rename(path, other)
            return other
    raise OSError(None, "too many checkpoints were set aside", str(path))


class CheckpointWriter:
    """Writes checkpoints beside training, one at a time, in a thread of its own."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None

    def submit(self, files: Mapping[str, Mapping[str, Tensor]], manifest: Manifest) -> None:
        """Begin to write; the tensors must not change until `finished`. The writer before must be finished."""
        self.pending = self.thread.submit(self.write, files, manifest)

    def write(self, files: Mapping[str, Mapping[str, Tensor]], manifest: Manifest) -> Path:
        path = write_checkpoint(self.folder, files, manifest)
        prune(self.folder, self.keep_last, self.keep_every)
        return path

    def finished(self, wait: bool = True) -> Path | None:
        """The checkpoint that has been written since the last call, or None if there is none (yet).

        Raises:
            OSError: it could not be written.
            NotFiniteError: it was not, because its values are not finite.
        """
        if self.pending is None or not (wait or self.pending.done()):
            return None
        pending, self.pending = self.pending, None
        return pending.result()

    def close(self) -> None:
        """Let a write that has begun come to its end."""
        self.thread.shutdown(wait=True)

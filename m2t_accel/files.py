"""Atomic writes of files and folders, and files of JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path


class JsonLines:
    """A file of JSON lines that grows by whole lines.

    Lines that do not fit on a full disk wait in memory, and the next call of `add` writes them. A line that a killed
    process left unfinished is not read, and `add` overwrites it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []  # lines that could not be written yet
        self.length: int | None = None  # bytes of whole lines in the file; None: not known yet

    def read(self) -> Iterator[dict[str, object]]:
        """Yield the whole lines of the file, then the lines that wait to be written."""
        with contextlib.suppress(FileNotFoundError), self.path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.endswith("\n"):
                    with contextlib.suppress(ValueError):
                        yield json.loads(line)
        for line in self.waiting:
            yield json.loads(line)

    def filter(self, keep: Callable[[dict[str, object]], bool]) -> None:
        """Keep only the lines for which `keep` is true; remove the file if no line is left."""
        rows = [row for row in self.read() if keep(row)]
        self.waiting, self.length = [], None
        if rows:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        else:
            self.path.unlink(missing_ok=True)

    def add(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Append lines.

        Raises:
            OSError: the lines cannot be written now; the next call tries again.
        """
        self.waiting += [json.dumps(row) + "\n" for row in rows]
        if not self.waiting:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            if self.length is None or self.length > file.seek(0, os.SEEK_END):
                file.seek(0)
                self.length = file.read().rfind(b"\n") + 1
            file.seek(self.length)
            file.truncate()
            text = "".join(self.waiting).encode()
            file.write(text)
            file.flush()
            self.length += len(text)
            self.waiting.clear()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, with the same suffix; rename it to `path` after the block.

    The block writes a file or a folder. If it raises, the temporary path is removed and `path` stays unchanged.

    Raises:
        OSError: the rename failed.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process of the same number, as in a container
    try:
        yield temporary
        if temporary.is_dir():
            replace_folder(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, content: str) -> None:
    """Write a text file atomically: readers see the old content or the new, never a part of it.

    Raises:
        OSError: the file cannot be written; the old content stays.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """Yield the whole lines of a metrics.jsonl."""
    return JsonLines(path).read()


def let_others_read(path: Path) -> None:
    """Give a file the read and write permissions of its folder; safetensors lets only the owner read its files."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def replace_folder(source: Path, target: Path) -> None:
    """Rename a complete folder to `target`, which replaces an older folder of that name. Both have the same parent.

    If the process is killed meanwhile, the old folder may be left as `.NAME.old`; `target` is never half-written.
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

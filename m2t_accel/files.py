"""Atomic writes of files and folders, and files of JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path


class JsonLines:
    """A file of JSON lines, to which lines are added whole.

    A line that cannot be written, of a full disk, waits for the next time; what a killed process has left of one is
    not read, and overwritten.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []
        self.length: int | None = None  # bytes of whole lines; None: not yet known

    def read(self) -> Iterator[dict[str, object]]:
        """The whole lines of the file, and those that wait to be written."""
        with contextlib.suppress(FileNotFoundError), self.path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.endswith("\n"):
                    with contextlib.suppress(ValueError):
                        yield json.loads(line)
        for line in self.waiting:
            yield json.loads(line)

    def keep(self, wanted: Callable[[dict[str, object]], bool]) -> None:
        """Leave only the lines that are wanted; without any there is no file."""
        rows = [row for row in self.read() if wanted(row)]
        self.waiting, self.length = [], None
        if rows:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        else:
            self.path.unlink(missing_ok=True)

    def add(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Write lines at the end.

        Raises:
            OSError: they cannot be written now; the next call will try again.
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
    """Yield a temporary path beside `path` and with its ending; rename it to `path` when the block has ended.

    The block writes a file or a folder. If it raises, the temporary path is removed and `path` stays as it was.

    Raises:
        OSError: the rename failed.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
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
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """The whole lines of a metrics.jsonl."""
    return JsonLines(path).read()


def let_others_read(path: Path) -> None:
    """Let others read a file of safetensors, which makes it for its owner alone, as they may read its folder."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def replace_folder(source: Path, target: Path) -> None:
    """Give a folder the name `target`, which another may have had; both are in the same folder.

    Killed in the middle, the old one may bear another name, but nothing half-written bears `target`.
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

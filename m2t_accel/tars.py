"""Where the images are in tar files: found by their headers, and kept for the next start."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import posixpath
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow

from m2t_accel.index import IMAGE_EXTENSIONS, READERS, is_hidden, place_for_files, read_cache, write_cache
from m2t_accel.launch import num_cores
from m2t_accel.progress import late_progress_bar
from m2t_accel.settings import ConfigurationError, in_short

PART = 1 << 20  # bytes read at once of what is behind a tar's end: if that is damaged, it may be nearly all of the tar
SMALL = 32 << 20  # bytes of tars, for which no process is started: of 10 000 small images, a third of a second


def index_tars(folder: Path, files: Sequence[str]) -> list[pyarrow.Table]:
    """Where each image is in WebDataset tars: of each `offset` and `size` in bytes, `label` (int, null without .cls).

    Members that share a name up to the first dot of its last part are one sample (000.jpg, 000.cls). Of several images
    (000.depth.png, 000.jpg, 000.png) it is the first of those with the fewest dots; `others` is the number of the rest.
    A link that leads out of the tar is an image without content.

    Raises:
        ConfigurationError: a tar is cut, compressed or no tar.
    """
    paths = [str(folder / file) for file in files]
    # What is kept does not say where a file lies: it is the same one by another path.
    places = [place_for_files("tar", [path]) for path in paths]
    with ThreadPoolExecutor(READERS) as readers:
        tables = list(readers.map(read_cache, places))
    missing = [i for i, table in enumerate(tables) if table is None]
    with contextlib.closing(read_tars([paths[i] for i in missing])) as found:
        for i, table in zip(missing, found, strict=True):
            write_cache(places[i], table)  # of each when it is there: a start that is interrupted was not for nothing
            tables[i] = table
    return tables


def read_tars(paths: list[str]) -> Iterator[pyarrow.Table]:
    """The images of each tar; as index_tars.

    By processes, because it is all Python: 800 000 headers in two tars took two threads of a slow machine 60 s, one
    37 s, and two processes 16 s.
    """
    sizes = [os.path.getsize(path) if os.path.exists(path) else 0 for path in paths]
    with late_progress_bar("looking for images in tars", "B", total=sum(sizes)) as bar, contextlib.ExitStack() as stack:
        if len(paths) > 1 and sum(sizes) > SMALL:
            tables = stack.enter_context(in_processes(index_tar, paths))
        else:
            tables = map(index_tar, paths)
        for size, table in zip(sizes, tables, strict=True):
            bar.update(size)
            yield table


@contextlib.contextmanager
def in_processes(work: Callable[[str], pyarrow.Table], paths: list[str]) -> Iterator[Iterator[pyarrow.Table]]:
    """The results of work on each path, by as many processes as there are cores; they end with this, however it ends.

    Raises:
        ConfigurationError: one of them has died.
    """
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(len(paths), num_cores()), initializer=settle_process) as processes:
        try:
            yield processes.map(work, paths)
        except BrokenProcessPool as error:
            raise ConfigurationError(
                "a process that looked for images in tars has died: most often the memory ran out"
            ) from error
        except BaseException:  # Ctrl-C, or a tar that is broken: what else is under way is of no use
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise


def settle_process() -> None:
    """No ear for Ctrl-C, which is for the main process; and no life after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def index_tar(path: str) -> pyarrow.Table:
    """The images of one tar; as index_tars."""
    images: dict[str, tuple[int, int, int]] = {}
    others: Counter[str] = Counter()
    labels: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            for member, (at, size) in tar_members(file).items():
                if any(is_hidden(part) for part in member.split("/")):
                    continue
                parent, _, name = member.rpartition("/")
                stem, _, extension = name.partition(".")
                key, extension = f"{parent}/{stem}", f".{extension.lower()}"
                if extension == ".cls":
                    word = os.pread(file.fileno(), size, at).strip()
                    if word.isdigit():
                        labels[key] = int(word)
                elif os.path.splitext(extension)[1] in IMAGE_EXTENSIONS or extension in IMAGE_EXTENSIONS:
                    others[key] += key in images
                    image = (extension.count("."), at, size)
                    images[key] = min(images.get(key, image), image, key=lambda image: image[0])
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as a tar ({in_short(error)}): it is cut, damaged, joined of several or "
            "compressed; fetch it again, unpack it with gunzip, or move it away"
        ) from None
    keys = sorted(images, key=lambda key: images[key][1])  # as they lie, so that a run of them is read at once
    found = np.array([images[key] for key in keys], np.int64).reshape(-1, 3)
    return pyarrow.table(
        {
            "offset": found[:, 1],
            "size": found[:, 2],
            "label": pyarrow.array([labels.get(key) for key in keys], pyarrow.int64()),
            "others": pyarrow.array([others[key] for key in keys], pyarrow.int32()),
        }
    )


def tar_members(file: IO[bytes]) -> dict[str, tuple[int, int]]:
    """Where each file in a tar begins, and its size; links lead to what they are of, or are empty.

    Of a name that comes again it is the last, as when a tar is unpacked.

    Raises:
        tarfile.TarError: it is cut, compressed, joined of several or no tar.
    """
    members: dict[str, tuple[int, int]] = {}
    links: dict[str, tuple[str, int]] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            name = posixpath.normpath(member.name)
            members.pop(name, None)
            links.pop(name, None)
            if member.isfile():
                members[name] = (member.offset_data, member.size)
            elif member.islnk():  # to what came before; what comes later under that name is another file
                members[name] = members.get(posixpath.normpath(member.linkname), (member.offset_data, 0))
            elif member.issym():
                links[name] = (posixpath.join(posixpath.dirname(name), member.linkname), member.offset_data)
            tar.members.clear()  # it would keep all of them, 0.7 kB each
        # A tar ends with a block of zeros, and nothing else after it. tarfile would also take the end of the file for
        # it, a damaged header, or the first end of two tars that were joined.
        file.seek(tar.offset)
        zeros = 0
        while (part := file.read(PART)) and part.count(0) == len(part):
            zeros += len(part)
        if part or zeros < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no end after {len(members):,} files")
    for name, (target, at) in links.items():
        passed = set()
        while (target := posixpath.normpath(target)) in links and target not in passed:
            passed.add(target)
            target, _ = links[target]
        members[name] = members.get(target, (at, 0))
    return members

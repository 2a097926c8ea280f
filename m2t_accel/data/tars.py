"""Where the images are in tar files: found by their headers, and kept for the next start."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import posixpath
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

import numpy as np
import pyarrow
from datasets import Dataset, Features, Image, Value
from pyarrow import compute
from tqdm import tqdm

from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.cache import place_for_files, read_cache, write_cache
from m2t_accel.data.folders import IMAGE_EXTENSIONS, image_column, is_hidden
from m2t_accel.data.parquet_index import FOOTER_READERS
from m2t_accel.data.shards import HELD, Reader, dataset_of, unreadable_shard
from m2t_accel.distributed.launch import num_cores
from m2t_accel.progress import PATIENCE, late_progress_bar

MAX_RUN = 1 << 30  # bytes of a tar that are read at once at most; Linux would give 2 GB
TAR_RUN = 64  # images of a tar that are read at once: of ImageNet's, 7 MB
PART = 1 << 20  # bytes read at once of what is behind a tar's end: if that is damaged, it may be nearly all of the tar
MAX_DIGITS = 18  # of a label
SMALL = 32 << 20  # bytes of tars, for which no process is started: of 10 000 small images, a third of a second


def index_tars(folder: Path, files: Sequence[str]) -> list[pyarrow.Table]:
    """Where each image is in WebDataset tars: of each `offset` and `size` in bytes, `label` (int, null without .cls).

    Members that share a name up to the first dot of its last part are one sample (000.jpg, 000.cls). Of several images
    (000.depth.png, 000.jpg, 000.png) it is the first of those with the fewest dots; `others` is the number of the rest.
    A link to what is not in the tar is an image without content.

    Raises:
        ConfigurationError: a tar is cut, compressed or no tar.
    """
    paths = [str(folder / file) for file in files]
    # What is kept does not say where a file lies: it is the same one by another path.
    places = [place_for_files("tar", [path]) for path in paths]
    with ThreadPoolExecutor(FOOTER_READERS) as readers:
        tables = list(readers.map(read_cache, places))
    missing = [i for i, table in enumerate(tables) if table is None]
    with late_progress_bar("looking for images in tars", "B", total=sum(size_of(paths[i]) for i in missing)) as bar:
        if len(missing) > 1 and bar.total > SMALL:
            keep_by_processes([paths[i] for i in missing], [places[i] for i in missing], bar)
        for i in missing:
            tables[i] = read_cache(places[i])
            if tables[i] is None:
                tables[i] = index_tar(paths[i], bar.update)
                write_cache(places[i], tables[i])  # at once: a start that is interrupted was not for nothing
    return tables


def keep_by_processes(paths: list[str], places: list[Path], bar: tqdm) -> None:
    """Keep the images of each tar at its place, by as many processes as there are cores; they end with this.

    By processes, because it is all Python: 800 000 headers in two tars took two threads of a slow machine 60 s, one
    37 s, and two processes 16 s. What they cannot do, because they cannot be started, kept from or be killed, is left
    undone.

    Raises:
        ConfigurationError: a tar is cut, compressed or no tar.
    """
    if multiprocessing.current_process().daemon:  # it may not have processes of its own
        return
    others = set(multiprocessing.active_children())
    number = min(len(paths), num_cores())
    with (
        contextlib.suppress(OSError, ImportError, BrokenProcessPool),
        ProcessPoolExecutor(number, initializer=settle_process) as processes,
    ):
        try:
            ended: SimpleQueue[Future] = SimpleQueue()
            with sigint_blocked():
                tars = {processes.submit(keep_tar, *tar): tar for tar in zip(paths, places, strict=True)}
            for tar in tars:
                tar.add_done_callback(ended.put)
            for _ in tars:
                tar = next_completed(ended, bar)
                tar.result()
                path, place = tars[tar]
                if not place.exists():  # no cache can be written
                    raise OSError(f"{place} is not there")
                bar.update(size_of(path))
        except BaseException:  # Ctrl-C, or a tar that is broken: what else is under way is of no use
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise


def next_completed(ended: SimpleQueue[Future], bar: tqdm) -> Future:
    """The next that has ended; of few large tars none may for long, so that the bar is shown meanwhile."""
    while True:
        try:
            return ended.get(timeout=PATIENCE)
        except Empty:
            bar.refresh()


@contextlib.contextmanager
def sigint_blocked() -> Iterator[None]:
    """Ctrl-C comes after this, and not while processes are forked, where it would get lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def settle_process() -> None:
    """No ear for Ctrl-C, which is for the main process; and no life after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def keep_tar(path: str, place: Path) -> None:
    """A table of megabytes does not go back by the pool's pipe: the main process would wait for ever for the rest of
    one whose sender is killed.
    """
    write_cache(place, index_tar(path))


def size_of(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # it is told where it is read
        return 0


def index_tar(path: str, advance: Callable[[int], object] = lambda size: None) -> pyarrow.Table:
    """The images of one tar; as index_tars. It tells how many bytes it has gone on."""
    images: dict[str, tuple[int, int, int]] = {}
    others: Counter[str] = Counter()
    labels: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            for member, (at, size) in tar_members(file, advance).items():
                if any(is_hidden(part) for part in member.split("/")):
                    continue
                parent, _, name = member.rpartition("/")
                stem, _, extension = name.partition(".")
                key, extension = f"{parent}/{stem}", f".{extension.lower()}"
                if extension == ".cls":
                    word = os.pread(file.fileno(), size, at).strip()
                    if word.isdigit() and len(word) <= MAX_DIGITS:
                        labels[key] = int(word)
                elif os.path.splitext(extension)[1] in IMAGE_EXTENSIONS or extension in IMAGE_EXTENSIONS:
                    others[key] += key in images
                    image = (extension.count("."), at, size)
                    images[key] = min(images.get(key, image), image, key=lambda image: image[0])
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as a tar ({one_line(error)}): it is cut, damaged, joined of several or "
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


def tar_members(file: IO[bytes], advance: Callable[[int], object]) -> dict[str, tuple[int, int]]:
    """Where each file in a tar begins, and its size; links to files lead to what they are of, or are empty.

    Of a name that comes again it is the last, as when a tar is unpacked. What is only to be reached by a link to a
    folder is not found.

    Raises:
        tarfile.TarError: it is cut, compressed, joined of several or no tar.
    """
    members: dict[str, tuple[int, int]] = {}
    links: dict[str, tuple[str, int]] = {}  # to what, and where they stand
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            name, target = posixpath.normpath(member.name), posixpath.normpath(member.linkname)
            place, link = members.pop(name, None), links.pop(name, None)
            if member.isfile():
                members[name] = (member.offset_data, member.size)
            elif member.issym():
                links[name] = (member.linkname, member.offset_data)
            elif member.islnk():  # to what came before; what comes later under that name is another file
                if target != name:  # of a file that it is given twice, tar makes a link to itself
                    place, link = members.get(target), links.get(target)
                if link is not None:
                    links[name] = link
                else:
                    members[name] = place or (member.offset_data, 0)
            tar.members.clear()  # it would keep all of them, 0.7 kB each
            advance(tar.offset - member.offset)
        # A tar ends with a block of zeros, and nothing else after it. tarfile would also take the end of the file for
        # it, a damaged header, or the first end of two tars that were joined.
        file.seek(tar.offset)
        zeros = 0
        while (part := file.read(PART)) and part.count(0) == len(part):
            zeros += len(part)
        if part or zeros < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no end after {len(members):,} files")
    for name, (_, at) in links.items():
        target, passed = name, set()
        while target in links and target not in passed:
            passed.add(target)
            target = posixpath.normpath(posixpath.join(posixpath.dirname(target), links[target][0]))
        members[name] = members.get(target, (at, 0))
    return members


class TarShards:
    """Runs of the images that lie one after the other in tar files, each read at once."""

    def __init__(self, images: Dataset) -> None:
        """Of images with columns `image`, `offset` and `size`, in the order of the files."""
        names = compute.struct_field(images.data.column("image"), "path").dictionary_encode().combine_chunks()
        self.files, self.file = names.dictionary.to_pylist(), names.indices.to_numpy()
        self.offset, self.size = (images.data.column(name).to_numpy() for name in ("offset", "size"))
        # A run ends after TAR_RUN images, and where its file ends.
        starts = np.flatnonzero(np.diff(self.file, prepend=-1))
        ends = np.append(starts[1:], len(self.file))
        runs = [np.arange(start, end, TAR_RUN) for start, end in zip(starts, ends, strict=True)]
        self.starts = np.concatenate(runs)
        self.piece_sizes = np.diff(np.append(self.starts, len(self.file))).astype(np.int32)

    def __len__(self) -> int:
        return len(self.file)

    def open(self, piece: int, may_hold: int = HELD) -> Reader:
        return functools.partial(self.read, piece)

    def read(self, piece: int, first: int, stop: int) -> tuple[np.ndarray, list[dict[str, object]]]:
        """Rows of a piece.

        Raises:
            ConfigurationError: the file is missing or cut.
        """
        samples = np.arange(self.starts[piece] + first, self.starts[piece] + stop)
        file = self.files[self.file[samples[0]]]
        places = list(zip(self.offset[samples].tolist(), self.size[samples].tolist(), strict=True))
        begin, end = places[0][0], places[-1][0] + places[-1][1]
        try:
            with open(file, "rb") as source:
                if end - begin > min(2 * sum(size for _, size in places), MAX_RUN):  # other things lie between
                    contents = [read_at(source, at, size) for at, size in places]
                else:
                    run = read_at(source, begin, end - begin)
                    contents = [run[at - begin : at - begin + size] for at, size in places]
        except (OSError, EOFError) as error:
            raise unreadable_shard(file, error) from None
        return samples, [
            {"bytes": content, "path": f"{file}, {size} bytes at {at}"}
            for content, (at, size) in zip(contents, places, strict=True)
        ]


def read_at(source: IO[bytes], at: int, size: int) -> bytes:
    content = os.pread(source.fileno(), size, at)
    if len(content) < size:
        raise EOFError(f"it ends at byte {at + len(content):,}")
    return content


def tars_to_dataset(folder: Path, files: Sequence[str], remarks: list[str]) -> Dataset:
    """A Dataset of the images in tar files, where they lie; labelled where all have a .cls."""
    tables = index_tars(folder, files)
    table = pyarrow.concat_tables(tables).combine_chunks()
    if more := compute.sum(table["others"]).as_py():
        remarks.append(f"not used: {more:,} more images of the same samples (of 0.depth.png and 0.jpg it is 0.jpg)")
    if 0 < table["label"].null_count < len(table):
        remarks.append(f"no labels, because {table['label'].null_count:,} of {len(table):,} images have no .cls")
    paths = (itertools.repeat(str(folder / file), len(part)) for file, part in zip(files, tables, strict=True))
    features = Features({"image": Image(decode=False), "offset": Value("int64"), "size": Value("int64")})
    columns = [image_column(itertools.chain.from_iterable(paths)), table["offset"], table["size"]]
    if len(table) and table["label"].null_count == 0:
        features["label"] = Value("int64")
        columns.append(table["label"])
    return dataset_of(pyarrow.Table.from_arrays(columns, schema=features.arrow_schema))

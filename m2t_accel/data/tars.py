"""Images in WebDataset tars: an index of where each one lies, and reading of runs of neighbours."""

from __future__ import annotations

import functools
import itertools
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow
from datasets import Dataset, Features, Image, Value
from pyarrow import compute

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.cache import cached_table, file_status
from m2t_accel.data.folders import IMAGE_EXTENSIONS, is_hidden
from m2t_accel.data.image_files import image_column
from m2t_accel.data.shards import MAX_HELD_BYTES, Reader, to_dataset, unreadable_shard
from m2t_accel.progress import late_progress_bar

MAX_RUN_BYTES = 1 << 30  # read at once at most; Linux limits one read to 2 GB
RUN_IMAGES = 64  # images of a tar that are read at once, 7 MB of ImageNet's
TAIL_BYTES = 1 << 20  # read at once after the end of a tar: a damaged header may leave nearly all of the tar there
MAX_LINKS = 40  # symbolic links that are followed one after the other, as Linux does
MAX_DIGITS = 18  # digits of a label, so that it fits into 64 bits


def index_tars(folder: Path, files: Sequence[str]) -> list[pyarrow.Table]:
    """Return where the images are in WebDataset tars, a table for each tar. The tables are cached.

    Members with the same name up to the first dot of its last part are one sample (000.jpg, 000.cls). If a sample has
    several images (000.depth.png, 000.jpg, 000.png), the first of those with the fewest dots counts.

    Returns:
        Tables with a row for each sample: `offset` and `size` of the image in bytes, `label` (int; null without a
        .cls that holds a number), `others` (number of further images). A link to a missing file is an image of size 0.

    Raises:
        ConfigurationError: a tar is missing, truncated, damaged, compressed or not a tar.
    """
    paths = [str(folder / file) for file in files]
    ends = np.cumsum([file_status(path).st_size for path in paths])
    tables = []
    with late_progress_bar("indexing tars", "B", total=int(ends[-1])) as bar:
        # One tar after the other, because the result is cached: a process indexes about 40 000 members a second.
        for path, end in zip(paths, ends.tolist(), strict=True):
            tables.append(cached_table("tar", [path], lambda files: index_tar(files[0], bar.update)))
            bar.update(max(0, end - bar.n))  # a cached table has not moved the bar
    return tables


def index_tar(path: str, advance: Callable[[int], object] = lambda num_bytes: None) -> pyarrow.Table:
    """Return where the images are in one tar; see index_tars. Call `advance` with the bytes of each member."""
    images: dict[str, tuple[int, int, int]] = {}
    others: Counter[str] = Counter()
    labels: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            for member, (offset, size) in tar_members(file, advance).items():
                if any(is_hidden(part) for part in member.split("/")):
                    continue
                parent, _, name = member.rpartition("/")
                stem, _, extension = name.partition(".")
                key, extension = f"{parent}/{stem}", f".{extension.lower()}"
                if extension == ".cls":
                    word = os.pread(file.fileno(), size, offset).strip()
                    if word.isdigit() and len(word) <= MAX_DIGITS:
                        labels[key] = int(word)
                elif os.path.splitext(extension)[1] in IMAGE_EXTENSIONS or extension in IMAGE_EXTENSIONS:
                    others[key] += key in images
                    image = (extension.count("."), offset, size)
                    images[key] = min(images.get(key, image), image, key=lambda image: image[0])
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as a tar ({one_line(error)}): it is truncated, damaged, compressed or joined from "
            "several tars; download it again, unpack it with gunzip, or move it away"
        ) from None
    keys = sorted(images, key=lambda key: images[key][1])  # in the order of the file, so that a run is read at once
    table = np.array([images[key] for key in keys], np.int64).reshape(-1, 3)
    return pyarrow.table(
        {
            "offset": table[:, 1],
            "size": table[:, 2],
            "label": pyarrow.array([labels.get(key) for key in keys], pyarrow.int64()),
            "others": pyarrow.array([others[key] for key in keys], pyarrow.int32()),
        }
    )


def tar_members(file: IO[bytes], advance: Callable[[int], object]) -> dict[str, tuple[int, int]]:
    """Return the offset and size of each file in a tar; a link has those of its target, or size 0 without a target.

    The last member of a name counts, as when the tar is unpacked. A hard link keeps the earlier file even if a later
    member replaces it. Links to folders are not followed.

    Raises:
        tarfile.TarError: the file is truncated, damaged, compressed, joined from several tars or not a tar.
    """
    members: dict[str, tuple[int, int]] = {}
    symlinks: dict[str, tuple[str, int]] = {}  # target as written, and offset of the link itself
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            name, target = posixpath.normpath(member.name), posixpath.normpath(member.linkname)
            earlier = members.pop(name, None), symlinks.pop(name, None)
            if member.isfile():
                members[name] = (member.offset_data, member.size)
            elif member.issym():
                symlinks[name] = (member.linkname, member.offset_data)
            elif member.islnk():
                # If tar is given a file twice, it stores a hard link to the same name.
                place, symlink = earlier if target == name else (members.get(target), symlinks.get(target))
                if symlink is not None:
                    symlinks[name] = symlink
                else:
                    members[name] = place or (member.offset_data, 0)
            tar.members.clear()  # tarfile would keep them all, 0.7 kB each
            advance(tar.offset - member.offset)
        # A tar ends with a block of zeros and nothing after it. tarfile also accepts the end of the file, a damaged
        # header, or the first end in two tars that were joined.
        file.seek(tar.offset)
        zeros = 0
        while (part := file.read(TAIL_BYTES)) and part.count(0) == len(part):
            zeros += len(part)
        if part or zeros < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no end after {len(members):,} files")
    return members | {name: follow(name, members, symlinks) for name in symlinks}


def follow(name: str, members: dict[str, tuple[int, int]], symlinks: dict[str, tuple[str, int]]) -> tuple[int, int]:
    """Return the offset and size of the file that a symbolic link leads to; size 0 if it leads to none."""
    target = name
    for _ in range(MAX_LINKS):
        if target in symlinks:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(target), symlinks[target][0]))
    return members.get(target, (symlinks[name][1], 0))


class TarShards:
    """Runs of images that lie one after the other in tars, each a piece that is read at once."""

    def __init__(self, images: Dataset) -> None:
        """Divide the images into runs.

        Args:
            images: a Dataset with columns `image`, `offset` and `size`, in the order of the files.
        """
        paths = compute.struct_field(images.data.column("image"), "path").dictionary_encode().combine_chunks()
        self.files, self.file = paths.dictionary.to_pylist(), paths.indices.to_numpy()
        self.offset, self.size = (images.data.column(name).to_numpy() for name in ("offset", "size"))
        # A run ends after RUN_IMAGES images, or with its file.
        starts = np.flatnonzero(np.diff(self.file, prepend=-1))
        ends = np.append(starts[1:], len(self.file))
        runs = [np.arange(start, end, RUN_IMAGES) for start, end in zip(starts, ends, strict=True)]
        self.first_samples = np.concatenate(runs)
        self.piece_sizes = np.diff(np.append(self.first_samples, len(self.file))).astype(np.int32)

    def __len__(self) -> int:
        return len(self.file)

    def open(self, piece: int, max_held_bytes: int = MAX_HELD_BYTES) -> Reader:
        return functools.partial(self.read, piece)

    def read(self, piece: int, first: int, stop: int) -> tuple[np.ndarray, list[dict[str, object]]]:
        """Return the sample numbers and images of rows `first` to `stop` of a piece.

        Raises:
            ConfigurationError: the file is missing or truncated.
        """
        samples = np.arange(self.first_samples[piece] + first, self.first_samples[piece] + stop)
        file = self.files[self.file[samples[0]]]
        places = list(zip(self.offset[samples].tolist(), self.size[samples].tolist(), strict=True))
        start, end = places[0][0], places[-1][0] + places[-1][1]
        try:
            with open(file, "rb") as source:
                if end - start > min(2 * sum(size for _, size in places), MAX_RUN_BYTES):  # mostly other things
                    contents = [read_at(source, offset, size) for offset, size in places]
                else:
                    run = read_at(source, start, end - start)
                    contents = [run[offset - start : offset - start + size] for offset, size in places]
        except (OSError, EOFError) as error:
            raise unreadable_shard(file, error) from None
        return samples, [
            {"bytes": content, "path": f"{file}, {size} bytes at {offset}"}
            for content, (offset, size) in zip(contents, places, strict=True)
        ]


def read_at(source: IO[bytes], offset: int, size: int) -> bytes:
    content = os.pread(source.fileno(), size, offset)
    if len(content) < size:
        raise EOFError(f"it ends at byte {offset + len(content):,}")
    return content


def tar_splits(
    folder: Path, files_by_split: Mapping[str, Sequence[str]], config: ImageSettings, remarks: list[str]
) -> dict[str, Dataset]:
    """Return the images of the splits, which tars_to_dataset describes.

    Args:
        folder: folder of the tars.
        files_by_split: paths relative to it; the training split first.
        config: may name the labels.
        remarks: list to which this adds notes for the user.
    """
    return {name: tars_to_dataset(folder, files, remarks) for name, files in files_by_split.items()}


def tars_to_dataset(folder: Path, files: Sequence[str], remarks: list[str]) -> Dataset:
    """Return a Dataset of the places of all images in tars; it has labels if every image has a .cls.

    Args:
        folder: folder of the tars.
        files: paths relative to it.
        remarks: list to which this adds notes for the user.
    """
    tables = index_tars(folder, files)
    table = pyarrow.concat_tables(tables).combine_chunks()
    if more := compute.sum(table["others"]).as_py():
        remarks.append(f"not used: {more:,} more images of the same samples (0.jpg is preferred to 0.depth.png)")
    if 0 < table["label"].null_count < len(table):
        remarks.append(f"no labels, because {table['label'].null_count:,} of {len(table):,} images have no .cls")
    paths = (itertools.repeat(str(folder / file), len(part)) for file, part in zip(files, tables, strict=True))
    features = Features({"image": Image(decode=False), "offset": Value("int64"), "size": Value("int64")})
    columns = [image_column(itertools.chain.from_iterable(paths)), table["offset"], table["size"]]
    if len(table) and table["label"].null_count == 0:
        features["label"] = Value("int64")
        columns.append(table["label"])
    return to_dataset(pyarrow.Table.from_arrays(columns, schema=features.arrow_schema))

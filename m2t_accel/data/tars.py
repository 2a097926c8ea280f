"""Images in WebDataset tars: their splits and labels, and reading of runs of neighbours."""

from __future__ import annotations

import functools
import itertools
import os
import posixpath
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pyarrow
from datasets import Dataset, Features, Image, Value
from pyarrow import compute

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, count, did_you_mean
from m2t_accel.data.columns import LABEL_COLUMNS, listed
from m2t_accel.data.folders import advice_on, how_to_unpack, list_files, unused_files
from m2t_accel.data.image_files import image_column
from m2t_accel.data.shards import MAX_HELD_BYTES, Reader, to_dataset, unreadable_shard
from m2t_accel.data.splits import (
    FILLERS,
    SPLIT_OF_WORD,
    TRAIN,
    UNNAMED,
    choose_splits,
    describe_files,
    split_of_folder,
    words_of,
)
from m2t_accel.data.tar_index import CLS, Contents, LabelMembers, choose_json, index_tars, label_text, printable

MAX_RUN_BYTES = 1 << 30  # read at once at most; Linux limits one read to 2 GB
RUN_IMAGES = 64  # images of a tar that are read at once, 7 MB of ImageNet's


SEPARATORS = "-_. "
SPLIT_WORD = re.compile(rf"(?<![^\W\d_])({'|'.join(SPLIT_OF_WORD)})(?![^\W\d_])", re.IGNORECASE)
WORDNET_ID = re.compile(r"n\d{8}")
PART = re.compile(r"\d{5,}|(batch|chunk|dir|folder|group|part|shard|split|tar)[-_. ]?\d+", re.IGNORECASE)


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


class TarImages(NamedTuple):
    """The images of a split."""

    files: Sequence[str]  # paths of the tars
    table: pyarrow.Table  # the columns of index_tars, and `file`: the number of the tar

    def used_files(self) -> list[str]:
        return [self.files[number] for number in self.table["file"].unique().to_pylist()]


def tar_splits(
    folder: Path,
    files_by_split: Mapping[str, Sequence[str]],
    config: ImageSettings,
    remarks: list[str],
    flags_name_folders: bool = False,
) -> dict[str, Dataset]:
    """Return Datasets of the places of all images of the splits, with labels if the tars have some.

    Args:
        folder: folder of the tars.
        files_by_split: paths relative to it by the name of the split; the training split first.
        config: may name the labels.
        remarks: list to which this adds notes for the user.
        flags_name_folders: whether the flags of splits name folders in the tars, because they name no tars.

    Raises:
        ConfigurationError: a tar cannot be read, the training tars hold no image, `--label_column` names no label, or a
            flag names no folder.
    """
    train_name, train_files = next(iter(files_by_split.items()))
    members = find_label_members(folder, train_files, config)
    splits, contents = {}, []
    for name, files in files_by_split.items():
        tables = index_tars(folder, files, members or CLS)
        contents.append(Contents(tables))
        file = np.repeat(np.arange(len(files)), [len(table) for table in tables])
        table = pyarrow.concat_tables([table.replace_schema_metadata() for table in tables])
        table = table.append_column("file", pyarrow.array(file)).unify_dictionaries().combine_chunks()
        splits[name] = TarImages([str(folder / path) for path in files], table)
    if not len(splits[train_name].table):
        raise ConfigurationError(no_image(folder, train_files, contents[0]))
    alone = sum((part.alone for part in contents), Counter())
    remarks += unused_files(alone, sum(len(images.table) for images in splits.values()), "image")
    if len(splits) == 1 and (flags_name_folders or not (config.train_split or config.validation_split)):
        splits = divide_by_folders(train_name, splits[train_name], config, remarks)
    if more := sum(compute.sum(images.table["others"]).as_py() or 0 for images in splits.values()):
        remarks.append(f"not used: {count(more, 'more image')} of the same samples (0.jpg is preferred to 0.depth.png)")
    labels = find_labels(splits, members, contents[0], config, remarks)
    return {name: to_images(images, labels.get(name)) for name, images in splits.items()}


def no_image(folder: Path, files: Sequence[str], contents: Contents) -> str:
    """Return that the training tars hold no image, what they hold instead, and what to do."""
    text = f"--dataset {folder}: {describe_files(files)} holds no image"
    if not contents.alone:
        return text
    text += f" but {list_files(contents.alone)}"
    if contents.alone.most_common(1)[0][0] != ".tar":
        return f"{text}: {advice_on(contents.alone)}"
    return f"{text}: {how_to_unpack(folder / files[0])} and type the same command again"


def divide_by_folders(name: str, images: TarImages, config: ImageSettings, remarks: list[str]) -> dict[str, TarImages]:
    """Return the training and the validation images of tars that hold both, in folders such as `train` and `val`.

    Args:
        name: name of the tars.
        images: all images of the tars.
        config: names the dataset, and may name the splits.
        remarks: list to which this adds the folders that are not used.

    Raises:
        ConfigurationError: a flag names no folder.
    """
    flags = [flag for flag in (config.train_split, config.validation_split) if flag is not None]
    folders = images.table["folder"].unique().to_pylist()
    levels = zip(*(folder.split("/") for folder in folders), strict=False)
    depth = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, levels))
    tops = {folder: "/".join(folder.split("/")[: depth + 1]) for folder in folders}
    names = {posixpath.basename(top) for top in tops.values()}
    split_of_top = {}
    for top in sorted(set(tops.values())):
        split = split_of_folder(posixpath.basename(top), names)
        split_of_top[top] = next((flag for flag in flags if flag in (posixpath.basename(top), top, split)), split)
    is_train = {split == TRAIN for split in split_of_top.values() if split != UNNAMED}
    if len(is_train) < 2 and not flags:
        return {name: images}
    choice = choose_splits(list(dict.fromkeys(split_of_top.values())), config)
    splits = {}
    for split in (choice.train, choice.validation, *choice.unused):
        chosen = dict.fromkeys(top for top in split_of_top if split_of_top[top] == split)
        below = pyarrow.array([folder for folder in folders if tops[folder] in chosen], pyarrow.string())
        table = images.table.filter(compute.is_in(images.table["folder"].cast(pyarrow.string()), below))
        place = f"{', '.join(f'{top}/' if top else 'the top folder' for top in chosen)} in {name}"
        if split in choice.unused:
            remarks.append(f"not used: {count(len(table), 'image')} in {place}")
        else:
            splits[place] = TarImages(images.files, table)
    return splits


def find_label_members(folder: Path, files: Sequence[str], config: ImageSettings) -> LabelMembers | None:
    """Return the members that hold labels, by the first tar with an image: those of the flag, else the usual ones.

    Raises:
        ConfigurationError: the flag names neither a kind of files nor a key of the JSON files.
    """
    # The first tar stands for all, so that each is scanned once.
    contents = Contents(next(([table] for file in files if len(table := index_tars(folder, [file])[0])), []))
    name, json_ending = config.label_column, choose_json(contents.beside)
    if name is not None:
        kinds = [ending[1:] for ending in contents.beside if ending and not ending.endswith(".json")]
        if name in kinds:
            return LabelMembers(f".{name}")
        if name in contents.json:
            return LabelMembers(json_ending, name)
        choices = [*kinds, *contents.json]
        raise ConfigurationError(
            f"--label_column {name}: neither text files beside the images of the tars nor a key of their *.json"
            f"{did_you_mean(name, choices)}; there are {listed(list(map(printable, choices))) or 'none'}"
        )
    extension = next((f".{word}" for word in ("cls", *LABEL_COLUMNS) if f".{word}" in contents.beside), None)
    if extension is not None:
        return LabelMembers(extension)
    key = next((word for word in LABEL_COLUMNS if label_text(contents.json.get(word)) is not None), None)
    return LabelMembers(json_ending, key) if key is not None and config.uses_labels else None


def find_labels(
    splits: Mapping[str, TarImages],
    members: LabelMembers | None,
    contents: Contents,
    config: ImageSettings,
    remarks: list[str],
) -> dict[str, pyarrow.ChunkedArray]:
    """Return the labels of the training split, and of the validation split if it has the same kind of labels.

    Args:
        splits: the training split first.
        members: the members that hold labels, if the first tar has some.
        contents: what the training tars hold.
        config: may name the labels.
        remarks: list to which this adds where the labels are, or why they are not used.

    Raises:
        ConfigurationError: a training image has no label, and `--label_column` asks for labels.
    """
    (train_name, train), *others = splits.items()
    if members is not None or train.table["label"].null_count < len(train.table):
        read = labels_of_members
        source = str(members or CLS)
    elif folders_are_classes(train):
        read, source = labels_of_folders, "the folders in the tars"
    elif tars_are_classes(train.used_files()):
        read, source = functools.partial(labels_of_files, class_of=class_of_tar), "the names of the tars"
    elif folders_of_tars_are_classes(train.used_files()):
        read, source = functools.partial(labels_of_files, class_of=class_of_folder), "the folders of the tars"
    else:
        remarks += why_no_labels(train, contents) if config.uses_labels else []
        return {}
    labels = {train_name: read(train)}
    if missing := labels[train_name].null_count:
        reason = f"{missing:,} of {len(train.table):,} images have no class in {source}"
        if config.label_column is not None:
            raise ConfigurationError(f"--label_column {config.label_column}: {reason}")
        remarks.append(f"no labels, because {reason}")
        return {}
    if source != str(CLS):
        remarks.append(f"labels from {source}")
    classes = set(map(str, labels[train_name].unique().to_pylist()))
    for name, images in others:
        found = read(images)
        if read is labels_of_members and found.null_count:
            reason = f"{found.null_count:,} of {len(found):,} images have no class in {source}"
        elif found.null_count or (len(found) and classes.isdisjoint(map(str, found.unique().to_pylist()))):
            reason = f"{source} are other classes than those of the training images"
        else:
            labels[name] = found
            continue
        remarks.append(f"no labels of {name}, because {reason}")
    return labels


def is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def labels_of_members(images: TarImages) -> pyarrow.ChunkedArray:
    """Return what .cls files, or a key of .json files, hold: numbers if all are numbers."""
    labels = images.table["label"].cast(pyarrow.string())
    if all(text is None or is_number(text) for text in labels.unique().to_pylist()):
        return labels.cast(pyarrow.int64())
    return labels


def labels_of_folders(images: TarImages) -> pyarrow.ChunkedArray:
    folders = images.table["folder"].cast(pyarrow.string())
    distinct = folders.unique()
    names = pyarrow.array(map(posixpath.basename, distinct.to_pylist()), pyarrow.string())
    return names.take(compute.index_in(folders, distinct))


def labels_of_files(images: TarImages, class_of: Callable[[str], str | None]) -> pyarrow.ChunkedArray:
    return pyarrow.array(map(class_of, images.files), pyarrow.string()).take(images.table["file"])


def folders_are_classes(images: TarImages) -> bool:
    """Return whether the folders in tars are classes: every image is directly in one of several sibling folders.

    Folders of one sample each, and folders named after splits, parts (00012, part-3) or their tars are no classes.
    """
    folders = images.table["folder"].unique().to_pylist()
    names = {posixpath.basename(folder) for folder in folders}
    return (
        1 < len(names) <= len(images.table) / 2
        and "" not in names
        and len(set(map(posixpath.dirname, folders))) == 1
        and any(split_of_folder(name, names) == UNNAMED for name in names)
        and not all(map(PART.fullmatch, names))
        and names != {Path(file).stem for file in images.used_files()}
    )


def tars_are_classes(files: Sequence[str]) -> bool:
    """Return whether each tar is a class: at least two tars, and each name is that of a class (see class_of)."""
    classes = {class_of_tar(file) for file in files}
    return len(files) > 1 and None not in classes and len(classes) == len(files)


def folders_of_tars_are_classes(files: Sequence[str]) -> bool:
    """Return whether the folders of tars are classes: at least two beside each other, with names of classes."""
    classes = {class_of_folder(file) for file in files}
    return len(classes) > 1 and None not in classes and len({Path(file).parents[1] for file in files}) == 1


def class_of_tar(file: str) -> str | None:
    return class_of(Path(file).stem)


def class_of_folder(file: str) -> str | None:
    return class_of(Path(file).parent.name)


def class_of(name: str) -> str | None:
    """Return the class that the name of a tar, or of a folder of tars, stands for; None if it may be a shard's name.

    The words of splits do not count: train-cat.tar and val-cat.tar are of the class cat. The name of a class is an id
    of WordNet (n01440764), or has at least two letters and no digits, except a number before it (001.Albatross).
    """
    if all(word in (*SPLIT_OF_WORD, *FILLERS) for word in words_of(name)):
        return None
    name = SPLIT_WORD.sub("", name).strip(SEPARATORS)
    is_class = WORDNET_ID.fullmatch(name) or re.fullmatch(r"(\d+[-_. ]+)?[^\d]*[^\W\d_]{2}[^\d]*", name)
    return name if is_class else None


def why_no_labels(images: TarImages, contents: Contents) -> list[str]:
    """Return a remark about things in tars that look like labels but are none."""
    if {"key", "status"} <= contents.json.keys():  # written by img2dataset, which knows no labels
        return []
    if any(ending.endswith(".json") for ending in contents.beside):
        keys = [printable(key) for key, value in contents.json.items() if label_text(value) is not None]
        choices = f"; --label_column may name {listed(keys)}" if keys else ""
        return [f"no labels, because the *.json have no key label, class or the like{choices}"]
    if ".txt" in contents.beside:
        return ["no labels, because *.txt hold captions; --label_column txt takes them as names of classes"]
    folders = sorted(images.table["folder"].unique().to_pylist())
    if len(folders) > 1:
        names = " and ".join(f"{folder}/" if folder else "the top" for folder in folders[:2])
        names = textwrap.shorten(names, 80, placeholder=" …")
        return [f"no labels, because folders in the tars, such as {names}, are no class folders"]
    return []


def to_images(images: TarImages, labels: pyarrow.ChunkedArray | None) -> Dataset:
    table = images.table
    features = Features({"image": Image(decode=False), "offset": Value("int64"), "size": Value("int64")})
    columns = [image_column(map(images.files.__getitem__, table["file"].to_pylist())), table["offset"], table["size"]]
    if labels is not None:
        features["label"] = Value(str(labels.type))
        columns.append(labels)
    return to_dataset(pyarrow.Table.from_arrays(columns, schema=features.arrow_schema))

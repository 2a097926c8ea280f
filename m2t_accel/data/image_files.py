"""Image files in folders: the splits and the classes that the folders name."""

from __future__ import annotations

import functools
import itertools
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow
from datasets import ClassLabel, Dataset, Features, Image

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, count
from m2t_accel.data.folders import MAX_LISTED, check_train
from m2t_accel.data.shards import to_dataset
from m2t_accel.data.splits import TRAIN, UNNAMED, choose_splits, says_evaluation, split_of_folder, warn_of_folds

PATHS_PER_CHUNK = 2**18  # a path has at most 4096 bytes, and a chunk must stay below 2 GB
# A part of a dataset that is no class: images_001, HAM10000_images_part_1. GTSRB has classes such as 00012.
PART = re.compile(r"(.*[\W_])?(batch|chunk|images?|part|shard)[-_ ]?\d+", re.IGNORECASE)
# A folder of masks or label images: ADE20K's annotations/, Cityscapes' gtFine/, VOC's SegmentationClass/.
MASKS = re.compile(
    r"(.*[\W_])?(annotations?|gt|gtcoarse|gtfine|ground_?truth|labels|masks|segmentation(class|object|s)?|trimaps)",
    re.IGNORECASE,
)

# Paths of images relative to the top folder, by the folder that is their split. It is empty for the top folder.
Places = dict[str, list[str]]


def load_image_files(
    folder: Path, images: Sequence[str], called_train: Sequence[str], config: ImageSettings, remarks: list[str]
) -> dict[str, Dataset]:
    """Return the training and the validation split of a folder of image files, by the names of their folders.

    They have labels if the images are in class folders.

    Args:
        folder: top folder.
        images: paths relative to it.
        called_train: folders and other things that are called train.
        config: may name the splits.
        remarks: list to which this adds notes for the user.

    Raises:
        ConfigurationError: no split is a training split, or some validation images have a class that training lacks.
    """
    groups = group_by_split(images, called_train, config)
    check_train(folder, groups, called_train, images, config)
    choice = choose_splits(list(groups), config)
    train = groups[choice.train]
    folders = {place: set(map(posixpath.dirname, paths)) for place, paths in train.items()}
    if doubtful := evaluation_folders(folders):
        remarks.append(
            f"warning: {list_places(doubtful)} may be held out, but no folder beside is called train, so its images "
            "are trained on; move them away, or name the folder with --validation_split"
        )
    if masks := mask_folders(folders):
        remarks.append(
            f"warning: {list_places(masks)} may hold masks instead of photographs, and the images are trained on; move "
            "them away, or name the folder of photographs with --train_split"
        )
    names = class_paths(train)
    tops = {path.split("/")[0] for path in images if "/" in path}
    if any((folder / f"{name}_stats.json").exists() for name in tops):
        class_names = None
        remarks.append("no labels, because the folders are shards of img2dataset")
    else:
        class_names = class_folders(names, itertools.chain(*train.values()), remarks)
    splits = {describe(train): images_to_dataset(folder, train, names, class_names)}
    unused = dict.fromkeys(choice.unused, "")
    if choice.validation is not None:
        validation = groups[choice.validation]
        names = class_paths(validation)
        found = {name.split("/")[0] for name in names}
        unknown = sorted(found.difference(class_names or ()))
        if class_names is None:
            unused[choice.validation] = ""
        elif any(name.count("/") != 1 for name in names) or len(unknown) == len(found) == 1:
            unused[choice.validation] = ", which has no class folders"
        elif unknown:
            if config.evaluates and len(unknown) < len(found):
                raise ConfigurationError(
                    f"--dataset {config.dataset}: {describe(validation)} has the class folder {unknown[0]}, which the "
                    f"training split does not have: rename it or move it away{config.or_no_evaluation}"
                )
            unused[choice.validation] = f", because the training split has no class folder {unknown[0]}"
        else:
            remarks += warn_of_folds(train, validation)
            splits[describe(validation)] = images_to_dataset(folder, validation, names, class_names)
    for split, reason in unused.items():
        number = sum(map(len, groups[split].values()))
        if split == UNNAMED and choice.train == TRAIN and class_names is None and len(groups) == 2:
            reason = " (if train is a class, rename its folder)"
        remarks.append(f"not used: {count(number, 'image')} in {describe(groups[split], True)}{reason}")
    return splits


def group_by_split(images: Sequence[str], called_train: Sequence[str], config: ImageSettings) -> dict[str, Places]:
    """Return the images of each split, by the folders that are this split.

    A folder directly in the top folder may be a split. A deeper one may be a class: it is a split only if a folder of
    the same depth is a split of the other kind, as `data/val` is for `data/train`. Folders that the flags name are
    splits, too. Inside a training split, another split counts: in `train/train` and `train/val`.
    """
    children: dict[str, set[str]] = {}
    for folder in {*map(posixpath.dirname, images), *called_train}:
        while folder:
            parent, name = posixpath.split(folder)
            children.setdefault(parent, set()).add(name)
            folder = parent
    found_in = {
        parent: {name: split for name in names if (split := split_of_folder(name, names)) != UNNAMED}
        for parent, names in children.items()
    }
    kinds: dict[int, set[bool]] = {}  # by depth
    for parent, found in found_in.items():
        kinds.setdefault(depth_of(parent), set()).update(split == TRAIN for split in found.values())
    flags = [name for name in (config.train_split, config.validation_split) if name is not None]
    splits = {"": UNNAMED}
    for parent, names in children.items():
        found = found_in[parent] if not parent or len(kinds[depth_of(parent)]) == 2 else {}
        for name in names:
            place = posixpath.join(parent, name)
            split = next((flag for flag in flags if flag in (name, place, found.get(name))), found.get(name))
            if split is not None:
                splits[place] = split

    @functools.cache
    def place_of(folder: str) -> str:
        """Return the folder around this one that is its split: the outermost for evaluation, else the innermost.

        The innermost also counts if a flag names it.
        """
        names = folder.split("/")
        outer = ("/".join(names[:depth]) for depth in range(1, len(names) + 1))
        places = [place for place in outer if place in splits]
        if places and splits[places[-1]] in flags and splits[places[-1]] != TRAIN:
            return places[-1]
        held_out = (place for place in places if splits[place] not in (TRAIN, config.train_split))
        return next(held_out, places[-1] if places else "")

    groups: dict[str, Places] = {}
    for path in images:
        place = place_of(posixpath.dirname(path))
        groups.setdefault(splits[place], {}).setdefault(place, []).append(path)
    return groups


def depth_of(folder: str) -> int:
    return folder.count("/") + 1 if folder else 0


def describe(places: Places, with_top: bool = False) -> str:
    """Return the folders of a split in words. If `with_top`, those below the top folder stand for it."""
    if with_top and "" in places:
        below: dict[str, set[str]] = {}
        for folder in sorted({posixpath.dirname(path) for path in places[""]}):
            below.setdefault(folder.split("/")[0], set()).add(folder)
        names = [f"{posixpath.commonpath(folders)}/" if top else "the top folder" for top, folders in below.items()]
    else:
        names = [f"{place}/" for place in places if place]
    return list_places(names)


def list_places(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= MAX_LISTED else [*names[:MAX_LISTED], "…"])


def evaluation_folders(folders_of: Mapping[str, set[str]]) -> list[str]:
    """Return the folders that are called like evaluation splits, given those of the images below each place."""
    found = set()
    for place, folders in folders_of.items():
        for folder in folders:
            names = folder.split("/")
            for depth in range(depth_of(place), len(names)):
                if says_evaluation(names[depth]):
                    found.add("/".join(names[: depth + 1]) + "/")
    return sorted(found)


def mask_folders(folders_of: Mapping[str, set[str]]) -> list[str]:
    """Return the folders that are called like masks, if others are not, given those of the images below each place."""
    found, others = set(), False
    for folder in itertools.chain(*folders_of.values()):
        names = folder.split("/")
        depth = next((depth for depth, name in enumerate(names, 1) if MASKS.fullmatch(name)), None)
        if depth is None:
            others = True
        else:
            found.add("/".join(names[:depth]) + "/")
    return sorted(found) if others else []


def class_paths(places: Places) -> list[str]:
    """Return the paths of a split's images, relative to the folder that holds the class folders, if there are any.

    This is the folder of the split, or the only folder in it. If several folders without class folders are the split,
    as `cat/train` and `dog/train`, the folders around them may be the classes. A folder of the same name in all class
    folders is left out.
    """
    names = [path[len(place) + 1 :] if place else path for place, paths in places.items() for path in paths]
    inner = {name.split("/")[0] if "/" in name else "" for name in names}
    if len(places) > 1 and (len(inner) == 1 or "" in inner):
        outer = itertools.chain.from_iterable([posixpath.dirname(place)] * len(places[place]) for place in places)
        names = [posixpath.join(folder, name) for folder, name in zip(outer, names, strict=True)]
    folders = {posixpath.dirname(name) for name in names}
    wrapper = posixpath.commonpath(folders)
    if wrapper and wrapper not in folders:
        names = [name[len(wrapper) + 1 :] for name in names]
    # Tiny ImageNet has n01443537/images/n01443537_0.JPEG.
    inner = {tuple(name.split("/")[1:-1]) for name in names}
    if len(inner) > 1 or inner == {()}:
        return names
    return [f"{name.split('/')[0]}/{posixpath.basename(name)}" for name in names]


def class_folders(names: Sequence[str], paths: Iterable[str], remarks: list[str]) -> list[str] | None:
    """Return the class names if every file is directly in one of several folders, else None; remark on both.

    Args:
        names: paths relative to the folder of the class folders.
        paths: paths relative to the top folder.
        remarks: list to which this adds the reason, or the names of a few classes.
    """
    # No list of parts: it would take 200 bytes an image.
    classes = sorted({name.partition("/")[0] for name in names if "/" in name})
    if len(classes) < 2:
        reason = f"all images are in one folder, {classes[0]}" if classes else "there are no class folders"
        remarks.append(f"no labels, because {reason}")
        return None
    stray = next((path for path, name in zip(paths, names, strict=True) if name.count("/") != 1), None)
    if stray is not None:
        remarks.append(f"no labels, because {stray} is not directly in a class folder")
        return None
    if all(map(PART.fullmatch, classes)):
        remarks.append(f"no labels, because {classes[0]} and the folders beside it are parts, not classes")
        return None
    if len(classes) <= MAX_LISTED:  # so that folders of masks or patients are not mistaken for classes
        remarks.append(f"classes: {', '.join(classes)}")
    return classes


def images_to_dataset(folder: Path, places: Places, names: Sequence[str], class_names: list[str] | None) -> Dataset:
    """Return a Dataset of the images of a split, labelled by their class folders if class names are given.

    Args:
        folder: top folder.
        places: the images of the split.
        names: their paths, relative to the folder of the class folders.
        class_names: the classes of the training split, which include all folders.
    """
    paths = itertools.chain.from_iterable(places.values())
    columns, features = [image_column(f"{folder}/{path}" for path in paths)], Features({"image": Image(decode=False)})
    if class_names is not None:
        class_numbers = {name: i for i, name in enumerate(class_names)}
        columns.append(pyarrow.array([class_numbers[name.split("/")[0]] for name in names], pyarrow.int64()))
        features["label"] = ClassLabel(names=class_names)
    return to_dataset(pyarrow.Table.from_arrays(columns, schema=features.arrow_schema))


def image_column(paths: Iterable[str]) -> pyarrow.ChunkedArray:
    """Return a column of undecoded images at these paths, in chunks because one holds at most 2 GB of text."""
    chunks, paths, kind = [], iter(paths), Image(decode=False).pa_type
    while part := list(itertools.islice(paths, PATHS_PER_CHUNK)):
        names = pyarrow.array(part, pyarrow.string())
        chunks.append(pyarrow.StructArray.from_arrays([pyarrow.nulls(len(part), pyarrow.binary()), names], fields=kind))
    return pyarrow.chunked_array(chunks, kind)

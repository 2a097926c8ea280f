"""From a dataset's name to batches: what the images are, who reads which of them, and in what order.

Workers decode an image once and cut both of its crops (uint8); the photometric parameters travel beside them
and are applied on the training device (`m2t_accel.augment`).
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import datasets
import numpy as np
import pyarrow
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import DataLoader

from m2t_accel.augment import (
    NUM_UNIFORMS,
    Photometry,
    central_view,
    cut,
    draw_crop,
    draw_uniforms,
    photometry_parameters,
)
from m2t_accel.recipes import ConfigurationError, PretrainConfig, did_you_mean

IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
)
VALIDATION_NAMES = ("val", "validation", "valid", "test")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")


# --- what the images are


@dataclass(frozen=True)
class ImageData:
    """Images to train on and, where there are labels, images held out for evaluation.

    Both have a column `image` of undecoded {"bytes", "path"}, and `label` (int) where `class_names` is given.
    """

    train: Dataset
    validation: Dataset | None
    class_names: list[str] | None
    note: str  # one line for people: what was found


def load_images(config: PretrainConfig) -> ImageData:
    """The images of `config.dataset`, and a validation split where there are labels.

    Raises:
        ConfigurationError: there are no images, no such column, or fewer images than one batch.
    """
    if config.dataset == "digits":
        splits = load_digits()
    elif Path(config.dataset).exists():
        splits = load_folder(Path(config.dataset))
    else:
        splits = load_hub(config.dataset)
    splits = {name: split for name, split in splits.items() if len(split)}
    if not splits:
        raise ConfigurationError(f"--dataset {config.dataset} holds no image: its files have no rows")
    train_name = "train" if "train" in splits else next(iter(splits))
    validation_name = next((name for name in VALIDATION_NAMES if name in splits and name != train_name), None)
    wanted = [train_name] + ([validation_name] if validation_name else [])
    splits = standard_columns({name: splits[name] for name in wanted}, config)
    train, validation = splits[train_name], splits.get(validation_name)
    class_names = train.features["label"].names if "label" in train.features else None
    origin = "its own validation split"
    if class_names is None or (validation is not None and "label" not in validation.features):
        validation = None
    elif validation is None and config.validation_fraction > 0:
        num_held_out = max(1, round(config.validation_fraction * len(train)))
        # Not the run's seed: the figure must not depend on a lucky split. Scattered, because files come class by class.
        order = np.random.default_rng(0).permutation(len(train))
        validation = train.select(np.sort(order[:num_held_out]))
        train = train.select(np.sort(order[num_held_out:]))
        origin = "held out of the training images"
    if len(train) < config.batch_size:
        raise ConfigurationError(
            f"--dataset {config.dataset} has {len(train)} images to train on, fewer than one batch: "
            f"use --batch_size {max(2, len(train) // 2)} --device_batch_size {max(2, len(train) // 2)} or smaller"
        )
    note = f"{config.dataset}: {len(train):,} images"
    if class_names is not None:
        note += f" of {len(class_names)} classes"
    if validation is not None:
        note += f"; kNN is measured on {len(validation):,} others ({origin})"
    return ImageData(train, validation, class_names, note)


def load_digits() -> dict[str, Dataset]:
    """scikit-learn's 1797 handwritten digits, 8x8 pixels, as PNG; every fifth is for evaluation."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = []
    for pixels in digits.images:  # 0 to 16 each
        _, png = cv2.imencode(".png", np.rint(pixels * (255 / 16)).astype(np.uint8))
        images.append({"bytes": png.tobytes(), "path": None})
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=[str(n) for n in range(10)])})
    whole = Dataset.from_dict({"image": images, "label": digits.target}, features=features)
    held_out = np.arange(len(whole)) % 5 == 0
    return {"train": whole.select(np.flatnonzero(~held_out)), "val": whole.select(np.flatnonzero(held_out))}


def load_folder(folder: Path) -> dict[str, Dataset]:
    """The splits of a folder: parquet files if it holds any, else image files.

    `train/` and `val/` (or validation, valid, test) in it are splits; without `train/` the folder is one.
    """
    if folder.is_file():
        raise ConfigurationError(f"--dataset {folder} is a file: give the folder that it is in")
    parquet = sorted(path for path in folder.rglob("*.parquet"))
    if parquet:
        return load_parquet(folder, parquet)
    roots = {"train": folder / "train"} if (folder / "train").is_dir() else {"train": folder}
    if roots["train"] != folder:
        roots |= {name: folder / name for name in VALIDATION_NAMES if (folder / name).is_dir()}
    else:
        alone = [name for name in VALIDATION_NAMES if (folder / name).is_dir()]
        if len(alone) == 1 and sum(entry.is_dir() for entry in os.scandir(folder)) == 1:
            roots["train"] = folder / alone[0]
    splits, class_names = {}, None
    for name, root in roots.items():
        paths = find_images(root)
        if not paths:
            if name == "train":
                raise ConfigurationError(
                    f"--dataset {root} holds no image: looked for *.parquet and, at any depth, for "
                    f"{' '.join(sorted(IMAGE_EXTENSIONS))}"
                )
            continue
        class_names = class_names if splits else class_folders(root, paths)
        splits[name] = images_to_dataset(root, paths, class_names)
    return splits


def find_images(folder: Path) -> list[str]:
    """The paths of all image files at any depth, sorted; one scan, hidden entries left out."""
    found, pending = [], [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS:
                    found.append(entry.path)
                elif entry.is_dir():
                    pending.append(entry.path)
    return sorted(found)


def class_folders(root: Path, paths: Sequence[str]) -> list[str] | None:
    """The class names where every image lies in a folder right below the root and there are several, else None."""
    depth = len(str(root)) + 1
    parts = [path[depth:].split(os.sep) for path in paths]
    names = sorted({part[0] for part in parts})
    return names if all(len(part) == 2 for part in parts) and len(names) > 1 else None


def images_to_dataset(root: Path, paths: Sequence[str], class_names: list[str] | None) -> Dataset:
    """A Dataset of paths, labelled by the folder right below the root where class names are given."""
    storage = pyarrow.StructArray.from_arrays(
        [pyarrow.nulls(len(paths), pyarrow.binary()), pyarrow.array(paths, pyarrow.string())],
        names=["bytes", "path"],
    )
    columns, features = [storage], Features({"image": Image(decode=False)})
    if class_names is not None:
        depth, index = len(str(root)) + 1, {name: i for i, name in enumerate(class_names)}
        folders = [path[depth:].split(os.sep)[0] for path in paths]
        unknown = sorted(set(folders) - index.keys())
        if unknown:
            raise ConfigurationError(
                f"--dataset: {root} has the class folder {unknown[0]}, which the training split has not; "
                "both need the same names"
            )
        columns.append(pyarrow.array([index[name] for name in folders], pyarrow.int64()))
        features["label"] = ClassLabel(names=class_names)
    return Dataset(pyarrow.Table.from_arrays(columns, schema=features.arrow_schema))


def load_parquet(folder: Path, files: Sequence[Path]) -> dict[str, Dataset]:
    """The splits of a folder of parquet files, told by a split's name in their path, such as `train-00000-of-…`."""
    by_split: dict[str, list[str]] = {}
    for path in files:
        # The Hub's names: data/train-00000-of-00002.parquet, or train/0000.parquet.
        relative = path.relative_to(folder)
        words = {part.split("-")[0].split(".")[0].lower() for part in relative.parts}
        name = next((name for name in ("train", *VALIDATION_NAMES) if name in words), "train")
        by_split.setdefault(name, []).append(str(path))
    return call_datasets(folder, "parquet", data_files=by_split)


def load_hub(dataset_id: str) -> dict[str, Dataset]:
    """The splits of a dataset on the Hub, downloaded to the cache."""
    return call_datasets(dataset_id, dataset_id)


def call_datasets(shown: object, *arguments: object, **options: object) -> dict[str, Dataset]:
    """`datasets.load_dataset`, its many ways to fail as one line."""
    try:
        return dict(datasets.load_dataset(*arguments, **options))
    except Exception as error:  # of datasets, huggingface_hub, pyarrow, fsspec, httpx: no common ancestor
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__  # what the wrapper says is only that something went wrong
        reason = textwrap.shorten(str(error), 240, placeholder=" …").rstrip(".")
        raise ConfigurationError(
            f"--dataset {shown} cannot be loaded ({type(error).__name__}: {reason}); give a folder that exists, "
            "or a Hub id that you can reach (`hf auth login` for a gated one)"
        ) from error


def standard_columns(splits: dict[str, Dataset], config: PretrainConfig) -> dict[str, Dataset]:
    """The splits with a column `image`, undecoded, and a ClassLabel column `label` where they have labels.

    The first split says what the columns are and which classes there are.
    """
    features = next(iter(splits.values())).features
    columns = list(features)
    image = config.image_column or next(
        (name for name, feature in features.items() if isinstance(feature, Image)),
        next((name for name in IMAGE_COLUMNS if name in columns), None),
    )
    label = config.label_column or next((name for name in LABEL_COLUMNS if name in columns), None)
    for flag, name in (("image_column", image), ("label_column", label)):
        if name is not None and name not in columns:
            raise ConfigurationError(
                f"--{flag} {name}: no such column{did_you_mean(name, columns)}; there are {', '.join(columns)}"
            )
    if image is None:
        raise ConfigurationError(
            f"--dataset {config.dataset} has no column of images; name one of {', '.join(columns)} with --image_column"
        )
    standard = {}
    for name, split in splits.items():
        wanted = {image: "image"} | ({label: "label"} if label in split.features else {})
        split = split.select_columns(list(wanted)).rename_columns({k: v for k, v in wanted.items() if k != v})
        if split.features["image"] != Image(decode=False):
            try:
                split = split.cast_column("image", Image(decode=False))
            except (TypeError, ValueError, pyarrow.ArrowException):
                raise ConfigurationError(
                    f"--image_column {image}: not a column of images but {split.features['image']}"
                ) from None
        standard[name] = split
    return standard if label is None else with_class_labels(standard, label, required=config.label_column is not None)


def with_class_labels(splits: dict[str, Dataset], column: str, required: bool) -> dict[str, Dataset]:
    """The splits with `label` as one ClassLabel: of class labels, whole numbers from 0, words or booleans.

    A split whose labels are missing or negative (the Hub's way to withhold them) loses the column, and so do
    all where the labels are no classes, unless they are `required`.
    """
    first = next(iter(splits.values()))
    feature = first.features["label"]
    values = {
        name: np.asarray(split.with_format("numpy")["label"][:])
        for name, split in splits.items()
        if "label" in split.features
    }
    dtype = feature.dtype if isinstance(feature, Value) else ""
    if isinstance(feature, ClassLabel):
        names = feature.names
    elif dtype in ("string", "large_string", "bool"):
        names = sorted({str(value) for value in values[next(iter(splits))]})
        index = {name: i for i, name in enumerate(names)}
        unknown = sorted({str(value) for part in values.values() for value in part} - index.keys())
        if unknown:
            raise ConfigurationError(f"the label {unknown[0]} of a validation split is not among the training labels")
        values = {name: np.array([index[str(value)] for value in part]) for name, part in values.items()}
    elif dtype.startswith(("int", "uint")) and max(part.max() for part in values.values()) < len(first):
        names = [str(i) for i in range(max(part.max() for part in values.values()) + 1)]
    elif required:
        raise ConfigurationError(f"--label_column {column}: not class labels but {feature}")
    else:
        values = {}
    labelled = {}
    for name, split in splits.items():
        has_labels = name in values and values[name].min() >= 0  # false also for missing labels, which are NaN
        if "label" in split.features and not (has_labels and isinstance(feature, ClassLabel)):
            split = split.remove_columns("label")
            if has_labels:
                split = split.add_column("label", values[name].astype(np.int64), feature=ClassLabel(names=names))
        labelled[name] = split
    return labelled


def decode_image(image: dict[str, object]) -> np.ndarray:
    """An undecoded {"bytes", "path"} as (H, W, 3) uint8 RGB, turned upright by its EXIF orientation."""
    content = image["bytes"]
    if content is None:
        content = Path(image["path"]).read_bytes()
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB) if content else None
    if pixels is None:  # formats that OpenCV was built without
        pixels = np.asarray(PILImage.open(io.BytesIO(content)).convert("RGB"))
    return pixels


# --- who reads what, and when


def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation of range(num_images), (num_images,) int64."""
    return np.random.default_rng((seed, epoch)).permutation(num_images)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Optimizer steps of one epoch; the last, partial batch is dropped."""
    return num_images // batch_size


class DeviceBatches:
    """The sub-batches that one process reads in an epoch, as lists of (epoch, sample).

    Global batch k is the k-th slice of the epoch's order, cut into sub-batches of `device_batch_size`, one for
    each virtual device; the processes take them in turn. So what a global batch holds, and what each
    BatchNorm sees, does not depend on the number of processes. Set `epoch` before each pass.
    """

    def __init__(self, num_images: int, config: PretrainConfig, num_processes: int, process_index: int) -> None:
        self.num_images = num_images
        self.config = config
        self.num_processes = num_processes
        self.process_index = process_index
        self.epoch = 0

    def __len__(self) -> int:
        steps = steps_per_epoch(self.num_images, self.config.batch_size)
        return steps * self.config.num_virtual_devices // self.num_processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = epoch_order(self.num_images, self.config.seed, self.epoch)
        size = self.config.device_batch_size
        num_sub_batches = len(self) * self.num_processes
        for sub_batch in range(self.process_index, num_sub_batches, self.num_processes):
            samples = order[sub_batch * size : (sub_batch + 1) * size]
            yield [(self.epoch, int(sample)) for sample in samples]


class ViewBatch(NamedTuple):
    """Two views of N images, not yet coloured: view 1 of all images, then view 2 of all."""

    crops: Tensor  # (2 N, H, W, 3) uint8
    photometry: Photometry  # of 2 N views
    samples: Tensor  # (N,) int64


class TwoViews:
    """A map-style torch dataset whose batch, asked for by (epoch, sample) pairs, is a ViewBatch."""

    def __init__(self, images: Dataset, config: PretrainConfig) -> None:
        self.images = images.select_columns("image")
        self.config = config

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> ViewBatch:
        size, num_images = self.config.image_size, len(keys)
        crops = np.empty((2, num_images, size, size, 3), np.uint8)
        uniforms = np.empty((2, num_images, NUM_UNIFORMS))
        rows = self.images[[sample for _, sample in keys]]["image"]
        for i, ((epoch, sample), row) in enumerate(zip(keys, rows, strict=True)):
            image = decode_image(row)
            for view in range(2):
                uniforms[view, i] = draw_uniforms(self.config.seed, epoch, sample, view)
                crop = draw_crop(uniforms[view, i], *image.shape[:2], self.config)
                crops[view, i] = cut(image, crop, size)
        views = np.repeat([0, 1], num_images)
        return ViewBatch(
            crops=torch.from_numpy(crops.reshape(-1, size, size, 3)),
            photometry=photometry_parameters(uniforms.reshape(-1, NUM_UNIFORMS), views, self.config),
            samples=torch.tensor([sample for _, sample in keys]),
        )


class CentralViews:
    """A map-style torch dataset whose batch, asked for by samples, is their evaluation crops (N, H, W, 3) uint8."""

    def __init__(self, images: Dataset, config: PretrainConfig) -> None:
        self.images = images.select_columns("image")
        self.config = config

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, samples: Sequence[int]) -> Tensor:
        size, share = self.config.image_size, self.config.evaluation_crop
        rows = self.images[list(samples)]["image"]
        return torch.from_numpy(np.stack([central_view(decode_image(row), size, share) for row in rows]))


def create_loader(
    dataset: TwoViews | CentralViews,
    batches,
    config: PretrainConfig,
    pin_memory: bool = False,
    persistent: bool = False,
) -> DataLoader:
    """A DataLoader of whole batches, in the order of `batches` (an iterable of lists of keys).

    It is not given to `accelerator.prepare`, which would split the batches a second time: `batches` holds
    this process's own.
    """
    num_workers = default_num_workers() if config.num_workers is None else config.num_workers
    cv2.setNumThreads(0)  # the workers are the parallelism; OpenCV's threads would fight over the cores
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=persistent and num_workers > 0,
        prefetch_factor=4 if num_workers > 0 else None,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),  # its own: the global one must not depend on how often a loader started
    )


def as_it_is(batch):
    return batch


def quiet_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def default_num_workers() -> int:
    """Cores that training leaves free, shared by the processes of this machine; at most 8 each."""
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return max(0, min(8, len(os.sched_getaffinity(0)) // num_local_processes - 1))

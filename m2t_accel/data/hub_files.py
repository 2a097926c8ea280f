"""Image files on the Hub, loose or in zips: each can be read by itself, so they are shuffled like local files."""

from __future__ import annotations

import dataclasses
import functools
import posixpath
import zipfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset

from m2t_accel.config.data import ImageSettings
from m2t_accel.data.columns import find_label_column
from m2t_accel.data.held_out import hold_out_images
from m2t_accel.data.shards import MAX_HELD_BYTES, Reader, is_remote, read_file, to_dataset, with_retries
from m2t_accel.progress import late_progress_bar

RUN_IMAGES = 64  # neighbours in a zip that are read one after the other
OPEN_ZIPS = 16  # of a process; the list of a zip's members takes about 1 kB each
READERS = 16  # threads that read images for evaluation


def list_files(stream: IterableDataset, config: ImageSettings, remarks: list[str]) -> Dataset:
    """Return the addresses of all images of a split, with a column `label` if there are labels.

    Args:
        stream: rows that each name a file, as `datasets` makes them from folders of images.
        config: may name the column of labels.
        remarks: list to which this adds notes for the user.
    """
    features = stream.features
    column = next(name for name, feature in features.items() if isinstance(feature, Image))
    label = find_label_column(features, column, config, remarks)
    # The class folders inside of a zip are not found by `datasets` when it reads the rows.
    by_folder = (
        label is not None and set(features) == {column, label.name} and isinstance(features[label.name], ClassLabel)
    )
    chosen = [column, *([label.name] if label and not by_folder else [])]
    rows = list(late_progress_bar("listing images on the Hub", " images", stream.select_columns(chosen).decode(False)))
    columns, kinds = {"image": [row[column] for row in rows]}, Features({"image": Image(decode=False)})
    if label is not None:
        kinds["label"] = features[label.name]
        folders = (posixpath.basename(posixpath.dirname(row[column]["path"].partition("::")[0])) for row in rows)
        numbers = {name: number for number, name in enumerate(kinds["label"].names)} if by_folder else {}
        columns["label"] = [numbers[f] for f in folders] if by_folder else [row[label.name] for row in rows]
    return to_dataset(pyarrow.table(columns, schema=kinds.arrow_schema))


def is_listed(images: Dataset) -> bool:
    """Return whether the images are files on the Hub. A copy of zips has addresses of members, too, but local ones."""
    first = images[0]["image"] or {"bytes": b""}
    return first["bytes"] is None and is_remote((first["path"] or "").rpartition("::")[2])


class HubFiles:
    """Image files on the Hub as pieces: one image each, or a run of neighbours in a zip."""

    def __init__(self, images: Dataset) -> None:
        """Divide the images into pieces.

        Args:
            images: addresses of the images, as `list_files` returns them.
        """
        self.files = [image["path"] for image in images["image"]]
        starts, archive, number = [], "", 0
        for sample, path in enumerate(self.files):
            previous, archive = archive, path.rpartition("::")[2] if path.startswith("zip://") else ""
            number = number + 1 if archive and archive == previous else 0
            if number % RUN_IMAGES == 0:
                starts.append(sample)
        self.first_samples = np.array(starts)
        self.piece_sizes = np.diff(np.append(self.first_samples, len(self.files))).astype(np.int32)

    def __len__(self) -> int:
        return len(self.files)

    def open(self, piece: int, max_held_bytes: int = MAX_HELD_BYTES) -> Reader:
        return functools.partial(self.read, int(self.first_samples[piece]))

    def read(self, start: int, first: int, stop: int) -> tuple[np.ndarray, list[dict[str, object]]]:
        """Return the sample numbers and images of rows `first` to `stop` of the piece that starts at sample `start`.

        Raises:
            ConfigurationError: a file is missing, or the network fails.
        """
        samples = np.arange(start + first, start + stop)
        return samples, [read_image(self.files[sample]) for sample in samples.tolist()]


def hold_out_files(
    train: Dataset, validation: Dataset | None, limits: tuple[int, int], config: ImageSettings
) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """Return training images and, if they have labels, some training and validation images in memory.

    Args:
        train: training split, as `list_files` returns it.
        validation: validation split, if there is one.
        limits: numbers of training and of validation images to hold in memory.
        config: settings of evaluation.
    """
    share = min(config.validation_fraction, limits[1] / len(train))
    train, bank, validation = hold_out_images(train, validation, dataclasses.replace(config, validation_fraction=share))
    if not config.evaluates:
        return train, None, None
    bank, validation = (
        None if images is None else in_memory(images, limit)
        for images, limit in zip((bank, validation), limits, strict=True)
    )
    return train, bank, validation


def in_memory(images: Dataset, limit: int) -> Dataset:
    """Return up to `limit` of the images, drawn by a fixed seed, with their bytes."""
    if len(images) > limit:
        images = images.select(np.sort(np.random.default_rng(0).permutation(len(images))[:limit]))
    with ThreadPoolExecutor(READERS) as readers:
        rows = list(readers.map(lambda image: read_image(image["path"]), images["image"]))
    columns = {"image": rows} | ({"label": images["label"]} if "label" in images.features else {})
    return to_dataset(pyarrow.table({k: list(v) for k, v in columns.items()}, schema=images.features.arrow_schema))


def read_image(path: str) -> dict[str, object]:
    if not path.startswith("zip://"):
        return {"bytes": read_file(path, lambda source: source.read()), "path": path}
    member, _, archive = path.removeprefix("zip://").rpartition("::")

    def read_member() -> bytes:
        try:
            return open_zip(archive).read(member)
        except zipfile.BadZipFile:
            return b""  # a damaged member, which is then reported as a broken image
        except Exception:
            open_zip.cache_clear()  # its connection may be lost
            raise

    return {"bytes": with_retries(archive, read_member), "path": path}


@functools.lru_cache(OPEN_ZIPS)
def open_zip(archive: str) -> zipfile.ZipFile:
    """Open a remote zip. Several threads may read its members."""
    filesystem, path = fsspec.core.url_to_fs(archive)
    return zipfile.ZipFile(filesystem.open(path, "rb", block_size=1 << 20))

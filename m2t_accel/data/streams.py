"""Images on the Hub that `datasets` reads row by row: tars, JSON and other formats without random access."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow
from datasets import Dataset, Features, Image, IterableDataset

from m2t_accel.config.data import ImageSettings, TrainingSettings
from m2t_accel.config.fields import ConfigurationError, count
from m2t_accel.data.columns import find_image_column, find_label_column
from m2t_accel.data.labels import find_classes, stored_labels
from m2t_accel.data.order import PIECES_STREAM, Pool, num_pool_batches, num_steps_per_epoch, shuffle_pool
from m2t_accel.data.parquet import streamed
from m2t_accel.data.shards import is_remote, read_file, with_retries

MAX_ROWS = 10**9  # rows of a shard; the number of a sample is that of its shard times this, plus that of its row
FIRST_ROWS = 8  # rows that are looked at to find the columns
SAMPLED_SHARDS = 16  # shards whose first rows are used for evaluation


class Position(NamedTuple):
    """A place in the rows that a virtual device reads in an epoch."""

    shard: int = 0  # place in the list of the device's shards, counted on when it starts them again
    row: int = 0


class HubStream:
    """One split of a dataset, as shards that can only be read from their first row on.

    `datasets` cannot resume a shuffled stream exactly. So this reads single shards, in the order of their rows.
    """

    def __init__(
        self,
        stream: IterableDataset,
        files: Sequence[str],
        num_images: int,
        config: ImageSettings,
        remarks: list[str],
    ) -> None:
        """Find the columns.

        Args:
            stream: a stream that is not shuffled.
            files: the files of the split.
            num_images: images of the split, or of an epoch.
            config: may name the columns.
            remarks: list to which this adds notes for the user.

        Raises:
            ConfigurationError: there is no column of images, or no row.
        """
        self.files = files
        self.num_images = num_images
        # It would wait for minutes at every read, beside the repeats of with_retries.
        datasets.config.STREAMING_READ_MAX_RETRIES = 1
        self.num_shards = stream.num_shards
        self.places = range(stream.num_shards)  # of the shards in the stream
        self.max_rows: int | None = None  # of each shard
        self.stream = stream = stream.decode(False) if stream.features else stream
        first = with_retries(self.file(0), lambda: list(islice(iter(stream), FIRST_ROWS)))
        if not first:
            raise ConfigurationError(f"--dataset {config.dataset}: {self.file(0)} and the other shards hold no row")
        self.features = stream.features or Dataset.from_list(first).features  # some formats do not name them

        def rows(column: str) -> Iterator[tuple[str, object]]:
            return ((f"row {i} of {self.file(0)}", fetch(row[column])) for i, row in enumerate(first))

        self.column = find_image_column(self.features, rows, config)
        self.label = find_label_column(self.features, self.column.name, config, remarks)
        self.stream = stream.select_columns([self.column.name, *([self.label.name] if self.label else [])])

    def __len__(self) -> int:
        return self.num_images

    def file(self, shard: int) -> str:
        """Return the file of a shard; if a shard is not a file, a phrase that says which one it is."""
        if len(self.files) == self.num_shards:
            return self.files[shard]
        return f"{self.files[0]} (shard {shard} of {self.num_shards})"

    def rows(self, shard: int, first: int = 0) -> Iterator[dict[str, object]]:
        """Yield the rows of a shard. Those before `first` are read too, as by `datasets` when it resumes."""
        return islice(iter(self.stream.shard(self.stream.num_shards, self.places[shard])), first, self.max_rows)

    def spread(self, number: int) -> HubStream:
        """Return the same split with only `number` images: the first of evenly spread shards, an equal part of each."""
        count = min(-(-number * self.num_shards // self.num_images), self.num_shards)
        chosen = [i * self.num_shards // count for i in range(count)]
        selection = copy.copy(self)
        if len(self.files) == self.num_shards:
            selection.files = [self.files[shard] for shard in chosen]
        selection.places = [self.places[shard] for shard in chosen]
        selection.num_shards, selection.num_images, selection.max_rows = count, number, -(-number // count)
        return selection

    def image(self, row: dict[str, object], shard: int, number: int) -> dict[str, object]:
        """Return the undecoded image of a row."""
        place = f"row {number} of {self.file(shard)}"
        image = streamed(fetch(row[self.column.name]), place, self.column.root)
        return image if place in image["path"] else {**image, "path": f"{image['path']}, {place}"}

    def first_rows(self, num_rows: int) -> tuple[np.ndarray, list[dict[str, object]]]:
        """Return the first rows of some shards, evenly spread.

        Returns:
            Sample numbers (n,), and rows with the keys `image`, undecoded, and `label` if there are labels.
        """
        shards = np.unique(np.linspace(0, self.num_shards - 1, SAMPLED_SHARDS).astype(int)).tolist()
        share = -(-num_rows // len(shards))

        def read(shard: int) -> list[tuple[int, dict[str, object]]]:
            def read_rows() -> list[tuple[int, dict[str, object]]]:
                return [
                    (shard * MAX_ROWS + i, {"image": self.image(row, shard, i)} | self.label_of(row))
                    for i, row in enumerate(islice(self.rows(shard), share))
                ]

            return with_retries(self.file(shard), read_rows)

        with ThreadPoolExecutor(SAMPLED_SHARDS) as readers:
            parts = [pair for part in readers.map(read, shards) for pair in part][:num_rows]
        return np.array([sample for sample, _ in parts], np.int64), [row for _, row in parts]

    def label_of(self, row: dict[str, object]) -> dict[str, object]:
        return {"label": row[self.label.name]} if self.label else {}


def fetch(value: object) -> object:
    """Return the value of a column of images, with its bytes if it is only the address of a file."""
    if isinstance(value, dict) and value.get("bytes") is None and is_remote(path := value.get("path") or ""):
        return {**value, "bytes": read_file(path, lambda source: source.read())}
    return value


def hold_out_stream(
    train: HubStream, validation: HubStream | None, limits: tuple[int, int], config: ImageSettings, remarks: list[str]
) -> tuple[HubStream, Dataset | None, Dataset | None]:
    """Return the stream, and some of its images and of the validation split in memory if both have labels.

    Args:
        train: training split.
        validation: validation split, if there is one.
        limits: numbers of training and of validation images to hold in memory.
        config: settings of the dataset and of evaluation.
        remarks: list to which this adds notes for the user.
    """
    if not config.evaluates:
        return train, None, None
    if train.label is None or validation is None or validation.label is None:
        missing = "a column of labels" if train.label is None else "a validation split with labels"
        remarks.append(f"no evaluation while training, because a stream holds nothing out and has no {missing}")
        return train, None, None
    (_, bank), (_, queries) = (
        split.first_rows(limit) for split, limit in zip((train, validation), limits, strict=True)
    )
    features = Features({"image": Image(decode=False), "label": train.features[train.label.name]})
    try:
        images = Dataset.from_list([*bank, *queries], features)
    except (TypeError, ValueError, pyarrow.ArrowException):
        remarks.append(
            f"no evaluation while training, because the labels of the splits differ ({validation.label.name})"
        )
        return train, None, None
    # The classes of both, because a few training images may lack some.
    labels = functools.partial(stored_labels, images)
    classes = find_classes(images.features["label"], labels, len(train), train.label, config, remarks)
    if classes is None:
        return train, None, None
    images = classes.apply(images)
    remarks.append(f"kNN compares with {len(bank):,} of the training images")
    return train, images.select(range(len(bank))), images.select(range(len(bank), len(images)))


class Part(NamedTuple):
    """The rows of one pool: number of the pool in its epoch, and number of images."""

    epoch: int
    index: int
    number: int


class StreamedOrder:
    """Order of the samples of a HubStream.

    In each epoch the shards, in an order drawn from the seed, are divided among the virtual devices. A device reads its
    shards one after the other, cuts the rows into pools and shuffles each. If its rows do not suffice, it starts its
    shards again; if they are too many, it leaves out the last ones. Devices share shards if there are too few.
    """

    def __init__(self, stream: HubStream, config: TrainingSettings) -> None:
        self.seed = config.seed
        self.size = config.device_batch_size
        self.steps = num_steps_per_epoch(len(stream), config.batch_size)
        self.pool_batches = num_pool_batches(config.batch_size)
        self.num_shards = stream.num_shards
        self.num_devices = config.num_virtual_devices
        # The largest number of equal groups of devices that is not larger than the number of shards.
        divisors = [n for n in range(1, self.num_devices + 1) if self.num_devices % n == 0]
        self.num_groups = max(n for n in divisors if n <= self.num_shards)
        self.group_size = self.num_devices // self.num_groups

    def shards(self, epoch: int, device: int) -> list[int]:
        """Return the shards that a device reads in an epoch."""
        order = np.random.default_rng((PIECES_STREAM, self.seed, epoch)).permutation(self.num_shards)
        return np.array_split(order, self.num_groups)[device % self.num_groups].tolist()

    def shows(self, device: int, shard: int, row: int) -> bool:
        """Return whether a device shows a row of its shards, which the devices of its group share."""
        return (shard + row) % self.group_size == device // self.num_groups

    def pool(self, epoch: int, device: int, index: int) -> Pool:
        """Return one pool of a virtual device in an epoch."""
        number = min(self.pool_batches, self.steps - index * self.pool_batches) * self.size
        return Pool([Part(epoch, index, number)], shuffle_pool(number, self.seed, epoch, device, index))

    def describe(self) -> Iterator[str]:
        """Yield remarks for the user about what the number of shards costs."""
        if self.group_size > 1:
            yield (
                f"{count(self.num_shards, 'shard')} for {self.num_devices} virtual devices: {self.group_size} devices "
                "read the same shards, and each shows a part of the rows"
            )
        if excess := self.num_shards % self.num_groups:
            share = excess * (1 - excess / self.num_groups) / self.num_shards
            yield (
                f"{self.num_shards} shards do not divide among {self.num_groups} devices: an epoch shows about "
                f"{share:.1%} of the images twice and as many not at all, other ones in each epoch"
            )


class StreamReader:
    """Reader of the pools of one virtual device, in their order."""

    def __init__(
        self,
        stream: HubStream,
        order: StreamedOrder,
        device: int,
        threads: ThreadPoolExecutor,
        start: Position | None = None,
    ) -> None:
        """Create a reader.

        Args:
            start: where the first pool starts. None: at the start of an epoch, or unknown; then the rows of the epoch
                before the first pool are read and discarded, a pool at a time.
        """
        self.stream, self.order, self.device, self.threads = stream, order, device, threads
        self.start = start
        self.starts: dict[tuple[int, int], Position] = {}  # of the pools that are being used or read
        self.epoch: int | None = None
        self.last: Future | None = None

    def submit(self, part: Part) -> Future:
        """Start to read a pool. Return the future of its samples (n,) and their undecoded images."""
        self.last = self.threads.submit(read_pool_after, self.last, self, part)
        return self.last

    def read(self, epoch: int, index: int, number: int) -> tuple[np.ndarray, list[dict[str, object]]]:
        """Read a pool. The pools are read in their order.

        Raises:
            ConfigurationError: a shard cannot be read, or the shards hold no row.
        """
        if epoch != self.epoch:
            is_first, self.epoch = self.epoch is None, epoch
            self.shards = self.order.shards(epoch, self.device)
            self.position, self.rows = Position(), None
            if is_first and self.start is not None:
                self.position = self.start
            else:
                for _ in range(index):  # one pool at a time, because all their images would fill the memory
                    self.take(self.order.pool_batches * self.order.size)
        self.starts = {key: place for key, place in self.starts.items() if key >= (epoch, index - 3)}
        self.starts[epoch, index] = self.position
        samples, images = self.take(number)
        return np.array(samples, np.int64), images

    def take(self, number: int) -> tuple[list[int], list[dict[str, object]]]:
        """Return the next samples and images; start the shards again after the last one."""
        samples: list[int] = []
        images: list[dict[str, object]] = []
        first = self.position.shard
        while len(samples) < number:
            shard = self.shards[self.position.shard % len(self.shards)]
            # If the reading fails, it goes on from the row that failed.
            with_retries(self.stream.file(shard), functools.partial(self.take_from, shard, number, samples, images))
            if not samples and self.position.shard - first > len(self.shards):
                raise ConfigurationError(f"{self.stream.file(shard)} and the other shards hold no row")
        return samples, images

    def take_from(self, shard: int, number: int, samples: list[int], images: list[dict[str, object]]) -> None:
        """Append samples and images of one shard, until there are enough or the shard ends."""
        place, row = self.position
        first_row = row
        try:
            if self.rows is None:
                self.rows = self.stream.rows(shard, row)
            for values in self.rows:
                if self.order.shows(self.device, shard, row):
                    image = self.stream.image(values, shard, row)
                    # A row that is shown a second time in an epoch gets a number of its own, and so other views.
                    repeats = place // len(self.shards)
                    samples.append((repeats * self.stream.num_shards + shard) * MAX_ROWS + row)
                    images.append(image)
                row += 1
                self.position = Position(place, row)
                if len(samples) == number:
                    return
        except Exception:
            self.rows = None
            if self.position.row > first_row:  # it is a new failure, after rows that could be read
                return
            raise
        self.position, self.rows = Position(place + 1), None


def read_pool_after(previous: Future | None, reader: StreamReader, part: Part) -> tuple:
    """Read a pool after the previous one. The previous one was submitted earlier, so the threads cannot deadlock."""
    if previous is not None:
        previous.result()  # if the previous pool could not be read, neither can this one
    return reader.read(*part)

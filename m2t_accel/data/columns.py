"""The columns of a table that hold images and labels: chosen by type, by a look at some rows, and by name."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.types
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, Image, LargeList, List, Value
from datasets.features.image import encode_np_array
from pyarrow import compute

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, did_you_mean
from m2t_accel.data.decode import DecodeError, decode_bytes, decode_image

IMAGE_COLUMNS = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values", "pixels", "photo", "picture", "image_bytes"),
    *("bytes", "content", "image_path", "file_path", "filepath", "file_name", "filename", "path", "file"),
)
LABEL_COLUMNS = (
    *("label", "labels", "fine_label", "cls", "class", "target", "class_label", "class_name", "class_id"),
    *("label_name", "label_id", "category", "category_name", "species", "y", "coarse_label"),
)
WORDS = ("string", "large_string", "string_view")
BINARY = ("binary", "large_binary", "binary_view")
NUM_PLACES = 8  # places, spread over a table, where rows are looked at
MAX_LISTED = 6  # columns that a message lists
MAX_SHOWN = 80  # characters of a text that a message shows
DECODE_BASE64 = 'dataset.map(lambda row: {"image": base64.b64decode(row["image"])})'

# A function of a column's name that yields some of its rows: a phrase that says where the row is, and its value.
Rows = Callable[[str], Iterable[tuple[str, object]]]


class ImageColumn(NamedTuple):
    """The column of images of a table."""

    name: str
    root: str  # folder where relative paths start; empty: the working directory


def find_image_column(features: Features, rows: Rows, config: ImageSettings) -> ImageColumn:
    """Return the column of images: the one that the flag names, else that of the best type.

    The types are, from the best: Image, a struct with `bytes`, binary, arrays of pixels, paths. Among columns of one
    type, those count that hold images in the rows looked at, and among these the usual names.

    Args:
        features: columns of the table.
        rows: yields some rows of a column.
        config: may name the column.

    Raises:
        ConfigurationError: a flag names a column that does not exist, no column can hold images, none of the rows
            looked at has an image, or several columns may be meant.
    """
    for flag, name in (("image_column", config.image_column), ("label_column", config.label_column)):
        if name is not None and name not in features:
            raise ConfigurationError(
                f"--{flag} {name}: no such column{did_you_mean(name, list(features))}; there are {', '.join(features)}"
            )
    ranks = {name: rank for name, feature in features.items() if (rank := image_rank(feature)) is not None}
    if fits_labels(features.get(config.label_column)):
        ranks.pop(config.label_column, None)
    given = config.image_column
    if given is not None:
        if given not in ranks:
            kind = explain_type(features[given])
            raise ConfigurationError(f"--image_column {given}: not a column of images but of {kind}{hint(ranks)}")
        best = [given]
    else:
        best = by_usual_names([name for name in ranks if ranks[name] == min(ranks.values())], IMAGE_COLUMNS)
    if not best:
        kinds = [f"{name} has {explain_type(feature)}" for name, feature in features.items()]
        raise ConfigurationError(f"--dataset {config.dataset} has no column of images: {listed(kinds)}")
    folder = config.dataset if os.path.isdir(config.dataset) else ""
    found = {name: look(rows(name), folder, config.max_image_pixels) for name in best}
    good = [name for name in best if isinstance(found[name], ImageColumn)]
    if not good:
        where = f"--image_column {given}" if given else f"--dataset {config.dataset}, column {best[0]}"
        others = [name for name in ranks if name != best[0]]
        raise ConfigurationError(f"{where}: none of the rows checked has an image; {found[best[0]]}{hint(others)}")
    if len(good) > 1 and good[0].casefold() not in IMAGE_COLUMNS:
        raise ConfigurationError(
            f"--dataset {config.dataset} has several columns of images: {listed(good)}; name one with --image_column"
        )
    return found[good[0]]._replace(name=good[0])


def image_rank(feature: object) -> int | None:
    """Return how well the type of a column fits images, 0 is best; None if it cannot hold images."""
    if isinstance(feature, Image):
        return 0
    if isinstance(feature, dict):
        content, path = (feature.get(name, Value("null")) for name in ("bytes", "path"))
        content, path = (kind.dtype if isinstance(kind, Value) else "" for kind in (content, path))
        if content in BINARY and path in (*WORDS, "null"):
            return 1
        return 4 if content == "null" and path in WORDS else None
    if isinstance(feature, Value):
        return 2 if feature.dtype in BINARY else 4 if feature.dtype in WORDS else None
    return 3 if isinstance(feature, Array2D | Array3D) or list_depth(feature) in (2, 3) else None


def list_depth(feature: object) -> int:
    """Return how deep lists of numbers are nested; 0 for anything else."""
    depth = 0
    while isinstance(feature, List | LargeList):
        feature, depth = feature.feature, depth + 1
    return depth if isinstance(feature, Value) and feature.dtype not in (*WORDS, *BINARY) else 0


def look(rows: Iterable[tuple[str, object]], folder: str, max_pixels: int) -> ImageColumn | str:
    """Return the root folder of the first row that has an image, as an ImageColumn; if no row has one, the reason.

    Args:
        rows: phrases that say where a row is, and values.
        folder: folder where relative paths may start, preferred to the working directory; empty if there is none.
        max_pixels: the largest image to decode.
    """
    first = ""
    for place, value in rows:
        for root in dict.fromkeys((folder, "")):
            try:
                decode_image(undecoded(value, root), max_pixels)
            except DecodeError as error:
                first = first or f"the first is {place}: {reason(value, error, folder)}"
            else:
                return ImageColumn("", root if is_relative(value) else "")
    return first or "there is none"


def undecoded(value: object, root: str = "") -> dict[str, object]:
    """Return the image of a row in the form that decode_image takes: bytes, or else a path.

    Args:
        value: a dict with bytes or a path, bytes, a path, or nested lists of pixels; None if the row has no image.
        root: folder where relative paths start; empty: the working directory.

    Raises:
        DecodeError: the pixels cannot be an image.
    """
    content, path = value, None
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
    elif isinstance(value, str):
        content, path = None, value
    elif isinstance(value, list | np.ndarray):
        content = encode_pixels(value)
    if content is None and path is not None:
        if "\0" in path:
            raise DecodeError("text with a zero character")
        path = os.path.join(root, path)
    return {"bytes": content, "path": path}


def stored_values(column: pyarrow.Array) -> list[object]:
    """Return the values of a column; those that are lists of numbers as arrays, which is three times as fast."""
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if not is_list(column.type):
        return column.to_pylist()
    return [to_array(value.values) if value.is_valid else None for value in column]


def to_array(values: pyarrow.Array) -> np.ndarray | list:
    """Return nested lists of equal lengths as an array, others as a list."""
    whole, shape = values, [len(values)]
    while is_list(values.type):
        lengths = compute.unique(compute.list_value_length(values)).to_pylist()
        if len(lengths) != 1 or None in lengths:
            return whole.to_pylist()
        shape.append(lengths[0])
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def is_list(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)


def is_relative(value: object) -> bool:
    image = undecoded(value) if isinstance(value, str | dict) else {"bytes": b""}
    return image["bytes"] is None and not os.path.isabs(image["path"])


def encode_pixels(values: list | np.ndarray) -> bytes:
    """Encode pixels as PNG: (H, W), (H, W, 1), (H, W, 3), (1, H, W) or (3, H, W) whole numbers from 0 to 255.

    Raises:
        DecodeError: they have another shape, type or range.
    """
    try:
        pixels = np.asarray(values)
    except ValueError:
        raise DecodeError("lists of different lengths") from None
    if not pixels.size:
        raise DecodeError("no pixels")
    if pixels.dtype.kind not in "ui":
        kind = "None among them" if pixels.dtype == object else f"type {pixels.dtype}"
        raise DecodeError(f"pixels with {kind}: store whole numbers from 0 to 255 (uint8)")
    shape = " × ".join(map(str, pixels.shape))
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim != 2 and pixels.shape[2:] != (3,):
        raise DecodeError(f"pixels in the shape {shape}: allowed are H × W, H × W × 1, H × W × 3 and 3 × H × W")
    if pixels.min() < 0 or pixels.max() > 255:
        raise DecodeError(f"pixels from {pixels.min()} to {pixels.max()}: scale them to 0 to 255")
    return encode_np_array(pixels.astype(np.uint8))["bytes"]


def reason(value: object, error: DecodeError, folder: str) -> str:
    """Return in a few words why a row is not an image."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        return "null"
    if isinstance(value, str | bytes) and is_base64(value):
        return f"an image as base64 text, to be decoded by {DECODE_BASE64}"
    if not isinstance(value, str):
        return str(error)
    text = " ".join(value.split())
    text = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
    if "://" in text:
        return f"the URL {text}; download the images, for example by img2dataset"
    places = f" in {folder} nor in {os.getcwd()}" if folder and not os.path.isabs(value) else ""
    return f"the text “{text}” is no path of an image{places} ({error})"


def is_base64(content: str | bytes) -> bool:
    """Return whether this is an image as base64 text, with or without `data:image/…;base64,` before it."""
    try:
        encoded = content.encode() if isinstance(content, str) else content
        decode_bytes(base64.b64decode(encoded.rpartition(b";base64,")[2].strip(), validate=True))
    except (UnicodeError, binascii.Error, DecodeError):
        return False
    return True


def dataset_rows(images: Dataset) -> Rows:
    """Return a function that yields some rows of a column, spread over the dataset."""

    def rows(column: str) -> Iterator[tuple[str, object]]:
        values = images.select_columns([column]).with_format("arrow")
        for row in spread(len(images)):
            yield f"row {row}", stored_values(values[row : row + 1][column].combine_chunks())[0]

    return rows


def spread(number: int) -> list[int]:
    """Return up to NUM_PLACES numbers of range(number), evenly spread."""
    return np.unique(np.linspace(0, number - 1, NUM_PLACES).astype(int)).tolist() if number else []


class LabelColumn(NamedTuple):
    """The column of labels of a table."""

    name: str
    others: list[str]  # other columns whose type fits labels


def find_label_column(
    features: Features, image: str, config: ImageSettings, remarks: list[str] | None = None
) -> LabelColumn | None:
    """Return the column of labels; None, with a remark, if there is none.

    It is the one that the flag names, a column `label`, the only ClassLabel column, the first of the usual names among
    ClassLabel columns, else the first of the usual names.

    Args:
        features: columns of the table.
        image: name of the column of images.
        config: may name the column.
        remarks: list to which this adds notes for the user.

    Raises:
        ConfigurationError: the flag names the column of images.
    """
    remarks = [] if remarks is None else remarks
    names = [name for name in features if name != image]
    fitting = [name for name in names if fits_labels(features[name]) and not name.startswith("__")]
    if config.label_column is not None:
        if config.label_column == image:
            raise ConfigurationError(
                f"--label_column {image}: this is the column of images; name another of {listed(names) or 'none'}"
            )
        return LabelColumn(config.label_column, [name for name in fitting if name != config.label_column])
    marked = [name for name in fitting if isinstance(features[name], ClassLabel)]
    if "label" in fitting:
        marked = ["label"]
    chosen = (
        marked if len(marked) == 1 else usual_names(marked) if marked else usual_names(fitting) or usual_names(names)
    )
    if chosen:
        if chosen[0].casefold() not in LABEL_COLUMNS:
            remarks.append(f"the classes are those of the column {chosen[0]}")
        return LabelColumn(chosen[0], [other for other in fitting if other != chosen[0]])
    if marked:
        remarks.append(f"no labels, because several columns hold classes; --label_column may name {listed(marked)}")
    elif fitting:
        remarks.append(f"no labels, because no column has a usual name; --label_column may name {listed(fitting)}")
    else:
        remarks.append("no labels, because no other column holds classes")
    return None


def fits_labels(feature: object) -> bool:
    """Return whether the type of a column fits labels: class labels, whole numbers, words or booleans."""
    if isinstance(feature, ClassLabel):
        return True
    dtype = feature.dtype if isinstance(feature, Value) else ""
    return dtype in (*WORDS, "bool") or dtype.startswith(("int", "uint"))


def by_usual_names(names: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Return the names with the usual ones first, in the order of these. Upper and lower case are the same."""
    order = {name: place for place, name in enumerate(usual)}
    return sorted(names, key=lambda name: order.get(name.casefold(), len(usual)))


def usual_names(names: Sequence[str]) -> list[str]:
    """Return those that are usual names of labels, in the order of these."""
    return [name for name in by_usual_names(names, LABEL_COLUMNS) if name.casefold() in LABEL_COLUMNS]


def hint(others: Iterable[str]) -> str:
    others = listed(list(others))
    return f"; --image_column may name {others}" if others else ""


def listed(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= MAX_LISTED else [*names[:MAX_LISTED], "…"])


def describe_type(feature: object) -> str:
    """Return the type of the values of a column in words."""
    if isinstance(feature, dict):
        return f"structs of {', '.join(feature)}"
    if isinstance(feature, ClassLabel):
        return "class labels"
    if isinstance(feature, List | LargeList):
        return f"lists of {describe_type(feature.feature)}"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def explain_type(feature: object) -> str:
    """Return the type of a column that cannot hold images in words, and what to do."""
    advice = ""
    if list_depth(feature) == 1:
        advice = ", which are no images: store files as binary, and pixels as lists of lists"
    elif isinstance(feature, List | LargeList) and image_rank(feature.feature) in (0, 1, 2):
        advice = ", several images in a row: store each in a row of its own"
    return describe_type(feature) + advice

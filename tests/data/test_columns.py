import base64
import re

import numpy as np
import pyarrow
import pytest
from datasets import Array2D, Array3D, Audio, ClassLabel, Dataset, Features, Image, List, Value
from helpers import encoded, load, settings, write_image
from pyarrow import parquet

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data.columns import encode_pixels
from m2t_accel.data.decode import DecodeError, decode_image
from m2t_accel.data.sources import load_images
from m2t_accel.data.views import read_rows

NUMBER = 6  # rows of a table; image i has the value i
FILES = [row["bytes"] for row in encoded(0, NUMBER)]
OTHERS = [row["bytes"] for row in encoded(100, NUMBER)]
BARE = [{"bytes": content, "path": None} for content in FILES]
GRAY = [np.full((5, 7), i, np.uint8) for i in range(NUMBER)]
COLOUR = [np.repeat(pixels[:, :, None], 3, 2) for pixels in GRAY]
TEXT = [f"a picture of {i}" for i in range(NUMBER)]
LABELS = [i % 2 for i in range(NUMBER)]
BASE64 = [base64.b64encode(content).decode() for content in FILES]


def nested(arrays, *kind):
    return pyarrow.array([pixels.tolist() for pixels in arrays], *kind)


def typed(**columns):
    """Return a table as `datasets` writes it, from pairs of values and their type."""
    features = Features({name: kind for name, (_, kind) in columns.items()})
    return Dataset.from_dict({name: list(values) for name, (values, _) in columns.items()}, features=features)


def open_table(table, mode, folder, **given):
    """Load a table of columns as streamed or copied parquet, or from memory."""
    if isinstance(table, dict):
        table = Dataset(pyarrow.table(table))
    if mode == "memory":
        return load_images(settings("memory", **given), table)
    folder.mkdir(exist_ok=True)
    parquet.write_table(table.with_format("arrow")[:], folder / "train.parquet", row_group_size=4)
    return load(folder, streaming=mode == "streamed", **given)


def values(images):
    """Return the first value of each training image."""
    return values_of(images.train)


def values_of(split):
    if isinstance(split, Dataset):
        rows = read_rows(split, range(len(split)))
    else:
        rows = [row for piece, size in enumerate(split.piece_sizes) for row in split.open(piece)(0, size)[1]]
    return [int(decode_image(row)[0, 0, 0]) for row in rows]


SOUND = Dataset(pyarrow.table({"audio": BARE}).cast(Features({"audio": Audio(decode=False)}).arrow_schema))
modes = pytest.mark.parametrize("mode", ["streamed", "copied", "memory"])

IMAGES = {
    "text called image": {"image": TEXT, "jpg": FILES},
    "binary called image": {"image": OTHERS, "photo": BARE},
    "Image before binary": typed(image=(OTHERS, Value("binary")), x=(BARE, Image())),
    "binary before pixels": {"image": nested(COLOUR[::-1]), "x": FILES},
    "pixels before paths": {"image": TEXT, "x": nested(GRAY)},
    "a usual name": {"mask": OTHERS, "img": FILES},
    "a usual name in capitals": {"Mask": OTHERS, "Image": FILES},
    "the only images": {"image": [b"sound"] * NUMBER, "x": FILES},
    "bytes and a number": {"image": [{"bytes": content, "path": None, "id": 3} for content in FILES]},
    "large binary": {"x": pyarrow.array(FILES, pyarrow.large_binary())},
    "binary view": {"x": pyarrow.array(FILES, pyarrow.binary_view())},
    "gray lists": {"image": nested(GRAY)},
    "gray lists of bytes": {"image": nested(GRAY, pyarrow.list_(pyarrow.list_(pyarrow.uint8())))},
    "gray large lists": {"image": nested(GRAY, pyarrow.large_list(pyarrow.large_list(pyarrow.uint8())))},
    "gray lists of fixed size": typed(image=(GRAY, List(List(Value("uint8"), 7), 5))),
    "colour lists": {"image": nested(COLOUR)},
    "Array2D": typed(image=(GRAY, Array2D((5, 7), "uint8"))),
    "Array3D": typed(image=(COLOUR, Array3D((5, 7, 3), "uint8"))),
    "Array3D of one channel": typed(image=([p[:, :, None] for p in GRAY], Array3D((5, 7, 1), "int32"))),
    "Array3D, channels first": typed(image=([p.transpose(2, 0, 1) for p in COLOUR], Array3D((3, 5, 7), "uint8"))),
}


@modes
@pytest.mark.parametrize("case", IMAGES)
def test_the_column_of_images_is_chosen_by_type_before_name(tmp_path, case, mode):
    table = IMAGES[case] if isinstance(IMAGES[case], Dataset) else Dataset(pyarrow.table(IMAGES[case]))
    images = open_table(table.add_column("label", LABELS), mode, tmp_path / "set", validation_fraction=0)
    assert values(images) == list(range(NUMBER))
    assert images.bank["label"][:] == LABELS


# The table, the flags and the message, after the place of the first row if a row is at fault.
ROW = r"none of the rows checked has an image; the first is row 0.*: "
FAULTS = {
    "text": ({"image": TEXT}, {}, ROW + r"the text “a picture of 0” is no path of an image"),
    "text beside images": ({"image": TEXT, "x": FILES}, {"image_column": "image"}, ROW + ".*--image_column may name x"),
    "a missing file": ({"image": ["/none.jpg"] * NUMBER}, {}, ROW + r".*/none.jpg.*\(No such file or directory\)"),
    "a zero character": ({"image": ["a\0"] * NUMBER}, {}, ROW + ".*zero character"),
    "URLs": ({"image": ["https://x.org/1.jpg"] * NUMBER}, {}, ROW + "the URL https://x.org/1.jpg; download"),
    "base64": ({"image": BASE64}, {}, ROW + r"an image as base64 text, .*dataset\.map\(.*b64decode"),
    "base64 in binary": ({"image": [text.encode() for text in BASE64]}, {}, ROW + "an image as base64 text"),
    "a data URL": (
        {"image": [f"data:image/png;base64,{text}" for text in BASE64]},
        {},
        ROW + "an image as base64 text",
    ),
    "null": ({"image": pyarrow.nulls(NUMBER, pyarrow.binary())}, {}, ROW + "null$"),
    "null beside images": (
        {"image": [{"bytes": None, "path": None}] * NUMBER, "x": FILES},
        {"image_column": "x"},
        None,
    ),
    "no type": ({"image": pyarrow.nulls(NUMBER)}, {}, "no column of images: image has null"),
    "empty": ({"image": [b""] * NUMBER, "text": TEXT}, {}, ROW + "the file is empty; --image_column may name text"),
    "large images": ({"image": FILES}, {"max_image_pixels": 100}, ROW + ".* more than --max_image_pixels 100 allows"),
    "sounds": ({"image": [b"RIFF\0\0\0\0WAVE"] * NUMBER}, {}, ROW + "no known image format"),
    "structs": ({"image": [{"a": 1, "b": 2}] * NUMBER}, {}, "no column of images: image has structs of a, b"),
    "structs of numbers": (
        {"image": [{"bytes": [1, 2]}] * NUMBER},
        {},
        "no column of images: image has structs of bytes",
    ),
    "several in a row": (
        {"images": [[row] for row in BARE]},
        {},
        "images has lists of structs of bytes, path, several images in a row: store each in a row of its own",
    ),
    "Audio": (SOUND, {}, "no column of images: audio has Audio"),
    "flat lists": ({"image": [[1, 2]] * NUMBER}, {}, "image has lists of int64, which are no images: .*lists of lists"),
    "floats": ({"image": nested([p / 255 for p in GRAY])}, {}, ROW + "pixels with type float64: store whole numbers"),
    "numbers alone": ({"a": LABELS, "b": LABELS}, {}, "no column of images: a has int64, b has int64"),
    "several": ({"left": FILES, "right": OTHERS}, {}, "several columns of images: left, right; .* --image_column"),
    "a wrong name": ({"image": FILES}, {"image_column": "imgae"}, "--image_column imgae: .*, did you mean image"),
    "no such label": (
        {"image": FILES},
        {"label_column": "kind"},
        "--label_column kind: no such column; there are image",
    ),
    "numbers as images": (
        {"image": FILES, "n": LABELS},
        {"image_column": "n"},
        "--image_column n: .* int64; .* image$",
    ),
    "images as labels": (
        {"image": FILES, "n": LABELS},
        {"label_column": "image"},
        "--label_column image: .*another of n",
    ),
}


# The columns of the training and of the validation split, and the message if they are refused.
SPLITS = {
    "binary and structs": ({"image": FILES}, {"image": BARE}, None),
    "structs and binary": ({"image": BARE}, {"image": FILES}, None),
    "binary and Image": ({"image": FILES}, typed(image=(BARE, Image())), None),
    "Image and binary": (typed(image=(BARE, Image())), {"image": FILES}, None),
    "pixels and binary": (typed(image=(GRAY, Array2D((5, 7), "uint8"))), {"image": FILES}, None),
    "binary and pixels": ({"image": FILES}, {"image": nested(GRAY)}, None),
    "a column more": ({"image": FILES}, {"image": FILES, "width": LABELS}, None),
    "a column less": ({"image": FILES, "width": LABELS}, {"image": FILES}, None),
    "another type of another column": ({"image": FILES, "n": LABELS}, {"n": TEXT, "image": FILES}, None),
    "another name": ({"image": FILES}, {"img": FILES}, "has no column image, .* but img, label; rename it"),
    "numbers": ({"image": FILES}, {"image": LABELS}, "column image of the validation split has int64, and no images"),
    "nothing": ({"image": FILES}, {"image": pyarrow.nulls(NUMBER)}, "of the validation split has null, and no images"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", SPLITS)
def test_splits_may_store_images_differently(tmp_path, case, streaming):
    *tables, message = SPLITS[case]
    for name, table in zip(("train", "validation"), tables, strict=True):
        table = table if isinstance(table, Dataset) else Dataset(pyarrow.table(table))
        parquet.write_table(table.add_column("label", LABELS).with_format("arrow")[:], tmp_path / f"{name}.parquet")
    if message is not None:
        with pytest.raises(ConfigurationError, match=message):
            load(tmp_path, streaming=streaming)
        return
    images = load(tmp_path, streaming=streaming)
    assert values(images) == values_of(images.validation) == list(range(NUMBER))
    assert images.bank["label"][:] == images.validation["label"][:] == LABELS


@modes
def test_rows_without_an_image_among_others_are_no_fault(tmp_path, mode):
    images = open_table({"image": [None, *FILES[1:]], "label": LABELS}, mode, tmp_path / "set", evaluate_every=0)
    assert len(images.train) == NUMBER


@pytest.mark.parametrize("case", FAULTS)
def test_a_column_without_images_is_answered_in_one_line(tmp_path, case):
    """Streamed and copied data sets answer alike; in-memory ones do so too, up to the place of the row."""
    table, given, message = FAULTS[case]
    answers = []
    for mode in ("streamed", "copied", "memory"):
        if message is None:
            assert values(open_table(table, mode, tmp_path / "set", evaluate_every=0, **given)) == list(range(NUMBER))
            continue
        with pytest.raises(ConfigurationError, match=message) as caught:
            open_table(table, mode, tmp_path / "set", **given)
        answers.append(str(caught.value))
        assert "\n" not in answers[-1]
    places = re.compile(r" of row group 0 of \S+/train.parquet| in \S+ nor in \S+|\S+/set\b|memory")
    assert len(set(answers[:2])) == len({places.sub("", answer) for answer in answers}) == (message is not None)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        ([[1, 2], [3]], "lists of different lengths"),
        ([[1, None]], "pixels with None among them"),
        ([[0.0, 1.0]], "pixels with type float64: store whole numbers from 0 to 255"),
        ([[True, False]], "pixels with type bool"),
        ([[0, 4095]], "pixels from 0 to 4095: scale them"),
        ([[-1, 3]], "pixels from -1 to 3: scale them"),
        ([], "no pixels"),
        ([1, 2, 3], "pixels in the shape 3: allowed are H × W, "),
        (np.zeros((4, 5, 2), np.uint8), "pixels in the shape 4 × 5 × 2: "),
        (np.zeros((2, 4, 5, 3), np.uint8), "pixels in the shape 2 × 4 × 5 × 3: "),
    ],
)
def test_pixels_that_are_no_image(pixels, reason):
    with pytest.raises(DecodeError, match=reason):
        encode_pixels(pixels)


@modes
@pytest.mark.parametrize("kind", ["strings", "structs"])
def test_relative_paths_start_in_the_folder_of_the_dataset(tmp_path, kind, mode, monkeypatch):
    """Where there is no such file, they start in the working directory."""
    for i in range(NUMBER):
        write_image(tmp_path / "images" / f"{i}.png", value=i)
        write_image(tmp_path / "elsewhere" / "images" / f"{i}.png", value=100 + i)
    paths = [f"images/{i}.png" for i in range(NUMBER)]
    above = [f"../{path}" for path in paths]
    monkeypatch.chdir(tmp_path / "elsewhere")
    for names, expected in ((paths, range(100, 100 + NUMBER)), (above, range(NUMBER))):
        if mode == "memory":
            names, expected = paths, range(100, 100 + NUMBER)
        column = names if kind == "strings" else [{"path": name, "bytes": None} for name in names]
        images = open_table({"image": column, "label": LABELS}, mode, tmp_path / "set", evaluate_every=0)
        assert values(images) == list(expected)


# Columns beside the images; the column of the labels, or what the note says of their lack.
CLASSES = ClassLabel(names=["even", "odd"])
NAMES = ["even", "odd"] * (NUMBER // 2)
WORDS = (NAMES, Value("string"))
PLAIN = (LABELS, Value("int64"))
MARKED = (LABELS, CLASSES)
OTHER = (LABELS, ClassLabel(names=["a", "b"]))
LABEL_COLUMNS = {
    "the only ClassLabel": ({"breed": MARKED, "text": WORDS}, "breed"),
    "the only ClassLabel beside a usual name": ({"class": (NAMES[::-1], Value("string")), "breed": MARKED}, "breed"),
    "label beside a ClassLabel": ({"breed": OTHER, "label": WORDS}, "label"),
    "a usual name among ClassLabels": ({"coarse_label": OTHER, "breed": OTHER, "fine_label": MARKED}, "fine_label"),
    "several ClassLabels": ({"breed": MARKED, "colour": OTHER}, "hold classes; --label_column may name breed, colour"),
    **{
        name: ({"text": (TEXT, Value("string")), name: WORDS}, name)
        for name in ("labels", "Label", "category", "class_name", "species", "target", "y", "cls")
    },
    "a struct called label": ({"label": ([{"a": 1}] * NUMBER, {"a": Value("int64")}), "species": WORDS}, "species"),
    "only a struct": ({"label": ([{"a": 1}] * NUMBER, {"a": Value("int64")})}, r"\(the values are structs of a\)"),
    "only a list of one": ({"label": ([[1]] * NUMBER, List(Value("int64")))}, r"\(the values are lists of int64\)"),
    "no usual name": ({"breed": WORDS, "n": PLAIN, "z": ([0.5] * NUMBER, Value("float64"))}, "may name breed, n$"),
    "missing": ({"label": ([-1] * NUMBER, CLASSES), "n": PLAIN}, "missing or negative.; --label_column may name n$"),
    "nothing": ({}, "no labels, because no other column holds classes$"),
}


@modes
@pytest.mark.parametrize("case", LABEL_COLUMNS)
def test_the_column_of_labels(tmp_path, case, mode):
    others, answer = LABEL_COLUMNS[case]
    table = typed(x=(BARE, Image()), **others)
    images = open_table(table, mode, tmp_path / "set", validation_fraction=0.4)
    if answer in others:
        assert images.class_names == ["even", "odd"]
        assert ("the classes are those of the column breed" in images.note) == (answer == "breed")
        assert sorted(images.bank["label"][:] + images.validation["label"][:]) == sorted(LABELS)
    else:
        assert images.class_names is None
        assert re.search(answer, images.note)


INTERNAL = ["image", "label", "offset", "size", "path", "bytes", "others", "key", "piece", "rows", "value"]
INTERNAL += ["__key__", "__url__", "__index_level_0__"]


@modes
def test_columns_with_internal_names_change_nothing(tmp_path, mode):
    for image, label in (
        ("jpg", "kind"),
        ("label", "image"),
        ("offset", "size"),
        ("size", "__key__"),
        ("path", "bytes"),
    ):
        others = {name: [3] * NUMBER for name in INTERNAL if name not in (image, label)}
        table = {image: FILES, label: NAMES} | others
        given = {"image_column": image, "label_column": label, "validation_fraction": 0.4}
        images = open_table(table, mode, tmp_path / image, **given)
        for split in (images.bank, images.validation):
            assert split.column_names == ["image", "label"]
            numbers = [int(decode_image(row)[0, 0, 0]) % 2 for row in read_rows(split, range(len(split)))]
            assert split["label"][:] == numbers
        assert set(values(images)) < set(range(NUMBER))

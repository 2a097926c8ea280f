"""Row groups, columns, classes and labels of parquet files: read once and cached."""

from __future__ import annotations

import functools
import itertools
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cachetools
import numpy as np
import pyarrow
from pyarrow import compute, parquet

from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.cache import cached_table
from m2t_accel.data.shards import read_file
from m2t_accel.progress import late_progress_bar

FOOTER_READERS = 32  # threads
FOOTER_CACHE_BYTES = 16 << 20  # serialized; in memory, footers take up to three times as much


def index_parquet(files: Sequence[str]) -> pyarrow.Table:
    """Return the row groups of parquet files, local or remote (`hf://…`).

    Returns:
        A table with a row for each file. Column `rows` lists the number of rows of each of its row groups. Metadata:
        `schema` of the first file that has rows, and `conflicts` as returned by class_conflicts.

    Raises:
        ConfigurationError: a file is missing, damaged or not parquet, or the files have different columns.
    """
    return cached_table("parquet", files, read_outlines)


class Outline(NamedTuple):
    """The part of a parquet footer that is kept while a dataset is indexed; the whole takes much more memory."""

    columns: list[str]
    class_names: dict[str, list[str]]  # by column
    rows: np.ndarray  # (G,) int32, rows of each row group


def read_outlines(files: Sequence[str]) -> pyarrow.Table:
    with ThreadPoolExecutor(FOOTER_READERS) as readers:
        outlines = readers.map(read_outline, files)
        outlines = list(late_progress_bar("reading the footers of shards", " shards", outlines, len(files)))
    # The columns of a file without rows do not matter.
    filled = [(file, outline) for file, outline in zip(files, outlines, strict=True) if outline.rows.any()]
    first_file, first = (filled or [(files[0], outlines[0])])[0]
    for file, outline in filled:
        names = outline.columns
        if len(set(names)) < len(names):
            raise ConfigurationError(f"{file} has two columns of the same name: {', '.join(sorted(names))}; rename one")
        if sorted(names) != sorted(first.columns):
            raise ConfigurationError(
                f"{file} has the columns {', '.join(names)}, but {first_file} has {', '.join(first.columns)}: give a "
                "folder of files that belong together"
            )
    conflicts = class_conflicts([(file, outline.class_names) for file, outline in filled])
    ends = np.cumsum([0, *(len(outline.rows) for outline in outlines)], dtype=np.int32)
    rows = pyarrow.ListArray.from_arrays(ends, np.concatenate([outline.rows for outline in outlines]))
    schema = read_file(first_file, parquet.read_schema)
    metadata = {"schema": schema.serialize().to_pybytes().hex(), "conflicts": json.dumps(conflicts)}
    return pyarrow.table({"rows": rows}, metadata=metadata)


def read_outline(file: str) -> Outline:
    footer = read_file(file, parquet.read_metadata)
    rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    names = class_names((footer.metadata or {}).get(b"huggingface", b"{}"))
    return Outline(footer.schema.to_arrow_schema().names, names, np.array(rows, np.int32))


@functools.lru_cache(maxsize=8)  # most files of a dataset have the same metadata
def class_names(metadata: bytes) -> dict[str, list[str]]:
    """Return the class names of each ClassLabel column, from the JSON that `datasets` writes into a schema.

    Metadata that is not such JSON names no classes.
    """
    try:
        kinds = json.loads(metadata)["info"]["features"].items()
        labels = {
            name: kind.get("names") for name, kind in kinds if isinstance(kind, dict) and kind["_type"] == "ClassLabel"
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {name: names for name, names in labels.items() if isinstance(names, list)}


def class_conflicts(files: Sequence[tuple[str, Mapping[str, list[str]]]]) -> dict[str, str]:
    """Return an error message for each ClassLabel column whose numbers mean different classes in different files.

    `datasets` would apply the class names of the first file to all.

    Args:
        files: each file with its class names by column.
    """
    first: dict[str, tuple[str, list[str]]] = {}
    conflicts: dict[str, str] = {}
    for file, classes in files:
        for column, names in classes.items():
            first_file, first_names = first.setdefault(column, (file, names))
            if names != first_names and column not in conflicts:
                pairs = enumerate(itertools.zip_longest(first_names, names))
                number, (name, other) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
                conflicts[column] = (
                    f"the class {number} of the column {column} is {name or 'missing'} in {first_file} and "
                    f"{other or 'missing'} in {file}: give them the same numbers (Dataset.align_labels_with_mapping)"
                )
    return conflicts


def distinct_values(files: Sequence[str], column: str, kind: pyarrow.DataType) -> pyarrow.ChunkedArray:
    """Return the distinct values of a column of parquet files, including null if a value is missing.

    Raises:
        ConfigurationError: a file is missing or damaged, or its values are not of this type.
    """

    def read_values(files: Sequence[str]) -> pyarrow.Table:
        def read(file: str) -> pyarrow.ChunkedArray:
            values = read_file(file, lambda source: parquet.read_table(source, columns=[column], use_threads=False))
            try:
                return compute.unique(values[column].cast(kind))
            except pyarrow.ArrowException as error:
                raise columns_differ([column], file, error) from None

        with ThreadPoolExecutor(FOOTER_READERS) as readers:
            values = pyarrow.chunked_array(list(readers.map(read, files)), kind)
        return pyarrow.table({"value": compute.unique(values)})

    return cached_table("values", files, read_values, column, str(kind))["value"]


def columns_differ(columns: Sequence[str], file: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the columns {', '.join(columns)} of {file} differ from those of other files ({one_line(error)}): "
        "give a folder of files that belong together"
    )


@cachetools.cached(
    cachetools.LRUCache(FOOTER_CACHE_BYTES, lambda footer: footer.serialized_size), lock=threading.Lock()
)
def remote_footer(file: str) -> parquet.FileMetaData:
    """Return the footer of a remote parquet file, which is needed to read any of its row groups.

    The footer is kept in memory, because reading it takes as long as reading an image. (From a local file, it takes
    0.1 ms.)

    Raises:
        ConfigurationError: the file is missing, damaged or not parquet.
    """
    return read_file(file, parquet.read_metadata)

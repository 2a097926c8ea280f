"""The row groups, columns and classes of parquet files: read once, kept for the next start."""

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
import pyarrow.feather
from pyarrow import compute, parquet

from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.cache import kept_for_files
from m2t_accel.data.shards import in_attempts
from m2t_accel.progress import late_progress_bar

CLASSES = "ClassLabel"  # as `datasets` calls it in what it writes
FOOTER_READERS = 32  # threads that read the ends of shards
FOOTER_CACHE_BYTES = 16 << 20  # bytes of remote footers that are kept; in memory they take up to three times as much


def index_parquet(files: Sequence[str]) -> pyarrow.Table:
    """The row groups of parquet files, local or remote (`hf://…`): of each file `rows`, a list of the rows of each.

    The schema is that of the first file with rows; `conflicts` are those of class_conflicts.

    Raises:
        ConfigurationError: a file is missing, cut or no parquet, or its columns are not those of the first.
    """
    return kept_for_files("parquet", files, read_outlines)


class Outline(NamedTuple):
    """What is kept of a parquet file while a set is indexed; its whole footer takes much more."""

    columns: list[str]
    class_names: dict[str, list[str]]  # of the columns that `datasets` has written as class labels
    rows: np.ndarray  # (groups,) int32


def read_outlines(files: Sequence[str]) -> pyarrow.Table:
    with ThreadPoolExecutor(FOOTER_READERS) as readers:
        outlines = readers.map(read_outline, files)
        outlines = list(late_progress_bar("reading the ends of shards", " shards", outlines, len(files)))
    # A file without rows may have anything for columns.
    filled = [(file, outline) for file, outline in zip(files, outlines, strict=True) if outline.rows.any()]
    first_file, first = (filled or [(files[0], outlines[0])])[0]
    for file, outline in filled:
        names = outline.columns
        if len(set(names)) < len(names):
            raise ConfigurationError(f"{file} has two columns of one name: {', '.join(sorted(names))}; rename one")
        if sorted(names) != sorted(first.columns):
            raise ConfigurationError(
                f"{file} has the columns {', '.join(names)}, {first_file} has {', '.join(first.columns)}: give a "
                "folder of files that belong together"
            )
    conflicts = class_conflicts([(file, outline.class_names) for file, outline in filled])
    ends = np.cumsum([0, *(len(outline.rows) for outline in outlines)], dtype=np.int32)
    rows = pyarrow.ListArray.from_arrays(ends, np.concatenate([outline.rows for outline in outlines]))
    schema = in_attempts(first_file, parquet.read_schema)
    metadata = {"schema": schema.serialize().to_pybytes().hex(), "conflicts": json.dumps(conflicts)}
    return pyarrow.table({"rows": rows}, metadata=metadata)


def read_outline(file: str) -> Outline:
    footer = in_attempts(file, parquet.read_metadata)
    rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    words = (footer.metadata or {}).get(b"huggingface", b"{}")
    return Outline(footer.schema.to_arrow_schema().names, class_names(words), np.array(rows, np.int32))


@functools.lru_cache(maxsize=8)  # most files of a set say the same
def class_names(words: bytes) -> dict[str, list[str]]:
    """The classes of each column of class labels, in the words that `datasets` writes into a schema, if they say so."""
    try:
        kinds = json.loads(words)["info"]["features"].items()
        kinds = {name: kind.get("names") for name, kind in kinds if isinstance(kind, dict) and kind["_type"] == CLASSES}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {name: names for name, names in kinds.items() if isinstance(names, list)}


def class_conflicts(files: Sequence[tuple[str, Mapping[str, list[str]]]]) -> dict[str, str]:
    """For each column of class labels whose numbers do not mean the same in all files: where, and what to do.

    `datasets` would take the classes of the first file for all.
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
                    f"{other or 'missing'} in {file}: number both alike (Dataset.align_labels_with_mapping)"
                )
    return conflicts


def index_values(files: Sequence[str], column: str, kind: pyarrow.DataType) -> pyarrow.ChunkedArray:
    """The different values of a column of parquet files, such as the labels, null among them if there is one.

    Raises:
        ConfigurationError: a file is missing or cut, or its values are not of this kind.
    """

    def read_values(files: Sequence[str]) -> pyarrow.Table:
        def different(file: str) -> pyarrow.ChunkedArray:
            values = in_attempts(file, lambda source: parquet.read_table(source, columns=[column], use_threads=False))
            try:
                return compute.unique(values[column].cast(kind))
            except pyarrow.ArrowException as error:
                raise columns_differ([column], file, error) from None

        with ThreadPoolExecutor(FOOTER_READERS) as readers:
            values = pyarrow.chunked_array(list(readers.map(different, files)), kind)
        return pyarrow.table({"value": compute.unique(values)})

    return kept_for_files("values", files, read_values, column, str(kind))["value"]


def columns_differ(columns: Sequence[str], file: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the columns {', '.join(columns)} of {file} differ from those of other files ({one_line(error)}): "
        "give a folder of files that belong together"
    )


@cachetools.cached(
    cachetools.LRUCache(FOOTER_CACHE_BYTES, lambda footer: footer.serialized_size), lock=threading.Lock()
)
def remote_footer(file: str) -> parquet.FileMetaData:
    """What a parquet file says of itself at its end, without which none of its row groups can be read.

    Of a local file it is read again each time, which takes 0.1 ms; of a remote one it would take as long as an image.

    Raises:
        ConfigurationError: it is missing, cut or no parquet.
    """
    return in_attempts(file, parquet.read_metadata)

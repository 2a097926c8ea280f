"""An index of WebDataset tars: where the images are, and what else the tars hold."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pyarrow

from m2t_accel.config.fields import ConfigurationError, one_line
from m2t_accel.data.cache import cached_table, file_status
from m2t_accel.data.folders import IMAGE_EXTENSIONS, is_hidden
from m2t_accel.data.shards import is_lfs_pointer, unreadable_shard
from m2t_accel.progress import late_progress_bar

TAIL_BYTES = 1 << 20  # read at once after the end of a tar: a damaged header may leave nearly all of the tar there
MAX_LINKS = 40  # symbolic links that are followed one after the other, as Linux does
SPARSE = -1  # size of a file of which the tar holds no zeros
MAX_DIGITS = 18  # digits of a label, so that it fits into 64 bits
MAX_WORD = 200  # characters of a label in words
MAX_LABEL_BYTES, MAX_JSON_BYTES = 1 << 12, 1 << 24  # size of a member that is read for a label
MAX_KEPT_JSON = 1 << 16  # size of the JSON that the index keeps, because its keys are shown
MAX_KINDS, MAX_ENDING = 20, 30  # kinds of other files that the index counts, and the characters of their ending


class LabelMembers(NamedTuple):
    """The members of tars that hold the labels: files such as 000.cls, or a key of files such as 000.json."""

    extension: str = ".cls"
    key: str | None = None

    def __str__(self) -> str:
        return self.extension if self.key is None else f"{self.extension} (key {self.key})"


CLS = LabelMembers()


def index_tars(folder: Path, files: Sequence[str], labels: LabelMembers = CLS) -> list[pyarrow.Table]:
    """Return where the images are in WebDataset tars, a table for each tar. The tables are cached.

    Members with the same name up to the first dot of its last part are one sample (000.jpg, 000.cls). If a sample has
    several images (000.depth.png, 000.jpg, 000.png), the first of those with the fewest dots counts. Names that have
    dots themselves (DSC.0001.jpg, DSC.0002.jpg) count up to the last dot.

    Args:
        folder: folder of the tars.
        files: paths relative to it.
        labels: members that hold the labels.

    Returns:
        Tables with a row for each sample: `offset` and `size` of the image in bytes, `label` (text; null without one),
        `folder` in the tar, `others` (number of further images). A link to a missing file is an image of size 0. The
        metadata is for `Contents`.

    Raises:
        ConfigurationError: a tar is missing, truncated, damaged, compressed or not a tar, or an image in it is sparse.
    """
    paths = [str(folder / file) for file in files]
    parameters = [part for part in labels if part is not None]
    ends = np.cumsum([file_status(path).st_size for path in paths])
    tables = []
    with late_progress_bar("indexing tars", "B", total=int(ends[-1])) as bar:
        # One tar after the other, because the result is cached: a process indexes about 40 000 members a second.
        for path, end in zip(paths, ends.tolist(), strict=True):
            tables.append(
                cached_table("tar", [path], lambda files: index_tar(files[0], labels, bar.update), *parameters)
            )
            bar.update(max(0, end - bar.n))  # a cached table has not moved the bar
    return tables


def index_tar(
    path: str, labels: LabelMembers = CLS, advance: Callable[[int], object] = lambda num_bytes: None
) -> pyarrow.Table:
    """Return where the images are in one tar; see index_tars. Call `advance` with the bytes of each member."""
    try:
        with open(path, "rb") as file:
            samples = Samples(tar_members(file, advance))
            images = samples.images
            keys = sorted(images, key=lambda key: images[key][1])  # in the order of the file, so a run is read at once
            places = samples.others.get(labels.extension, {})
            texts = [read_label(file, places[key], labels.key) if key in places else None for key in keys]
            beside, alone = samples.count_others()
            jsons = samples.others.get(choose_json(beside), {})
            first_json = next((read_at_most(file, jsons[key], MAX_KEPT_JSON) for key in keys if key in jsons), b"")
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        if is_lfs_pointer(path):
            raise unreadable_shard(path, error) from None
        raise ConfigurationError(
            f"{path} cannot be read as a tar ({one_line(error)}): it is truncated, damaged, compressed or joined from "
            "several tars; download it again, unpack it with gunzip, or move it away"
        ) from None
    table = np.array([images[key] for key in keys], np.int64).reshape(-1, 3)
    if (table[:, 2] == SPARSE).any():
        name = printable(keys[int(table[:, 2].argmin())].lstrip("/"))
        raise ConfigurationError(f"{path} holds the image {name} as a sparse file: pack the tar without --sparse")
    text = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    columns = {
        "offset": table[:, 1],
        "size": table[:, 2],
        "label": pyarrow.array(texts, text),
        "folder": pyarrow.array([printable(key.rpartition("/")[0]) for key in keys], text),
        "others": pyarrow.array([samples.more_images[key] for key in keys], pyarrow.int32()),
    }
    contents = {"beside": beside, "alone": alone, "json": first_json.decode(errors="replace")}
    return pyarrow.table(columns).replace_schema_metadata({"contents": json.dumps(contents)})


class Samples:
    """The members of a tar by sample: its image, and its other files by the rest of their names (.cls, .seg.npy)."""

    def __init__(self, members: Mapping[str, tuple[int, int]]) -> None:
        """Group the members; see index_tars.

        Args:
            members: offset and size by name.
        """
        self.images: dict[str, tuple[int, int, int]] = {}  # number of dots in the rest of the name, offset, size
        self.more_images: Counter[str] = Counter()
        self.others: dict[str, dict[str, tuple[int, int]]] = {}
        self.group(members, str.partition)
        if self.names_have_dots():
            self.group(members, str.rpartition)

    def group(self, members: Mapping[str, tuple[int, int]], divide: Callable) -> None:
        self.images.clear()
        self.more_images.clear()
        self.others.clear()
        self.image_names = set()
        for member, place in members.items():
            parent, _, name = member.rpartition("/")
            if is_hidden(name) or is_hidden_folder(parent):
                continue
            stem, dot, rest = divide(name, ".") if "." in name else (name, "", "")
            key, rest = f"{parent}/{stem}", f"{dot}{rest.lower()}"
            if f".{rest.rpartition('.')[2]}" in IMAGE_EXTENSIONS:
                self.image_names.add(rest)
                image = (rest.count("."), *place)
                if (earlier := self.images.setdefault(key, image)) is not image:
                    self.more_images[key] += 1
                    self.images[key] = min(earlier, image, key=lambda image: image[0])
            else:
                self.others.setdefault(rest, {})[key] = place

    def names_have_dots(self) -> bool:
        """Return whether names that end at the first dot drop most images, only because the names have more dots.

        Samples with a plain member (000.jpg or 000.cls beside 000.depth.png) are real. The others have as many
        different endings as images, or numbers in them: DSC.0001.jpg, DSC.0002.jpg.
        """
        kept, dropped = len(self.images), self.more_images.total()
        if dropped <= kept:
            return False
        plain = {key for rest, keys in self.others.items() if rest.count(".") < 2 for key in keys}
        plain |= {key for key in self.more_images if self.images[key][0] < 2}
        doubtful = sum(number for key, number in self.more_images.items() if key not in plain)
        numbered = sum(re.search(r"\d.*\.", rest) is not None for rest in self.image_names)
        endings = len(self.image_names)
        return 2 * doubtful > kept + dropped and (endings > kept or 2 * numbered > endings)

    def count_others(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return the counts of files beside an image, and of files alone, by the ends of their names."""
        beside, alone = Counter(), Counter()
        for rest, keys in self.others.items():
            number = len(keys.keys() & self.images.keys())
            extension = "." + rest.rpartition(".")[2]
            # A longer end, or a number, is a part of a name that has dots.
            extension = extension if re.fullmatch(r"\.(?=.*[a-z])[a-z0-9]{1,10}", extension) else ""
            beside[rest if len(rest) < MAX_ENDING else extension] += number
            alone[extension] += len(keys) - number
        return dict((+beside).most_common(MAX_KINDS)), dict((+alone).most_common(MAX_KINDS))


def choose_json(endings: Iterable[str]) -> str:
    """Return the ending of the JSON files whose keys may be labels: .json, else the shortest like .meta.json.

    Args:
        endings: the ends of the names of the files beside the images of a tar.
    """
    jsons = [ending for ending in endings if ending.endswith(".json")]
    return min(jsons, key=lambda ending: (len(ending), ending), default=".json")


@functools.lru_cache
def is_hidden_folder(path: str) -> bool:
    return any(is_hidden(name) for name in path.split("/") if name != "..")


def read_label(file: IO[bytes], place: tuple[int, int], key: str | None) -> str | None:
    """Return the label in a member: its text, or the value of a key of its JSON; None if it holds none."""
    content = read_at_most(file, place, MAX_LABEL_BYTES if key is None else MAX_JSON_BYTES)
    try:
        return label_text(content.decode("utf-8-sig")) if key is None else label_text(json.loads(content).get(key))
    except (ValueError, AttributeError, RecursionError):  # not UTF-8, or not a JSON of keys and values
        return None


def read_at_most(file: IO[bytes], place: tuple[int, int], max_bytes: int) -> bytes:
    """Return a member; no bytes if it is larger than `max_bytes`, or sparse."""
    offset, size = place
    return os.pread(file.fileno(), size, offset) if 0 <= size <= max_bytes else b""


def label_text(value: object) -> str | None:
    """Return a label as text; None if it cannot be a label. A whole number has no leading zeros."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        return None
    text = str(value).strip()
    if text.isdigit() and text.isascii():
        return str(int(text)) if len(text) <= MAX_DIGITS else None
    if text.startswith("-") and text[1:].isdigit():  # -1 stands for a label that is withheld
        return None
    return text if 0 < len(text) <= MAX_WORD and text.isprintable() else None


def printable(text: str) -> str:
    """Return a name with a question mark for every byte that is not UTF-8, and for control characters."""
    if text.isascii() and text.isprintable():
        return text
    text = text.encode(errors="replace").decode()
    return "".join(character if character.isprintable() else "?" for character in text)


def tar_members(file: IO[bytes], advance: Callable[[int], object]) -> dict[str, tuple[int, int]]:
    """Return the offset and size of each file in a tar; a link has those of its target, or size 0 without a target.

    The last member of a name counts, as when the tar is unpacked. A hard link keeps the earlier file even if a later
    member replaces it. Links to folders are not followed. The size of a sparse file is SPARSE.

    Raises:
        tarfile.TarError: the file is truncated, damaged, compressed, joined from several tars or not a tar.
    """
    members: dict[str, tuple[int, int]] = {}
    symlinks: dict[str, tuple[str, int]] = {}  # target as written, and offset of the link itself
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            name = posixpath.normpath(member.name)
            earlier = members.pop(name, None), symlinks.pop(name, None)
            if member.isfile():
                members[name] = (member.offset_data, SPARSE if member.issparse() else member.size)
            elif member.issym():
                symlinks[name] = (member.linkname, member.offset_data)
            elif member.islnk():
                target = posixpath.normpath(member.linkname)
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


class Contents:
    """The contents of some tars."""

    def __init__(self, tables: Sequence[pyarrow.Table]) -> None:
        self.beside, self.alone, self.json = Counter(), Counter(), {}
        for table in tables:
            contents = json.loads(table.schema.metadata[b"contents"])
            self.beside.update(contents["beside"])  # files of samples, by the ends of their names
            self.alone.update(contents["alone"])  # files without an image of the same name, by extension
            if contents["json"] and not self.json:
                with contextlib.suppress(ValueError, RecursionError):
                    values = json.loads(contents["json"])
                    self.json = values if isinstance(values, dict) else {}  # the first JSON of a sample

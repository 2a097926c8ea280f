"""Typed settings with limits and a line of help, read by one function from flags and YAML, and the errors of a user.

This module imports no torch and no other module of the package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import math
import operator
import os
import re
import shlex
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from pathlib import Path

STATUS_RESUMABLE = 75  # the run was stopped, and the same command resumes it; EX_TEMPFAIL of sysexits.h
STATUS_CTRL_C = 130


class ConfigurationError(ValueError):
    """A setting or an input is wrong. The message is one line: the value given, the values allowed, what to type."""


class Interrupted(Exception):  # noqa: N818 (not an error)
    """A run ended early, and the same command resumes it. The message is one line; `status` is the exit status."""

    def __init__(self, message: str, status: int = STATUS_RESUMABLE) -> None:
        super().__init__(message)
        self.status = status


def setting(default: object, help: str, **limits: object):
    """Return a dataclass field for a setting.

    Args:
        default: default value.
        help: text shown in `--help`.
        limits: `at_least`, `at_most`, `above`, `below` (numbers), `choices` (in a tuple, limits apply to each item),
            and `heading`, which starts a new group in `--help`.
    """
    return field(default=default, metadata={"help": help, **limits})


LIMITS = {
    "at_least": (operator.ge, "at least"),
    "at_most": (operator.le, "at most"),
    "above": (operator.gt, "more than"),
    "below": (operator.lt, "less than"),
}


def check_all_limits(config: object) -> None:
    """Check every field of a dataclass of settings against its limits.

    Raises:
        ConfigurationError: a value is out of its limits.
    """
    with all_faults() as check:
        for item in dataclasses.fields(config):
            check(check_limits, item.name, getattr(config, item.name), item.metadata)


def check_limits(name: str, value: object, limits: Mapping[str, object]) -> None:
    """Check one value against the limits of its setting; None always passes.

    Raises:
        ConfigurationError: the value is out of its limits.
    """
    if value is None:
        return
    for number in value if isinstance(value, tuple) else (value,):
        if "choices" in limits and number not in limits["choices"]:
            near = did_you_mean(number, limits["choices"])
            raise ConfigurationError(f"--{name} {number}: unknown{near}; one of {', '.join(limits['choices'])}")
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigurationError(f"--{name} {number}: not a finite number")
        for limit, (holds, words) in LIMITS.items():
            if limit in limits and not holds(number, limits[limit]):
                raise ConfigurationError(f"--{name} {number:g} is out of range: {words} {limits[limit]:g} is allowed")


@contextlib.contextmanager
def all_faults() -> Iterator[Callable[..., object]]:
    """Give a function that calls another one with its arguments, and raise the errors of all calls in one line.

    Raises:
        ConfigurationError: a call raised one.
    """
    faults: list[str] = []

    def check(function: Callable[..., object], *arguments: object) -> object:
        try:
            return function(*arguments)
        except ConfigurationError as error:
            faults.append(str(error))

    yield check
    if faults:
        raise ConfigurationError("; ".join(faults))


def check_writable(name: str, path: str | None) -> None:
    """Check that the file of an option can be written, before minutes of work; None always passes.

    Raises:
        ConfigurationError: it cannot be written.
    """
    if path is None:
        return
    file = Path(path)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigurationError(f"--{name} {path} cannot be written: give a file in a folder that exists and is yours")


@contextlib.contextmanager
def write_errors_in_one_line(name: str, path: str | Path) -> Iterator[None]:
    """Turn an OSError in the block, such as a full disk, into the line that the path of an option cannot be written.

    Raises:
        ConfigurationError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"--{name} {path} cannot be written ({error.strerror or error}): make room or give another place, and type "
            "the command again"
        ) from None


def convert(name: str, kind: object, value: object) -> object:
    """Convert the text of a flag, or a YAML value, to the type of the setting.

    Flags and YAML share this function, so that the same text has the same meaning in both.

    Args:
        name: name of the setting, for the message.
        kind: type of its field: int, float, str, bool, a tuple of them, or one of these `| None`.

    Raises:
        ConfigurationError: the value cannot be converted.
    """
    if isinstance(kind, types.UnionType):  # the only unions are `type | None`
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        items = value if isinstance(value, list | tuple) else [value]
        # Text, as in a YAML file, may hold several items, separated by spaces or commas.
        parts = [re.split("[ ,]+", item.strip()) if isinstance(item, str) else [item] for item in items]
        items = [item for part in parts for item in part]
        if ... in kinds:  # any number of items
            if not items:
                raise ConfigurationError(f"--{name} is empty: leave it out, or give it a value")
            kinds = kinds[:1] * len(items)
        if len(items) != len(kinds):
            raise ConfigurationError(f"--{name} {plain_text(value)}: {len(kinds)} numbers are needed")
        return tuple(convert(name, k, v) for k, v in zip(kinds, items, strict=True))
    words = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}[kind]
    needed = ConfigurationError(f"--{name} {value}: {words} is needed")
    if not isinstance(value, str | int | float):
        raise needed
    text = str(value)  # convert from text, because int(1.5) and int(True) would pass silently
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise needed
        return text.lower() == "true"
    if kind is str:
        if not text or "\0" in text:
            raise ConfigurationError(f"--{name} is empty: leave it out, or give it a value")
        # Neither a shell, in --flag=~/folder, nor YAML expands the tilde.
        return os.path.expanduser(text) if text.startswith("~") else text
    try:
        return kind(text)
    except ValueError:
        raise needed from None


def convert_all(kind: type, given: Mapping[str, object]) -> dict[str, object]:
    """Convert the given settings to the types of their fields in the dataclass `kind`.

    Raises:
        ConfigurationError: a name is unknown, or a value cannot be converted.
    """
    hints = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]  # the hints name class variables, too
    for name in given:
        if name not in names:
            raise ConfigurationError(f"unknown setting {name}{did_you_mean(name, names)}; --help lists them all")
    with all_faults() as check:
        return {name: check(convert, name, hints[name], value) for name, value in given.items()}


def fields_by_heading(kind: type) -> dict[str, list[dataclasses.Field]]:
    """Return the fields of a dataclass of settings, grouped by heading.

    Fields of the class itself precede inherited ones. The group "the run" comes first.
    """
    fields = {item.name: item for item in dataclasses.fields(kind)}
    groups: dict[str, list[dataclasses.Field]] = {"the run": []}
    for level in kind.__mro__:
        heading = ""
        for name in inspect.get_annotations(level):
            heading = level.__dataclass_fields__[name].metadata.get("heading", heading)
            if name in fields:
                groups.setdefault(heading, []).append(fields.pop(name))
    return {heading: items for heading, items in groups.items() if items}


def did_you_mean(word: object, words: typing.Iterable[str]) -> str:
    """Return `, did you mean NEAREST?` for the word most like the given one, or an empty text if none is really near.

    A word is near if it differs by a few letters, or if one of the two has all words of the other, such as
    `--learning_rate` and `--learning_rate_per_256`, and at most twice as many.
    """
    by_name = {w.lower().lstrip("-"): w for w in words}
    name = str(word).lower().lstrip("-")
    near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.75)
    if not near:
        parts = {other: set(re.split(r"[\W_]+", other)) for other in (name, *by_name)}
        given = parts[name]
        near = [
            other
            for other in by_name
            if (given <= parts[other] or parts[other] <= given)
            and 2 * min(len(given), len(parts[other])) >= max(len(given), len(parts[other]))
        ]
        near.sort(key=lambda other: len(parts[other]))  # stable: among equals, the first
    return f", did you mean {by_name[near[0]]}?" if near else ""


def count(number: int, noun: str) -> str:
    """Return a number and its noun, such as `1 image` or `2,000 images`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def one_line(error: Exception) -> str:
    """Return the type and message of a library's error as one line of at most 240 characters."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" …").rstrip(".")


def plain_text(value: object) -> str:
    """Return a value as a user types it: the items of a list or tuple are separated by spaces."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def is_hub_id(text: str) -> bool:
    """Return whether the text has the form of a Hub id, USER/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text, re.ASCII) is not None


def without_paths(value: object) -> object:
    """Return a text, or a JSON value that holds texts, with each path of this machine cut to its last name."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if os.path.isabs(value) or value.startswith(("~", "../")):
        return Path(value).name
    # The slash must not follow a word; otherwise URLs, `images/s` and runs/digits would change.
    return re.sub(r"(?<![\w:/.~])(?:~|\.\.)?/[^\s:;,'\"()\[\]=]+", lambda path: Path(path[0]).name, value)


def command_without_paths(command: str) -> str:
    """Return a command line with each path of this machine cut to its last name; the paths may contain spaces."""

    def clean(word: str) -> str:
        name, equals, value = word.partition("=")  # --dataset=/my pictures/x
        return f"{name}={without_paths(value)}" if equals and "/" not in name else without_paths(word)

    return shlex.join(clean(word) for word in shlex.split(command))

"""What a setting is: a typed field with limits and a line of help, read alike from a flag and from YAML.

This module imports no torch, and nothing of the house: every room may raise its ConfigurationError.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import field

STATUS_GO_ON = 75  # a run was stopped, and the same command goes on; EX_TEMPFAIL of sysexits.h
STATUS_CTRL_C = 130


class ConfigurationError(ValueError):
    """What a user gave cannot be run. Its message is one line: what was given, what is allowed, what to type."""


class Interrupted(Exception):  # noqa: N818 (no error of anybody)
    """A run ends before its time, and the same command goes on. Its message is one line; `status` is the exit's."""

    def __init__(self, message: str, status: int = STATUS_GO_ON) -> None:
        super().__init__(message)
        self.status = status


def setting(default: object, help: str, **limits: object):
    """A field of a dataclass of settings: its default, its line in `--help`, and its limits.

    limits: `at_least`, `at_most`, `above`, `below` (numbers; of a tuple, each item) and `choices`. A `heading`
    begins a group in `--help`.
    """
    return field(default=default, metadata={"help": help, **limits})


def check_all_limits(config: object) -> None:
    """Check every field of a dataclass of settings.

    Raises:
        ConfigurationError: a value is out of its limits.
    """
    for item in dataclasses.fields(config):
        check_limits(item.name, getattr(config, item.name), item.metadata)


def check_limits(name: str, value: object, limits: Mapping[str, object]) -> None:
    if value is None:
        return
    if "choices" in limits and value not in limits["choices"]:
        raise ConfigurationError(
            f"--{name} {value}: unknown{did_you_mean(value, limits['choices'])}; one of {', '.join(limits['choices'])}"
        )
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigurationError(f"--{name} {number}: not a finite number")
        for limit, holds, words in (
            ("at_least", lambda a, b: a >= b, "at least"),
            ("at_most", lambda a, b: a <= b, "at most"),
            ("above", lambda a, b: a > b, "more than"),
            ("below", lambda a, b: a < b, "less than"),
        ):
            if limit in limits and not holds(number, limits[limit]):
                raise ConfigurationError(f"--{name} {number:g} is out of range: {words} {limits[limit]:g} is allowed")


def convert(name: str, kind: object, value: object) -> object:
    """A flag's text or a YAML value as the type of the setting `name`; one path, so that both read alike.

    Raises:
        ConfigurationError: the value is not of that type.
    """
    if isinstance(kind, types.UnionType):  # the only unions here are `something | None`
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if ... in kinds:  # as many as one likes, written one after the other or with commas
            items = value if isinstance(value, list | tuple) else [value]
            items = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
            if not items:
                raise ConfigurationError(f"--{name} is empty: leave it out, or give it a value")
            return tuple(convert(name, kinds[0], item) for item in items)
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            raise ConfigurationError(f"--{name} {shown}: {len(kinds)} numbers are needed")
        return tuple(convert(name, k, v) for k, v in zip(kinds, value, strict=True))
    words = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}[kind]
    if not isinstance(value, str | int | float):
        raise ConfigurationError(f"--{name} {value}: {words} is needed")
    if kind is str and (not str(value) or "\0" in str(value)):
        raise ConfigurationError(f"--{name} is empty: leave it out, or give it a value")
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise ConfigurationError(f"--{name} {value}: {words} is needed")
        return str(value).lower() == "true"
    if kind is str and str(value).startswith("~"):  # a shell leaves it in --flag=~/folder, and so does YAML
        return os.path.expanduser(str(value))
    try:
        return kind(str(value))  # str first: int(1.5) and int(True) would pass in silence
    except ValueError:
        raise ConfigurationError(f"--{name} {value}: {words} is needed") from None


def convert_all(kind: type, given: Mapping[str, object]) -> dict[str, object]:
    """The settings that were given, each as the type of its field in the dataclass `kind`.

    Raises:
        ConfigurationError: there is no such field, or a value is not of its type.
    """
    hints = typing.get_type_hints(kind)
    for name in given:
        if name not in hints:
            raise ConfigurationError(f"unknown setting {name}{did_you_mean(name, hints)}; --help lists them all")
    return {name: convert(name, hints[name], value) for name, value in given.items()}


def fields_by_heading(kind: type) -> dict[str, list[dataclasses.Field]]:
    """The fields of a dataclass of settings in groups, a class's own before those that it inherits.

    The group `the run` comes first.
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
    """`, did you mean NEAREST?`, or nothing where no word is near."""
    by_lower = {w.lower(): w for w in words}
    near = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.5)
    return f", did you mean {by_lower[near[0]]}?" if near else ""


def one_line(error: Exception) -> str:
    """A library's error as part of a line: its type and the beginning of what it says."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" …").rstrip(".")


def is_hub_id(text: str) -> bool:
    """Whether the text has the form of a Hub id, USER/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None

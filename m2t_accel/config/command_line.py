"""What a user types, flags and YAML, as a configuration; what was wrong with it, as one line.

This module imports no torch, so that `--help`, `--recipe list` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import yaml

from m2t_accel.config.fields import STATUS_CTRL_C, ConfigurationError, Interrupted, did_you_mean, fields_by_heading
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.config.recipes import RECIPES, build_config

Settings = TypeVar("Settings")


def read_yaml(path: str) -> dict[str, object]:
    """The settings in a YAML file.

    Raises:
        ConfigurationError: there is no such file, or it does not hold `name: value` lines.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config {path}: cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that does not exist, endless brackets
        raise ConfigurationError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigurationError(f"--config {path}: needs lines `name: value`, with the names of --help")
    return content


def parse_command_line(description: str, arguments: Sequence[str] | None = None) -> PretrainConfig:
    """The configuration of a pretraining run that the command line asks for.

    `--recipe list` prints and exits; else as parse_settings.
    """
    return parse_with_options(description, argparse.ArgumentParser(add_help=False), "digits", arguments)[0]


def parse_with_options(
    description: str, options: argparse.ArgumentParser, recipe: str, arguments: Sequence[str] | None = None
) -> tuple[PretrainConfig, argparse.Namespace]:
    """As parse_command_line, of a script with options of its own, which come back beside the configuration.

    `recipe` is the one where none is given.
    """
    own = " ".join(
        f"[{action.option_strings[0]} {action.metavar}]" if action.option_strings else action.metavar
        for action in options._actions
    )
    return parse_settings(
        description,
        f"{own} [--recipe NAME] [--dataset SOURCE] [--output_dir DIR]".strip(),
        PretrainConfig,
        build_config,
        preset="recipe",
        defaults={"recipe": recipe},
        table=recipe_table,
        options=options,
        arguments=arguments,
    )


def parse_settings(
    description: str,
    usage: str,
    kind: type[Settings],
    build: Callable[[Mapping[str, object]], Settings],
    preset: str = "",
    table: Callable[[], str] | None = None,
    options: argparse.ArgumentParser | None = None,
    arguments: Sequence[str] | None = None,
    defaults: Mapping[str, object] = types.MappingProxyType({}),
) -> tuple[Settings, argparse.Namespace]:
    """Settings of the dataclass `kind` that the command line asks for, and the script's own options beside them.

    Of a preset (a recipe, a protocol), then of the `--config` file, then of flags; later wins. `preset` is the
    setting that names it, where there are any; `--PRESET list` prints the table of all and exits, and so does `--help`.
    `defaults` are a script's own.

    Raises:
        ConfigurationError: an unknown flag, key or preset, or a value that is not allowed.
    """
    parser = OneLineParser(
        parents=[options] if options else [],
        usage=f"%(prog)s {usage} [--config FILE.yaml] [--SETTING VALUE]",
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        epilog="Every setting may also stand in the --config file, as `name: value`; flags win."
        + (f"\nThe defaults shown are those for ImageNet; a {preset} sets its own." if preset else ""),
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings from a file, such as a run's config.yaml")
    hints = typing.get_type_hints(kind)
    for heading, fields in fields_by_heading(kind).items():
        group = parser.add_argument_group(heading)
        for item in fields:
            add_flag(group, item, hints[item.name], defaults.get(item.name, item.default))
    known, unknown = parser.parse_known_args(arguments)
    flags = vars(known)
    if unknown:
        flag = unknown[0].split("=")[0]
        names = [name for action in parser._actions for name in action.option_strings]
        raise ConfigurationError(f"unknown flag {flag}{did_you_mean(flag, names)}; --help lists them all")
    if table is not None and flags.get(preset) == "list":
        print(table())
        raise SystemExit(0)
    settings = {item.name for item in dataclasses.fields(kind)}
    given = argparse.Namespace(**{name: flags.pop(name) for name in flags.keys() - settings - {"config"}})
    path = flags.pop("config")
    from_file = {} if path is None else read_yaml(path)
    if {preset} <= flags.keys() & from_file.keys() and flags[preset] != from_file[preset]:
        raise ConfigurationError(
            f"--{preset} {flags[preset]} meets `{preset}: {from_file[preset]}` of {path}: give one of them"
        )
    return build({**defaults, **from_file, **flags}), given


def add_flag(group: argparse._ArgumentGroup, item: dataclasses.Field, hint: object, default: object) -> None:
    """The flag of a setting; its text is converted with that of YAML, not here."""
    if typing.get_origin(hint) is types.UnionType:  # `something | None`
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    items = typing.get_args(hint)  # of a tuple
    if isinstance(default, tuple):
        default = " ".join(n if isinstance(n, str) else f"{n:.3g}" for n in default)
    shown = "" if default is None else f" (default: {default})"
    letter = {int: "N", float: "X", str: "NAME", bool: "true|false"}[items[0] if items else hint]
    count = {"nargs": len(items), "metavar": (letter,) * len(items)} if items else {"metavar": letter}
    if ... in items:  # as many as one likes
        count = {"nargs": "+", "metavar": letter}
    if hint is bool:
        count |= {"nargs": "?", "const": True}  # the flag alone
    group.add_argument(
        f"--{item.name}", default=argparse.SUPPRESS, help=(item.metadata["help"] + shown).replace("%", "%%"), **count
    )


class OneLineParser(argparse.ArgumentParser):
    """argparse, its complaints as our one line instead of a page of usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigurationError(f"{message}; --help lists all flags")


def recipe_table() -> str:
    """The recipes as a table of text, with the published hardware, hours and result."""
    rows = [("recipe", "batch", "per device", "optimizer", "lr/256", "epochs", "hardware", "hours", "top-1 %")]
    for name, recipe in RECIPES.items():
        config = build_config({"recipe": name, "dataset": recipe.settings.get("dataset", "digits")})
        rows.append(
            (
                name,
                str(config.batch_size),
                str(config.device_batch_size),
                config.optimizer,
                f"{config.learning_rate_per_256:g}",
                str(config.epochs),
                recipe.hardware,
                f"{recipe.hours:g}" if recipe.hours else "-",
                f"{recipe.top1:.1f}" if recipe.top1 else "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    note = "Hardware, hours and linear top-1 are those published for ImageNet, ResNet-50 (arXiv 2101.07525)."
    return "\n".join([*lines, "", note])


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print a ConfigurationError as one line and exit with status 2 (a run that was stopped: 75; Ctrl-C: 130).

    Other errors keep their traceback.

    Of several processes on a machine, the first speaks at once. The others wait: if the mistake is theirs too, their
    launcher ends them meanwhile; if it is not the first one's, they speak.
    """
    kept = signal.getsignal(signal.SIGINT)
    if kept is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (ConfigurationError, Interrupted) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(3)
        line = " ".join(str(error).split())  # a value that was given may hold line breaks
        kind, status = ("error: ", 2) if isinstance(error, ConfigurationError) else ("", error.status)
        print(f"{Path(sys.argv[0]).name}: {kind}{line}", file=sys.stderr, flush=True)
        raise SystemExit(status) from None
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
        raise SystemExit(STATUS_CTRL_C) from None
    finally:
        signal.signal(signal.SIGINT, kept)


def interrupt(number: int, frame: types.FrameType | None) -> None:
    """Ctrl-C: as Python takes it, but at once and in one line while a library is imported.

    Libraries catch it then, or make something else of it: a RecursionError, an abort in C++.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
            os._exit(STATUS_CTRL_C)
        frame = frame.f_back
    raise KeyboardInterrupt

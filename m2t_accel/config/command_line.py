"""Parse flags and YAML files into settings, and print a user's errors in one line.

This module imports no torch, so that `--help`, `--recipe list` and a wrong flag are answered at once.
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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import yaml

from m2t_accel.config.fields import (
    STATUS_CTRL_C,
    ConfigurationError,
    Interrupted,
    fields_by_heading,
    plain_text,
)
from m2t_accel.config.other_names import is_flag, own_names, own_values, refuse_unknown, unknown_flags
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.config.recipes import RECIPES, build_config
from m2t_accel.output import lasting_output

Settings = TypeVar("Settings")


def read_yaml(path: str, flag: str = "--config") -> dict[str, object]:
    """Read the settings in a YAML file.

    Args:
        flag: what the command line calls the file, for the message.

    Raises:
        ConfigurationError: the file cannot be read, or does not consist of `name: value` lines.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{flag} {path}: cannot be read ({reason})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # e.g. an impossible date, thousands of brackets
        raise ConfigurationError(f"{flag} {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigurationError(f"{flag} {path}: needs lines `name: value`, with the names of --help")
    return content


def parse_command_line(
    description: str,
    arguments: Sequence[str] | None = None,
    options: argparse.ArgumentParser | None = None,
    recipe: str | None = "digits",
    shown: Collection[str] | None = None,
    build: Callable[[Mapping[str, object]], PretrainConfig] = build_config,
    **defaults: object,
) -> tuple[PretrainConfig, argparse.Namespace]:
    """Parse the settings of a pretraining run and the script's own options. Return both.

    Args:
        description: text at the top of `--help`.
        arguments: words of the command line (default: those of the process).
        options: the script's own options.
        recipe: the default recipe; None: `build` chooses it.
        shown: names of the settings that `--help` shows (default: all); the others are accepted, too.
        build: function that makes the configuration from the given settings.
        defaults: the script's other defaults.

    Raises:
        ConfigurationError: a flag, key or recipe is unknown, or a value is not allowed.
    """
    usage = [
        f"[{action.option_strings[0]} {action.metavar}]" if action.option_strings else action.metavar
        for action in (options._actions if options else ())
    ]
    return parse_settings(
        description,
        " ".join([*usage, "[--recipe NAME] [--dataset SOURCE]", *(["[--output_dir DIR]"] if shown is None else [])]),
        PretrainConfig,
        build,
        preset="recipe",
        defaults=({} if recipe is None else {"recipe": recipe}) | defaults,
        table=recipe_table,
        options=options,
        arguments=arguments,
        shown=shown,
    )


def view_settings() -> set[str]:
    """Return the names of the settings that decide which images are read, and what their views look like."""
    groups = fields_by_heading(PretrainConfig)
    names = {item.name for heading in ("views", "data") for item in groups[heading]}
    of_evaluation = {"evaluation_crop", "validation_split", "validation_fraction", "label_column", "max_bad_fraction"}
    return names - of_evaluation | {"recipe", "dataset", "seed"}


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
    shown: Collection[str] | None = None,
) -> tuple[Settings, argparse.Namespace]:
    """Parse the settings of a script and its own options. Return both.

    A flag overrides the `--config` file, which overrides the preset. `--help` prints and exits.

    Args:
        description: text at the top of `--help`.
        usage: the most important flags, for the usage line.
        kind: dataclass of the settings.
        build: function that makes the dataclass from the given settings and applies the preset.
        preset: name of the setting that selects a preset (recipe or protocol), if there is one.
        table: function that returns the table of all presets; `--PRESET list` prints it and exits.
        options: the script's own options.
        arguments: words of the command line (default: those of the process).
        defaults: the script's own defaults of settings.
        shown: names of the settings that `--help` shows (default: all); the others are accepted, too.

    Raises:
        ConfigurationError: a flag, key or preset is unknown, or a value is not allowed.
    """
    parser = OneLineParser(
        parents=[options] if options else [],
        usage=f"%(prog)s {usage} [--config FILE.yaml] [--SETTING VALUE]",
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        epilog="The --config file may hold any setting, as `name: value`; flags override it.\n"
        "The names of transformers and timm for these settings are accepted, too: see docs/recipes.md."
        + (f"\nThe defaults shown are those for ImageNet; a {preset} has its own." if preset else "")
        + ("\nThe other settings of scripts/pretrain.py are accepted, too." if shown is not None else ""),
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="file with settings, such as the config.yaml of a run")
    hints = typing.get_type_hints(kind)
    for heading, fields in fields_by_heading(kind).items():
        group = parser.add_argument_group(heading)
        for item in fields:
            is_shown = shown is None or item.name in shown
            add_flag(group, item, hints[item.name], defaults.get(item.name, item.default), is_shown)
    if "push_to_hub" in hints:
        parser.add_argument("--hub_model_id", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    known, unknown = parser.parse_known_args(arguments)
    flags = vars(known)
    if table is not None and flags.get(preset) == "list":
        print(table())
        raise SystemExit(0)
    path = flags.pop("config")
    settings = hints.keys() | ({"hub_model_id"} if "push_to_hub" in hints else set())
    own_options = argparse.Namespace(**{name: flags.pop(name) for name in flags.keys() - settings})
    from_file = {} if path is None else read_yaml(path)
    from_file = dict(zip(own_names(from_file, settings), from_file.values(), strict=True))
    if {preset} <= flags.keys() & from_file.keys() and flags[preset] != from_file[preset]:
        raise ConfigurationError(
            f"--{preset} {flags[preset]} contradicts `{preset}: {from_file[preset]}` in {path}: give one of them"
        )
    given = {**defaults, **from_file, **flags}
    others = {name: plain_text(given.pop(name)) for name in from_file if name not in settings}
    given = own_values(join_push_to_hub(given))
    if others or unknown:
        refuse_unknown(others | unknown_flags(unknown), given, build, parser.flags(), settings)
    return build(given), own_options


def join_push_to_hub(given: Mapping[str, object]) -> dict[str, object]:
    """Return the settings with `--push_to_hub --hub_model_id USER/NAME` as `--push_to_hub USER/NAME`.

    Raises:
        ConfigurationError: one of the two is missing, or they name two repositories.
    """
    settings = dict(given)
    name, push = settings.pop("hub_model_id", None), settings.get("push_to_hub")
    switch = str(push).lower()
    if switch == "false":
        settings["push_to_hub"] = None
    elif switch == "true":
        if name is None:
            raise ConfigurationError("--push_to_hub needs a repository: type --push_to_hub USER/NAME")
        settings["push_to_hub"] = name
    elif name is not None and push is None:
        raise ConfigurationError(f"--hub_model_id {name} publishes nothing alone: type --push_to_hub {name}")
    elif name is not None and push != name:
        raise ConfigurationError(f"--push_to_hub {push} and --hub_model_id {name} differ: give one of them")
    return settings


def add_flag(
    group: argparse._ArgumentGroup, item: dataclasses.Field, hint: object, default: object, is_shown: bool = True
) -> None:
    """Add the flag of one setting; the value stays text, which `convert` reads like a YAML value."""
    if typing.get_origin(hint) is types.UnionType:  # `something | None`
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    items = typing.get_args(hint)  # empty unless the setting is a tuple
    if isinstance(default, tuple):
        default = " ".join(n if isinstance(n, str) else f"{n:.3g}" for n in default)
    elif isinstance(default, bool):
        default = str(default).lower()
    shown = "" if default is None else f" (default: {default})"
    letter = {int: "N", float: "X", str: "NAME", bool: "true|false"}[items[0] if items else hint]
    count = {"nargs": len(items), "metavar": (letter,) * len(items)} if items else {"metavar": letter}
    if ... in items:  # any number of values
        count = {"nargs": "+", "metavar": letter, "action": "extend"}  # the flag may be repeated
    if hint is bool or item.name in ("push_to_hub", "resume"):
        count |= {"nargs": "?", "const": True}  # the flag without a value
    text = (item.metadata["help"] + shown).replace("%", "%%") if is_shown else argparse.SUPPRESS
    group.add_argument(f"--{item.name}", default=argparse.SUPPRESS, help=text, **count)


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that accepts other names of its flags, and raises its errors as a ConfigurationError."""

    def flags(self) -> list[str]:
        """Return the flags that `--help` shows."""
        actions = [action for action in self._actions if action.help != argparse.SUPPRESS]
        return [flag for action in actions for flag in action.option_strings]

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        words = list(sys.argv[1:] if args is None else args)
        flags = [i for i, word in enumerate(words) if is_flag(word)]
        parts = [words[i].partition("=") for i in flags]
        known = {flag.lstrip("-"): flag for action in self._actions for flag in action.option_strings}
        names = own_names([flag.lstrip("-") for flag, _, _ in parts], known)
        for i, name, (flag, equals, value) in zip(flags, names, parts, strict=True):
            words[i] = f"{known.get(name, flag)}{equals}{value}"
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigurationError(f"{message}; --help lists all flags")


def recipe_table() -> str:
    """Return the recipes as a text table, with the published hardware, hours and accuracy."""
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
    note = "Hardware, hours and linear top-1 are the published ones of ResNet-50 on ImageNet (arXiv 2101.07525)."
    return "\n".join([*lines, "", note])


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print a user's error in one line and exit: status 2 for a ConfigurationError, 75 or 130 for a stopped run.

    Other errors keep their traceback. With several processes on a machine, the first one prints at once, and the others
    wait. If the first one fails too, the launcher ends the others meanwhile, so the error is printed once. An error
    found before the processes have joined needs the longer wait: on a busy machine they start many seconds apart.
    """
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle_ctrl_c)
    try:
        if sys.platform == "win32":  # no fcntl, no SIGUSR1
            raise ConfigurationError("Windows is not supported: type `wsl --install`, and use Linux in WSL 2")
        with lasting_output() as streams:  # `| head` is no error
            yield
        for stream in streams:
            if stream.error is not None:
                raise ConfigurationError(f"the output cannot be written ({stream.error.strerror}), and is incomplete")
    except (ConfigurationError, Interrupted) as error:
        is_error = isinstance(error, ConfigurationError)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(30 if is_error else 3)
        line = " ".join(str(error).split())  # the given value may contain line breaks
        kind, status = ("error: ", 2) if is_error else ("", error.status)
        print_error(f"{kind}{line}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # The interpreter would now destroy the process group. It can abort in a thread of gloo, and NCCL warns, or
            # waits for a lost process. The kernel closes the connections of a process that ends at once.
            os._exit(status)
        raise SystemExit(status) from None
    except KeyboardInterrupt:
        print_error("interrupted")
        raise SystemExit(STATUS_CTRL_C) from None
    finally:
        signal.signal(signal.SIGINT, previous)


def print_error(text: str) -> None:
    """Print a line to stderr after the name of the script, if anything still reads it."""
    with lasting_output():
        if sys.stderr is not None:  # as after `2>&-`
            sys.stderr.write(f"{Path(sys.argv[0]).name}: {text}\n")  # in one piece, so that processes do not mix lines


def handle_ctrl_c(number: int, frame: types.FrameType | None) -> None:
    """Raise KeyboardInterrupt; while a library is being imported, print one line and end the process at once.

    During an import, libraries catch the exception or turn it into something else: a RecursionError, a C++ abort.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            print_error("interrupted")
            os._exit(STATUS_CTRL_C)
        frame = frame.f_back
    raise KeyboardInterrupt

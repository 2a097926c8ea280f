"""Flags of other training scripts: names that are accepted for a setting, and what to type where the meaning differs.

The names are those of transformers (TrainingArguments, run_mae.py, run_image_classification.py), timm's train.py, MAE,
DINO, MoCo and PyTorch's ImageNet example. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

from m2t_accel.config.fields import ConfigurationError, convert_all, count, did_you_mean

# Names with the same meaning, by setting. A name that occurs twice stands for the first setting that a script has.
ALIASES: Mapping[str, str] = {
    "dataset": "dataset_name train_dir train_data_dir data_dir dataset_dir data_path data",
    "dataset_config": "dataset_config_name",
    "train_split": "train_split_name",
    "validation_split": "eval_split_name val_split",
    "image_column": "image_column_name input_key",
    "label_column": "label_column_name target_key",
    "validation_fraction": "train_val_split",
    "max_images": "max_train_samples",
    "max_steps": "max_train_steps",
    "output_dir": "output out_dir save_dir",
    "resume": "resume_from_checkpoint",
    "config": "c",
    "init_from": "model_name_or_path initial_checkpoint",
    "encoder": "arch a model backbone config_name model_name_or_path",  # of an evaluation; pretraining has init_from
    "epochs": "num_train_epochs num_epochs max_epochs",
    "batch_size": "b total_batch_size global_batch_size",
    "learning_rate_per_256": "base_learning_rate lr_base blr",
    "learning_rates": "base_learning_rate lr_base blr",
    "optimizer": "optim opt",
    "weight_decay": "wd",
    "weight_momentum": "momentum_teacher moco_m",
    "image_size": "img_size input_size crop_size",
    "image_mean": "mean",
    "image_std": "std",
    "crop_scale": "scale",
    "crop_ratio": "ratio",
    "flip_probability": "hflip",
    "evaluation_crop": "crop_pct",
    "num_workers": "dataloader_num_workers workers j",
    "log_every": "logging_steps log_interval print_freq p",
    "report_to": "tracker",
    "repo_id": "hub_model_id",  # of push_to_hub.py; the trainings have --hub_model_id beside --push_to_hub
    "private": "hub_private_repo",
}


def own_names(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Return the setting that each name stands for; an unknown name stays as it is.

    Hyphens count as underscores.

    Args:
        names: names as the user has written them.
        known: names of the settings of this script.

    Raises:
        ConfigurationError: two different names stand for the same setting.
    """
    settings, written = [], {}
    for name in names:
        plain = name.replace("-", "_")
        setting = (
            plain if plain in known else next((s for s in ALIASES if s in known and plain in ALIASES[s].split()), name)
        )
        first = written.setdefault(setting, name)
        if first.replace("-", "_") != plain:
            raise ConfigurationError(f"--{first} and --{name} are the same setting: give one of them")
        settings.append(setting)
    return settings


# Values of other scripts for settings that have the same meaning.
VALUES = {"resume": {"true": "auto", "latest": "auto", "false": "never"}}


def own_values(given: Mapping[str, object]) -> dict[str, object]:
    """Return the settings with the values of other scripts, such as `--resume_from_checkpoint true`, as this one's."""
    return {name: VALUES.get(name, {}).get(str(value).lower(), value) for name, value in given.items()}


PER_DEVICE = "per_device_train_batch_size per_gpu_train_batch_size train_batch_size batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps accum_iter grad_accum_steps"


class Flag(NamedTuple):
    """A flag that no setting has, and what its advice may need."""

    value: str  # empty if there is none
    others: Mapping[str, str]  # all such flags of the command, and their values
    config: object  # the settings that the rest of the command gives
    num_processes: int

    def batch_sizes(self) -> tuple[int, int]:
        """Return the images of a step and of a sub-batch that the unknown flags mean, or else those of the settings."""
        per_device, steps = (
            next((whole_number(self.others[name]) for name in names.split() if name in self.others), None)
            for names in (PER_DEVICE, ACCUMULATION)
        )
        if per_device is None and steps is None:
            return self.config.batch_size, self.config.device_batch_size
        size = per_device or self.config.device_batch_size
        return size * (steps or 1) * self.num_processes, size


def number(text: str, or_zero: bool = False) -> float:
    """Return a positive number, or 0 if that is allowed.

    Raises:
        ValueError: the text is none.
    """
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf or (or_zero and value == 0):
            return value
    raise ValueError("a positive number is needed")


def whole_number(text: str) -> int:
    """Return a positive whole number.

    Raises:
        ValueError: the text is none.
    """
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise ValueError("a positive whole number is needed")
    return int(text)


def batches_of_all(flag: Flag) -> str:
    batch_size, size = flag.batch_sizes()
    number = count(flag.num_processes, "process")
    return f"--batch_size counts all devices: on {number} type --batch_size {batch_size} --device_batch_size {size}"


def rate_per_256(flag: Flag) -> str:
    setting = "learning_rates" if hasattr(flag.config, "learning_rates") else "learning_rate_per_256"
    batch_size, _ = flag.batch_sizes()
    rate = number(flag.value) * 256 / batch_size
    return f"the rate is per 256 images: for a batch of {batch_size} type --{setting} {rate:.4g}"


def share_of_epochs(flag: Flag) -> str:
    return f"type --warmup_epochs {number(flag.value, or_zero=True) * flag.config.epochs:g}"


def steps_of_warmup(flag: Flag) -> str:
    return f"type --warmup_epochs {'0' if flag.value == '0' else 'N, with N = steps / steps per epoch'}"


def newest_checkpoints(flag: Flag) -> str:
    if flag.value == "0":  # of transformers: no limit
        return "type --keep 1 1, which keeps all"
    return f"type --keep {whole_number(flag.value)} 0"


def steps_of_checkpoints(flag: Flag) -> str:
    if flag.value == "epoch":
        return "type --checkpoint_every 1epoch"
    if re.fullmatch(r"0?\.\d+", flag.value):  # of transformers: a share of the run
        return f"type --checkpoint_every {number(flag.value) * flag.config.epochs:g}epochs"
    return f"type --checkpoint_every {whole_number(flag.value)}steps"


NO_NEED = "leave it out"
LAUNCH = "type accelerate launch {flags} {script} …"
# What to type for flags whose meaning differs: their names, a setting that the script must have, and the advice. A
# function may raise a ValueError for a value that it cannot read.
ADVICE: tuple[tuple[str, str, str | Callable[[Flag], str]], ...] = (
    (f"{PER_DEVICE} {ACCUMULATION}", "device_batch_size", batches_of_all),
    ("learning_rate lr", "batch_size", rate_per_256),
    ("warmup_ratio", "warmup_epochs", share_of_epochs),
    ("warmup_steps lr_warmup_steps", "warmup_epochs", steps_of_warmup),
    (
        "lr_scheduler_type lr_scheduler sched",
        "warmup_epochs",
        "the schedule is always a linear warmup (--warmup_epochs) and a cosine to 0: leave it out",
    ),
    (
        "momentum",
        "weight_momentum",
        "type --optimizer_momentum (SGD's, LARS's) or --weight_momentum (the teacher's)",
    ),
    ("max_grad_norm clip_grad clip_grad_norm", "epochs", "gradients are not clipped: leave it out"),
    ("gradient_checkpointing grad_checkpointing", "batch_size", "type a smaller --device_batch_size"),
    ("save_total_limit checkpoints_total_limit", "keep", newest_checkpoints),
    ("save_steps checkpointing_steps", "checkpoint_every", steps_of_checkpoints),
    ("save_strategy", "checkpoint_every", "type --checkpoint_every 500steps, 1epoch or never"),
    ("eval_strategy evaluation_strategy eval_steps", "evaluate_every", "type --evaluate_every N, in epochs"),
    ("ddp_timeout", "collective_timeout", "type --collective_timeout N, in minutes"),
    ("pretrained", "init_from", "type --init_from SOURCE to start from weights"),
    ("validation_dir", "dataset", "put train/ and val/ into one folder, and type --dataset FOLDER"),
    ("overwrite_output_dir", "output_dir", "leave it out to resume the run, or type another --output_dir"),
    ("run_name experiment", "output_dir", "a run has the name of its folder: type --output_dir runs/{value}"),
    ("logging_dir log_dir", "output_dir", "all files are written to --output_dir: leave it out"),
    ("with_tracking log_wandb", "report_to", "type --report_to NAME, such as tensorboard or wandb"),
    ("cache_dir", "dataset", "set the environment variable HF_HOME"),
    ("token use_auth_token hub_token", "dataset", "type `hf auth login`, or set HF_TOKEN"),
    (
        "do_train do_eval do_predict",
        "dataset",
        "leave it out (knn.py, linear_probe.py, finetune.py evaluate)",
    ),
    ("per_device_eval_batch_size eval_batch_size validation_batch_size", "dataset", NO_NEED),
    ("remove_unused_columns dataloader_pin_memory pin_mem dataloader_drop_last", "dataset", NO_NEED),
    ("torch_compile torchcompile", "dataset", LAUNCH.replace("{flags}", "--dynamo_backend inductor")),
    ("fp16 bf16", "dataset", LAUNCH.replace("{flags}", "--mixed_precision {name}")),
    ("amp", "dataset", LAUNCH.replace("{flags}", "--mixed_precision bf16")),
    ("use_cpu no_cuda cpu", "dataset", LAUNCH.replace("{flags}", "--config_file accelerate_configs/cpu.yaml")),
    (
        "mixed_precision num_processes num_machines machine_rank main_process_ip gpu_ids config_file",
        "dataset",
        LAUNCH.replace("{flags}", "--{name} {value}"),
    ),
    (
        "gpu gpus device devices world_size local_rank dist_url multi_gpu",
        "dataset",
        LAUNCH.replace("{flags}", "--config_file accelerate_configs/8gpu.yaml --num_processes N"),
    ),
)


def find_advice(name: str, settings: Collection[str]) -> str | Callable[[Flag], str] | None:
    """Return the advice for a flag that no setting of a script has; None if the table has none."""
    for names, setting, advice in ADVICE:
        if name in names.split() and setting in settings:
            return advice
    return None


def is_flag(word: str) -> bool:
    """Return whether a word of a command line is a flag, and no value such as -0.5."""
    return word.startswith("-") and not re.match(r"-\.?\d", word)


def unknown_flags(words: Iterable[str]) -> dict[str, str]:
    """Return the flags among the words that argparse does not know, with their values.

    Raises:
        ConfigurationError: the first word is no flag.
    """
    flags: dict[str, str] = {}
    for word in words:
        if is_flag(word):
            flag, _, value = word.partition("=")
            flags[flag] = value
        elif flags:
            flag = list(flags)[-1]
            flags[flag] = f"{flags[flag]} {word}".strip()
        else:
            raise ConfigurationError(f"{word}: a value without its flag, such as --dataset; --help lists all flags")
    return flags


def refuse_unknown(
    unknown: Mapping[str, str],
    given: Mapping[str, object],
    build: Callable[[Mapping[str, object]], object],
    known_flags: Iterable[str],
    settings: Collection[str],
) -> NoReturn:
    """Say what to type instead of each unknown name.

    Args:
        unknown: unknown flags, with hyphens, and keys of a `--config` file, without; and their values.
        given: the settings that are known.
        build: function that makes the dataclass of the settings.
        known_flags: all flags of the script.
        settings: names of all settings.

    Raises:
        ConfigurationError: always.
    """
    plain = {name: name.lstrip("-").replace("-", "_") for name in unknown}
    faults = []
    for name in unknown:
        if find_advice(plain[name], settings) is None:
            kind, names = ("flag", known_flags) if name.startswith("-") else ("setting", settings)
            faults.append(f"unknown {kind} {name}{did_you_mean(name, names)}; --help lists them all")
    config, fault = closest_settings({"dataset": "any", "encoder": "any", **given}, build)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    script = f"scripts/{Path(sys.argv[0]).name}"
    others = {plain[name]: value for name, value in unknown.items()}
    typed: dict[str, list[str]] = {}  # by advice
    for name, value in unknown.items():
        advice = find_advice(plain[name], settings)
        if advice is None:
            continue
        if value.lower() in ("false", "none"):  # fp16: false, max_grad_norm: null
            advice = NO_NEED
        try:
            text = advice if isinstance(advice, str) else advice(Flag(value, others, config, num_processes))
        except ValueError as error:
            text = str(error)
        text = text.format(name=plain[name], value=value or "…", script=script)
        flag = name if name.startswith("-") else f"--{name}"
        typed.setdefault(text, []).append(f"{flag} {value}".rstrip())
    faults += [f"{', '.join(names)}: {text}" for text, names in typed.items()]
    raise ConfigurationError("; ".join([*faults, *([fault] if fault else [])]))


def closest_settings(
    given: Mapping[str, object], build: Callable[[Mapping[str, object]], object]
) -> tuple[object, str | None]:
    """Return the given settings and what is wrong with them; of wrong settings, those values that can be read."""
    try:
        return build(given), None
    except ConfigurationError as error:
        plain = {name: given[name] for name in ("dataset", "encoder")}
        try:
            config = build({**plain, **{name: given[name] for name in ("recipe", "protocol") if name in given}})
        except ConfigurationError:
            config = build(plain)
        values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
        for name, value in given.items():
            with contextlib.suppress(ConfigurationError):
                values |= convert_all(type(config), {name: value})
        return types.SimpleNamespace(**values), str(error)

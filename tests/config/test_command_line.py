import argparse
import dataclasses
import re
import sys

import pytest
import yaml

from m2t_accel.config import command_line, pretrain
from m2t_accel.config.command_line import errors_in_one_line, parse_command_line
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import RECIPES, build_config


def parse(*arguments):
    return parse_command_line("test", [str(argument) for argument in arguments])


def test_recipe_list_has_a_line_for_each(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--recipe", "list")
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "8xV100-b1024-300ep" in lines[3]
    assert "8 V100" in lines[3]
    assert "132" in lines[3]
    assert "73.8" in lines[3]
    assert sum(line.startswith(tuple(RECIPES)) for line in lines) == len(RECIPES)


# --- where values come from


def test_without_arguments_it_trains_digits():
    config = parse()
    assert (config.recipe, config.dataset, config.output_dir) == ("digits", "digits", "runs/digits")


def test_a_home_folder_that_no_shell_has_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse("--dataset=~/images", "--output_dir=~/runs/~mine")
    assert (config.dataset, config.output_dir) == (f"{tmp_path}/images", f"{tmp_path}/runs/~mine")


INTERRUPTED = """
import os, signal, sys, types
from m2t_accel.config.command_line import errors_in_one_line
class Library:
    def find_spec(name, path, target=None):
        if name == "library":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                signal.sigtimedwait([signal.SIGUSR1], 5)
            except BaseException:
                raise RecursionError("of a library")
sys.meta_path.insert(0, Library)
sys.argv = ["scripts/some.py"]
with errors_in_one_line():
    if {imports}:
        import library
    os.kill(os.getpid(), signal.SIGINT)
    signal.sigtimedwait([signal.SIGUSR1], 5)
"""


@pytest.mark.parametrize("imports", [True, False])
def test_ctrl_c_is_one_line_also_while_libraries_are_imported(run_script, imports):
    done = run_script("-c", INTERRUPTED.format(imports=imports))
    assert (done.returncode, done.stderr) == (130, "some.py: interrupted\n")


def test_a_scripts_own_default_is_in_its_help(run_script):
    assert re.search(
        r"--recipe NAME[^-]*\(default: 8x2080Ti-b256-100ep\)", run_script("scripts/preview.py", "--help").stdout
    )


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: 8x2080Ti-b256-100ep\ndataset: digits\nepochs: 50\nlearning_rate_per_256: 1e-3\nseed: 3\n")
    config = parse("--config", path, "--epochs", 20)
    assert (config.epochs, config.learning_rate_per_256, config.seed, config.batch_size) == (20, 1e-3, 3, 256)


def test_every_setting_is_a_flag_and_a_key():
    changed = {
        "recipe": "cifar10",
        "dataset": "digits",
        "output_dir": "elsewhere",
        "encoder": "resnet34",
        "optimizer": "lars",
        "device_batch_size": 64,
        "batch_size": 128,
        "crop_scale": (0.3, 0.9),
        "crop_ratio": (0.8, 1.2),
        "blur_probability": (0.3, 0.4),
        "blur_sigma": (0.2, 1.5),
        "solarize_probability": (0.1, 0.3),
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (0.4, 0.5, 0.6),
        "image_column": "picture",
        "label_column": "kind",
        "tracker": "tensorboard",
        "push_to_hub": "me/encoder",
        "resume": "elsewhere/checkpoints/step-7",
        "checkpoint_every": ("500steps", "2epochs", "7.5min"),
        "keep": (5, 10),
        "stop_on_collapse": True,
    }
    numbers = {"weight_momentum": 0.5, "optimizer_momentum": 0.5, "validation_fraction": 0.25, "evaluation_crop": 0.5}
    numbers |= {"num_workers": 3, "evaluate_every": 7, "hue": 0.25}
    flags, expected = [], {}
    for item in dataclasses.fields(pretrain.PretrainConfig):
        value = changed.get(item.name, numbers.get(item.name))
        if value is None:
            kind = type(item.default)
            value = kind(0.5) if item.name.endswith("probability") else kind(item.default + 1 if kind is int else 0.75)
        expected[item.name] = value
        flags += [f"--{item.name}", *(value if isinstance(value, tuple) else (value,))]
    by_flags = parse(*flags)
    assert dataclasses.asdict(by_flags) == expected
    by_yaml = build_config(yaml.safe_load(by_flags.to_yaml()))
    assert by_yaml == by_flags


@pytest.mark.parametrize("name", RECIPES)
def test_a_resolved_configuration_reads_back_as_itself(name, tmp_path):
    config = build_config({"recipe": name, "dataset": "digits"})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse("--config", tmp_path / "config.yaml") == config


# --- what is refused, and how

BAD = [
    (["--recipe", "8xv100-b1024-100"], "--recipe 8xv100-b1024-100: unknown, did you mean 8xV100-b1024-100ep?"),
    (["--recipe", "zzz"], "--recipe zzz: unknown; `--recipe list` prints them all"),
    (["--epoch", 3], "unknown flag --epoch, did you mean --epochs?"),
    (["--epochs"], "argument --epochs: expected one argument"),
    (["stray"], "unknown flag stray"),
    (["--epochs", "ten"], "--epochs ten: a whole number is needed"),
    (["--epochs", "1.5"], "--epochs 1.5: a whole number is needed"),
    (["--learning_rate_per_256", "fast"], "--learning_rate_per_256 fast: a number is needed"),
    (["--learning_rate_per_256", "nan"], "--learning_rate_per_256 nan: not a finite number"),
    (["--epochs", 0], "--epochs 0 is out of range: at least 1 is allowed"),
    (["--learning_rate_per_256", -0.1], "--learning_rate_per_256 -0.1 is out of range: more than 0 is allowed"),
    (["--weight_decay", -1], "--weight_decay -1 is out of range: at least 0 is allowed"),
    (["--weight_momentum", 1.1], "--weight_momentum 1.1 is out of range: at most 1 is allowed"),
    (["--weight_momentum", -0.1], "--weight_momentum -0.1 is out of range: at least 0 is allowed"),
    (["--optimizer_momentum", 1], "--optimizer_momentum 1 is out of range: less than 1 is allowed"),
    (["--flip_probability", 2], "--flip_probability 2 is out of range: at most 1 is allowed"),
    (["--blur_probability", 0.5, -1], "--blur_probability -1 is out of range: at least 0 is allowed"),
    (["--crop_scale", 0.9, 0.2], "--crop_scale 0.9 0.2: the first must not exceed the second"),
    (["--optimizer", "adam"], "--optimizer adam: unknown; one of sgd, lars"),
    (["--tracker", "tensorbord"], "--tracker tensorbord: unknown, did you mean tensorboard?; one of none, tensorboard"),
    (["--epochs", 2], "--warmup_epochs 8 must be less than --epochs 2: add --warmup_epochs 0.2"),
    (
        ["--batch_size", 100, "--device_batch_size", 32],
        "--batch_size 100 is not a multiple of --device_batch_size 32: use --batch_size 96 or 128, "
        "or --device_batch_size 25",
    ),
    (["--recipe", "8x2080Ti-b256-100ep"], "--dataset is needed: a folder of class folders"),
    (["--dataset", ""], "--dataset is empty: leave it out, or give it a value"),
    (["--config", ""], "--config : cannot be read"),
    (["--seed", 2**32], "--seed 4.29497e+09 is out of range"),
    (["--batch_size", 3000000001, "--device_batch_size", 64], "--batch_size 3e+09 is out of range"),
    (["--image_mean", 123, 117, 104], "--image_mean 123 is out of range: at most 1 is allowed"),
    (["--image_column", "x", "--label_column", "x"], "--image_column and --label_column are both x"),
    (["--config", "/no/such.yaml"], "--config /no/such.yaml: cannot be read"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:50])
def test_bad_flags(arguments, message):
    with pytest.raises(ConfigurationError) as caught:
        parse(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochz: 3", "unknown setting epochz, did you mean epochs?"),
        ("epochs: many", "--epochs many: a whole number is needed"),
        ("epochs: true", "--epochs True: a whole number is needed"),
        ("epochs: 2.5", "--epochs 2.5: a whole number is needed"),
        ("epochs: [1, 2]", "--epochs [1, 2]: a whole number is needed"),
        ("epochs:", "--epochs None: a whole number is needed"),
        ("crop_scale: 0.5", "--crop_scale 0.5: 2 numbers are needed"),
        ("crop_scale: [0.5]", "--crop_scale 0.5: 2 numbers are needed"),
        ("image_mean: [1, 2, x]", "--image_mean x: a number is needed"),
        ("- epochs", "needs lines `name: value`"),
        ("epochs: [", "not YAML"),
        ("epochs: 2024-13-45", "not YAML"),
        ("epochs: " + 3000 * "[", "not YAML"),
        ("image_mean: !!binary aGVs", "3 numbers are needed"),
        ('output_dir: "a\\0b"', "--output_dir is empty"),
        ("recipe: cifar10\nepochs: 5", "--recipe digits meets `recipe: cifar10`"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    arguments = ["--recipe", "digits"] if "recipe" in text else []
    with pytest.raises(ConfigurationError) as caught:
        parse("--config", path, *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/pretrain.py"])
    with pytest.raises(SystemExit) as caught, errors_in_one_line():
        raise ConfigurationError("what was given,\nwhat is allowed")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "pretrain.py: error: what was given, what is allowed\n"


def test_an_interruption_is_one_line_and_status_130(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/pretrain.py"])
    with pytest.raises(SystemExit) as caught, errors_in_one_line():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr().err == "pretrain.py: interrupted\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ValueError, match="a defect"), errors_in_one_line():
        raise ValueError("a defect")


def test_a_switch_is_a_flag_alone_or_true_or_false():
    assert [parse(*flags).streaming for flags in ([], ["--streaming"], ["--streaming", "false"])] == [
        False,
        True,
        False,
    ]
    assert parse("--streaming", "--epochs", 20).epochs == 20
    with pytest.raises(ConfigurationError, match="--streaming maybe: true or false is needed"):
        parse("--streaming", "maybe")


def test_a_script_may_have_options_and_a_recipe_of_its_own():
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--output", metavar="FILE", default="a.png")
    config, given = command_line.parse_with_options(
        "", options, "cifar10", ["--output", "b.png", "--dataset", "digits"]
    )
    assert (config.recipe, given.output) == ("cifar10", "b.png")
    config, given = command_line.parse_with_options("", options, "cifar10", ["--recipe", "digits"])
    assert (config.recipe, given.output) == ("digits", "a.png")
    with pytest.raises(ConfigurationError, match="unknown flag --outptu, did you mean --output"):
        command_line.parse_with_options("", options, "cifar10", ["--outptu", "b.png"])

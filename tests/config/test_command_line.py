import argparse
import dataclasses
import os
import re
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, without_reader

from m2t_accel.config.command_line import errors_in_one_line, parse_command_line, parse_settings
from m2t_accel.config.evaluation import KnnConfig, build_knn
from m2t_accel.config.fields import ConfigurationError, Interrupted
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.config.recipes import RECIPES, build_config


def parse(*arguments):
    return parse_command_line("test", [str(argument) for argument in arguments])[0]


def test_recipe_list_has_a_line_for_each_recipe(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--recipe", "list")
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(RECIPES)]] == list(RECIPES)
    assert re.match("8xV100-b1024-300ep .* 8 V100 +132 +73.8$", lines[3])


def test_without_arguments_the_recipe_is_digits():
    config = parse()
    assert (config.recipe, config.dataset, config.output_dir) == ("digits", "digits", "runs/digits")


def test_a_tilde_that_the_shell_leaves_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse("--dataset=~/images", "--output_dir=~/runs/~mine")
    assert (config.dataset, config.output_dir) == (f"{tmp_path}/images", f"{tmp_path}/runs/~mine")


# Ctrl-C while a library is imported, which turns it into an exception of its own, or without an import.
INTERRUPTED = """
import os, signal, sys
from m2t_accel.config.command_line import errors_in_one_line

class Library:
    def find_spec(name, path, target=None):
        if name == "library":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                signal.sigtimedwait([signal.SIGUSR1], 5)
            except BaseException:
                raise RecursionError("raised by a library")

sys.meta_path.insert(0, Library)
sys.argv = ["scripts/some.py"]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell inherits SIG_IGN
with errors_in_one_line():
    if {imports}:
        import library
    os.kill(os.getpid(), signal.SIGINT)
    signal.sigtimedwait([signal.SIGUSR1], 5)
"""


@pytest.mark.parametrize("imports", [True, False])
def test_ctrl_c_prints_one_line_even_while_libraries_are_imported(run_script, imports):
    done = run_script("-c", INTERRUPTED.format(imports=imports))
    assert (done.returncode, done.stderr) == (130, "some.py: interrupted\n")


@pytest.mark.parametrize("unbuffered", ["1", ""])
@pytest.mark.parametrize("arguments", [("pretrain.py", "--help"), ("pretrain.py", "--recipe", "list")])
def test_output_that_nobody_reads_is_no_error(unbuffered, arguments):
    command = [sys.executable, f"scripts/{arguments[0]}", *arguments[1:]]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with without_reader() as out:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_output_that_does_not_fit_on_the_disk_is_an_error():
    script = FAILING.replace("raise ConfigurationError", "str")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "some.py: error: the output cannot be written (No space left on device), and is incomplete\n"


FAILING = """
import sys
from m2t_accel.config.command_line import errors_in_one_line
from m2t_accel.config.fields import ConfigurationError

sys.argv = ["scripts/some.py"]
with errors_in_one_line():
    print("a line that stays in the buffer")
    raise ConfigurationError("wrong")
"""


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("lost", ["stdout", "stderr"])
def test_an_error_keeps_its_line_and_status_if_an_output_is_lost(lost, closed):
    """It is a pipe that nobody reads, or closed: `>&-`."""
    command = [sys.executable, "-c", FAILING]
    if closed:
        command = ["sh", "-c", f'exec "$0" "$@" {1 if lost == "stdout" else 2}>&-', *command]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with without_reader() as gone:
        streams |= {} if closed else {lost: gone}
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, check=False, **streams)
    assert done.returncode == 2
    if lost == "stdout":
        assert done.stderr == "some.py: error: wrong\n"
    else:
        assert done.stdout == "a line that stays in the buffer\n"


def test_help_shows_the_default_of_the_script(ask):
    assert re.search(r"--recipe NAME[^-]*\(default: 8x2080Ti-b256-100ep\)", ask("scripts/preview.py", "--help").out)


def test_flags_override_the_file_and_the_file_overrides_the_recipe(tmp_path):
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
        "teacher_statistics": "batch",
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
        "dataset_config": "large",
        "dataset_revision": "v2",
        "train_split": "both",
        "validation_split": "neither",
        "label_column": "kind",
        "report_to": ("tensorboard", "wandb"),
        "push_to_hub": "me/encoder",
        "resume": "elsewhere/checkpoints/step-7",
        "checkpoint_every": ("500steps", "2epochs", "7.5min"),
        "keep": (5, 10),
        "stop_on_collapse": True,
        "init_from": "runs/other",
    }
    numbers = {"weight_momentum": 0.5, "optimizer_momentum": 0.5, "validation_fraction": 0.25, "evaluation_crop": 0.5}
    numbers |= {"num_workers": 3, "max_steps": 5, "max_images": 9, "evaluate_every": 7, "hue": 0.25}
    numbers["images_per_epoch"] = 1000
    flags, expected = [], {}
    for item in dataclasses.fields(PretrainConfig):
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


def test_a_flag_of_any_number_of_values_may_be_repeated():
    config = parse("--checkpoint_every", "500steps", "--checkpoint_every=15min")
    assert config.checkpoint_every == ("500steps", "15min")
    assert parse("--crop_scale", 0.1, 1, "--crop_scale", 0.2, 1).crop_scale == (0.2, 1.0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_configuration_is_read_back_unchanged(name, tmp_path):
    config = build_config({"recipe": name, "dataset": "digits"})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse("--config", tmp_path / "config.yaml") == config


WRONG_FLAGS = [
    (["--recipe", "8xv100-b1024-100"], "--recipe 8xv100-b1024-100: .*8xV100-b1024-100ep"),
    (["--teacher_statistics", "none"], "--teacher_statistics none: unknown; one of momentum, batch, running"),
    (["--recipe", "zzz"], "--recipe zzz: unknown; `--recipe list`"),
    (["--epoch", 3], "flag --epoch, did you mean --epochs"),
    (["--epochs"], "--epochs: expected one argument"),
    (["stray"], "stray.*flag"),
    (["--epochs", "ten"], "--epochs ten: a whole number"),
    (["--epochs", "1.5"], "--epochs 1.5: a whole number"),
    (["--learning_rate_per_256", "fast"], "--learning_rate_per_256 fast: a number"),
    (["--learning_rate_per_256", "nan"], "--learning_rate_per_256 nan: .*finite"),
    (["--epochs", 0], "--epochs 0 .*at least 1"),
    (["--learning_rate_per_256", -0.1], "--learning_rate_per_256 -0.1 .*more than 0"),
    (["--weight_decay", -1], "--weight_decay -1 .*at least 0"),
    (["--weight_momentum", 1.1], "--weight_momentum 1.1 .*at most 1"),
    (["--weight_momentum", -0.1], "--weight_momentum -0.1 .*at least 0"),
    (["--optimizer_momentum", 1], "--optimizer_momentum 1 .*less than 1"),
    (["--flip_probability", 2], "--flip_probability 2 .*at most 1"),
    (["--blur_probability", 0.5, -1], "--blur_probability -1 .*at least 0"),
    (["--crop_scale", 0.9, 0.2], "--crop_scale 0.9 0.2: "),
    (["--optimizer", "adam"], "--optimizer adam: .*sgd, lars"),
    (["--report_to", "wandb", "tensorbord"], "--report_to tensorbord: .*did you mean tensorboard.*mlflow"),
    (["--streaming", "maybe"], "--streaming maybe: true or false"),
    (["--epochs", 2], "--warmup_epochs 13 .*add --warmup_epochs 0.2"),
    (["--batch_size", 100, "--device_batch_size", 32], "--batch_size 96 or 128, or --device_batch_size 25"),
    (["--recipe", "8x2080Ti-b256-100ep"], "--dataset is needed"),
    (["--dataset", ""], "--dataset is empty"),
    (["--config", ""], "--config : cannot be read"),
    (["--seed", 2**32], "--seed 4.29497e.09 .*at most"),
    (["--batch_size", 3000000001, "--device_batch_size", 64], "--batch_size 3e.09 .*at most"),
    (["--image_mean", 123, 117, 104], "--image_mean 123 .*at most 1"),
    (["--image_column", "x", "--label_column", "x"], "--image_column and --label_column"),
    (["--config", "/no/such.yaml"], "--config /no/such.yaml: cannot be read"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_FLAGS, ids=lambda value: str(value)[:50])
def test_wrong_flags_are_refused_in_one_line(arguments, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochz: 3", "unknown setting epochz, did you mean epochs"),
        ("epochs: many", "--epochs many: a whole number"),
        ("epochs: true", "--epochs True: a whole number"),
        ("epochs: 2.5", "--epochs 2.5: a whole number"),
        ("epochs: [1, 2]", r"--epochs \[1, 2\]: a whole number"),
        ("epochs:", "--epochs None: a whole number"),
        ("crop_scale: 0.5", "--crop_scale 0.5: 2 numbers"),
        ("crop_scale: [0.5]", "--crop_scale 0.5: 2 numbers"),
        ("image_mean: [1, 2, x]", "--image_mean x: a number"),
        ("- epochs", "--config .*name: value"),
        ("epochs: [", "--config .*not YAML"),
        ("epochs: 2024-13-45", "--config .*not YAML"),
        ("epochs: " + 1000 * "[", "--config .*not YAML"),
        ("image_mean: !!binary aGVs", "--image_mean .*3 numbers"),
        ('output_dir: "a\\0b"', "--output_dir is empty"),
        ("recipe: cifar10\nepochs: 5", "--recipe digits contradicts `recipe: cifar10`"),
    ],
)
def test_wrong_yaml_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        parse("--config", path, "--recipe", "digits")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (ConfigurationError("a value,\na limit"), 2, "pretrain.py: error: a value, a limit\n"),
        (Interrupted("stopped,\nsaved"), 75, "pretrain.py: stopped, saved\n"),
        (KeyboardInterrupt(), 130, "pretrain.py: interrupted\n"),
    ],
)
def test_errors_of_a_user_are_one_line_and_an_exit_status(capsys, monkeypatch, error, status, printed):
    monkeypatch.setattr(sys, "argv", ["scripts/pretrain.py"])
    with pytest.raises(SystemExit) as caught, errors_in_one_line():
        raise error
    assert caught.value.code == status
    assert capsys.readouterr().err == printed


def test_other_errors_keep_their_traceback():
    with pytest.raises(ValueError, match="a defect"), errors_in_one_line():
        raise ValueError("a defect")


def test_a_switch_needs_no_value():
    switches = [parse(*flags).streaming for flags in ([], ["--streaming"], ["--streaming", "false"])]
    assert switches == [False, True, False]
    assert parse("--streaming", "--epochs", 20).epochs == 20


@pytest.mark.parametrize("words", ["--k 5", "-k 5", "--k=5"])
def test_a_setting_of_one_letter_is_a_flag(words):
    words = ["--encoder", "any", "--dataset", "digits", *words.split()]
    assert parse_settings("", "", KnnConfig, build_knn, arguments=words)[0].k == (5,)


def test_a_script_may_have_its_own_options_and_default_recipe():
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--output", metavar="FILE", default="a.png")
    for words, expected in (
        (["--output", "b.png", "--dataset", "digits"], ("cifar10", "b.png")),
        (["--recipe", "digits"], ("digits", "a.png")),
    ):
        config, own = parse_command_line("", words, options, "cifar10")
        assert (config.recipe, own.output) == expected
    with pytest.raises(ConfigurationError, match="unknown flag --outptu, did you mean --output"):
        parse_command_line("", ["--outptu", "b.png"], options, "cifar10")

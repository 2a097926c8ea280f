import re

import pytest

from m2t_accel.config.command_line import OneLineParser, parse_command_line, parse_settings
from m2t_accel.config.evaluation import (
    EmbedConfig,
    FinetuneConfig,
    KnnConfig,
    LinearProbeConfig,
    build_embed,
    build_finetune,
    build_knn,
    build_linear_probe,
)
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.other_names import ADVICE, ALIASES
from m2t_accel.config.pretrain import PretrainConfig

EVALUATIONS = {
    KnnConfig: build_knn,
    LinearProbeConfig: build_linear_probe,
    FinetuneConfig: build_finetune,
    EmbedConfig: build_embed,
}


def parse(*arguments, kind=PretrainConfig):
    words = [str(argument) for argument in arguments]
    if kind is PretrainConfig:
        return parse_command_line("test", words)[0]
    return parse_settings("test", "", kind, EVALUATIONS[kind], arguments=words)[0]


def settings_of(kind):
    return set(kind.__dataclass_fields__)


@pytest.mark.parametrize("kind", [PretrainConfig, *EVALUATIONS])
def test_no_other_name_hides_a_setting_and_each_is_in_one_table(kind):
    aliases = [name for names in ALIASES.values() for name in names.split()]
    advised = [name for names, _, _ in ADVICE for name in names.split()]
    assert len(set(advised)) == len(advised)
    assert not set(advised) & (set(aliases) | settings_of(kind))
    for setting, names in ALIASES.items():
        assert setting not in names.split()


def test_every_other_name_stands_for_a_setting_and_is_in_the_docs(root):
    known = {"config", "repo_id", "private"}.union(*(settings_of(kind) for kind in (PretrainConfig, *EVALUATIONS)))
    assert set(ALIASES) <= known
    assert {setting for _, setting, _ in ADVICE} <= known
    table = (root / "docs" / "recipes.md").read_text(encoding="utf-8")
    names = [name for names in ALIASES.values() for name in names.split()]
    assert [name for name in names if not re.search(rf"`-?-?{name}`", table)] == []


def test_the_docs_give_every_answer_as_the_script_does(root, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scripts/pretrain.py"])
    monkeypatch.setenv("WORLD_SIZE", "8")
    text = (root / "docs" / "recipes.md").read_text(encoding="utf-8")
    _, _, table = text.partition("| flags | answer |\n|---|---|\n")
    rows = [line.strip("| ").split(" | ") for line in table.partition("\n\n")[0].splitlines()]
    assert len(rows) == len(ADVICE)
    for (flags, answer), (names, _, _) in zip(rows, ADVICE, strict=True):
        written = re.findall(r"`([^`]*)`", flags)
        assert [flag.split()[0] for flag in written] == [f"--{name}" for name in names.split()]
        with pytest.raises(ConfigurationError) as caught:
            parse("--recipe", "8xV100-b1024-100ep", "--dataset", "/data/imagenet", *written[0].split())
        assert str(caught.value).replace("`", "") == f"{written[0]}: {answer}".replace("`", "")


SAME = [  # what others type: the setting and its value
    ("--dataset_name digits", {"dataset": "digits"}),
    ("--train_dir digits", {"dataset": "digits"}),
    ("--image_column_name photo --label_column_name kind", {"image_column": "photo", "label_column": "kind"}),
    ("--num_train_epochs 30 --warmup-epochs 3", {"epochs": 30, "warmup_epochs": 3.0}),
    ("--resume_from_checkpoint never", {"resume": "never"}),
    ("--resume_from_checkpoint true", {"resume": "auto"}),
    ("--resume_from_checkpoint", {"resume": "auto"}),
    ("--resume_from_checkpoint latest", {"resume": "auto"}),
    ("--resume_from_checkpoint False", {"resume": "never"}),
    ("--resume_from_checkpoint runs/x/checkpoints/step-3", {"resume": "runs/x/checkpoints/step-3"}),
    ("--dataloader_num_workers 3", {"num_workers": 3}),
    ("--config_name resnet34", {"encoder": "resnet34"}),
    ("-a resnet18 -j 2 -b 32 --wd=1e-3 --optim lars", {"encoder": "resnet18", "num_workers": 2, "batch_size": 32}),
    ("--logging_steps 5 --train_val_split 0.2", {"log_every": 5, "validation_fraction": 0.2}),
    ("--base_learning_rate 0.1", {"learning_rate_per_256": 0.1}),
    ("--mean 0.1 0.2 0.3 --scale 0.2 1", {"image_mean": (0.1, 0.2, 0.3), "crop_scale": (0.2, 1.0)}),
    ("--model_name_or_path runs/x --arch resnet18", {"init_from": "runs/x", "encoder": "resnet18"}),
    ("--hub-private-repo", {"hub_private_repo": True, "push_to_hub": None}),
    ("--push_to_hub --hub_model_id me/x", {"push_to_hub": "me/x"}),
    ("--push_to_hub me/x", {"push_to_hub": "me/x"}),
    ("--push_to_hub me/x --hub_model_id me/x", {"push_to_hub": "me/x"}),
    ("--push_to_hub false", {"push_to_hub": None}),
]


@pytest.mark.parametrize(("words", "expected"), SAME, ids=lambda value: str(value)[:60])
def test_names_of_other_scripts_are_accepted(words, expected):
    config = parse(*words.split())
    assert {name: getattr(config, name) for name in expected} == expected


def test_names_of_other_scripts_are_accepted_in_a_file_and_a_flag_overrides_them(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "dataset-name: digits\nnum_train_epochs: 20\nlogging_steps: 7\npush_to_hub: true\nhub_model_id: me/x\n"
    )
    config = parse("--config", path, "--epochs", 30)
    assert (config.dataset, config.epochs, config.log_every, config.push_to_hub) == ("digits", 30, 7, "me/x")
    path.write_text("num_train_epochs: 20\nepochs: 30\n")
    with pytest.raises(ConfigurationError, match="--num_train_epochs and --epochs are the same setting: give one"):
        parse("--config", path)
    path.write_text("fp16: true\nper_device_train_batch_size: 32\n")
    with pytest.raises(ConfigurationError, match=r"^--fp16 True: type accelerate.*--batch_size 32 --device_batch_size"):
        parse("--config", path)


def test_the_evaluations_accept_the_names_of_their_settings():
    given = ["--encoder", "runs/x", "--dataset_name", "digits"]
    assert parse(*given, "-j", 3, kind=KnnConfig).num_workers == 3
    assert parse("--model_name_or_path", "runs/x", *given[2:], kind=KnnConfig).encoder == "runs/x"
    assert parse(*given, "--base_learning_rate", 0.5, kind=LinearProbeConfig).learning_rates == (0.5,)
    assert parse(*given, "--wd", 0.5, kind=FinetuneConfig).weight_decay == 0.5
    with pytest.raises(ConfigurationError, match="unknown flag --wd"):
        parse(*given, "--wd", 0.5, kind=KnnConfig)


def test_own_options_of_a_script_have_other_names_and_win_over_them():
    parser = OneLineParser()
    parser.add_argument("--repo_id", required=True)
    parser.add_argument("--private", action="store_true")
    given = parser.parse_args(["--hub_model_id", "me/x", "--hub-private-repo"])
    assert (given.repo_id, given.private) == ("me/x", True)
    options = OneLineParser(add_help=False)
    options.add_argument("--output", metavar="FILE")
    config, own = parse_command_line("", ["--output", "a.png"], options)
    assert (config.output_dir, own.output) == ("runs/digits", "a.png")


EIGHT = {"WORLD_SIZE": "8"}
DIFFERENT = [  # environment, what others type, what the message says
    (EIGHT, "--per_device_train_batch_size 32", "on 8 processes type --batch_size 256 --device_batch_size 32"),
    ({}, "--train_batch_size=32", "on 1 process type --batch_size 32 --device_batch_size 32"),
    (EIGHT, "--gradient_accumulation_steps 4", "on 8 processes type --batch_size 2048 --device_batch_size 64"),
    (
        EIGHT,
        "--per-device-train-batch-size 32 --gradient_accumulation_steps 4",
        "--per-device-train-batch-size 32, --gradient_accumulation_steps 4: .*--batch_size 1024 --device_batch_size 32",
    ),
    ({}, "--learning_rate 0.1 --batch_size 1024", "for a batch of 1024 type --learning_rate_per_256 0.025"),
    (EIGHT, "--lr 0.1 --per_device_train_batch_size 128", "for a batch of 1024 type --learning_rate_per_256 0.025"),
    ({}, "--lr fast", "--lr fast: a positive number is needed"),
    ({}, "--lr", "--lr: a positive number is needed"),
    ({}, "--lr inf", "--lr inf: a positive number is needed"),
    ({}, "--lr -.5", "--lr -.5: a positive number is needed"),
    ({}, "--warmup_ratio nan", "--warmup_ratio nan: a positive number is needed"),
    ({}, "--train_batch_size 0", "--train_batch_size 0: a positive whole number is needed"),
    ({}, "--train_batch_size -2", "--train_batch_size -2: a positive whole number is needed"),
    ({}, "--save_steps 1.5", "--save_steps 1.5: a positive whole number is needed"),
    ({}, "--save_steps 0.1", "--save_steps 0.1: type --checkpoint_every 4epochs$"),
    ({}, "--save_total_limit 0", "--save_total_limit 0: type --keep 1 1, which keeps all$"),
    ({}, "--warmup_ratio 0.0", "--warmup_ratio 0.0: type --warmup_epochs 0$"),
    ({}, "--warmup_steps 0", "--warmup_steps 0: type --warmup_epochs 0$"),
    ({}, "--checkpointing_steps epoch", "type --checkpoint_every 1epoch"),
    ({}, "--warmup_ratio 0.1 --epochs 50", "type --warmup_epochs 5$"),
    ({}, "--fp16 false --max_grad_norm None", "^--fp16 false, --max_grad_norm None: leave it out$"),
    ({}, "--fp16", "type accelerate launch --mixed_precision fp16 scripts/pretrain.py"),
    ({}, "--bf16 true", "type accelerate launch --mixed_precision bf16 scripts/pretrain.py"),
    ({}, "--mixed_precision bf16", "type accelerate launch --mixed_precision bf16 scripts/pretrain.py"),
    ({}, "--num_processes 2", "type accelerate launch --num_processes 2 scripts/pretrain.py"),
    ({}, "--no_cuda", "accelerate_configs/cpu.yaml"),
    ({}, "--local_rank 0", "type accelerate launch"),
    ({}, "--save_total_limit 2", "type --keep 2 0"),
    ({}, "--save_steps 500", "type --checkpoint_every 500steps"),
    ({}, "--save_strategy epoch", "type --checkpoint_every 500steps, 1epoch or never"),
    ({}, "--do_train --overwrite_output_dir", "--do_train: leave it out .*; --overwrite_output_dir: leave it out"),
    ({}, "--lr_scheduler_type cosine", "leave it out"),
    ({}, "--optim adamw_torch", "--optimizer adamw_torch: unknown; one of sgd, lars"),
    ({}, "--torch_compile", "type accelerate launch --dynamo_backend inductor scripts/pretrain.py"),
    ({}, "--num_train_epochs 3 --epochs 3", "--num_train_epochs and --epochs are the same setting: give one of them"),
    ({}, "--dataset_name imagefolder --data_dir x", "--dataset_name and --data_dir are the same setting"),
    ({}, "--fp16 --nonsense", "^unknown flag --nonsense; --help .*; --fp16: type accelerate"),
    ({}, "--num_train_epochs 5 --fp16", "^--fp16: type accelerate .*; --warmup_epochs 13 must be less than --epochs 5"),
    ({}, "--epochs 5 --warmup_ratio 0.1 --lr 1 --batch_size 128", "type --warmup_epochs 0.5; .* batch of 128 type"),
    ({}, "--epochs x --batch_size y", "--epochs x: a whole number is needed; --batch_size y: a whole number is needed"),
    ({}, "--epochs -1 --weight_decay -3", "--epochs -1 is out of range: .*; --weight_decay -3 is out of range"),
    ({}, "--push_to_hub", "--push_to_hub needs a repository: type --push_to_hub USER/NAME"),
    ({}, "--hub_model_id me/x", "type --push_to_hub me/x"),
    ({}, "--push_to_hub me/y --hub_model_id me/x", "--push_to_hub me/y and --hub_model_id me/x differ"),
]


@pytest.mark.parametrize(("environment", "words", "message"), DIFFERENT, ids=lambda value: str(value)[:60])
def test_names_of_another_meaning_are_answered_by_what_to_type(monkeypatch, environment, words, message):
    monkeypatch.setattr("sys.argv", ["scripts/pretrain.py"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=message) as caught:
        parse(*words.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for names, _, _ in ADVICE for name in names.split()])
def test_every_advice_can_be_printed(name):
    for value in ([], ["2"], ["word"]):
        with pytest.raises(ConfigurationError, match=f"--{name}.*: |unknown flag --{name}"):
            parse(f"--{name}", *value)

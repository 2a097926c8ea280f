import pytest

from m2t_accel.config import pretrain
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import RECIPES, build_config
from m2t_accel.run.output_dir import check_output_dir

# --- the table. Source: arXiv 2101.07525; name, batch, per device, optimizer, rate, decay, epochs, top-1, hours

PUBLISHED = [
    ("8xV100-b1024-100ep", 1024, 128, "sgd", 0.05, 1e-4, 100, 70.7, 1.8 * 24),
    ("8xV100-b1024-200ep", 1024, 128, "sgd", 0.05, 1e-4, 200, 72.7, 3.6 * 24),
    ("8xV100-b1024-300ep", 1024, 128, "sgd", 0.05, 1e-4, 300, 73.8, 5.5 * 24),
    ("8x2080Ti-b256-100ep", 256, 32, "sgd", 0.05, 1e-4, 100, 70.4, 2.5 * 24),
    ("8x2080Ti-b256-200ep", 256, 32, "sgd", 0.05, 1e-4, 200, 72.3, 5 * 24),
    ("8x2080Ti-b256-300ep", 256, 32, "sgd", 0.05, 1e-4, 300, 72.9, 7.5 * 24),
    ("32xV100-b4096-100ep", 4096, 128, "lars", 0.45, 1e-6, 100, 70.3, 11),
    ("32xV100-b4096-200ep", 4096, 128, "lars", 0.45, 1e-6, 200, 72.5, 22),
    ("32xV100-b4096-300ep", 4096, 128, "lars", 0.3, 1e-6, 300, 73.7, 33),
    ("128x2080Ti-b4096-100ep", 4096, 32, "lars", 0.45, 1e-6, 100, 69.0, 5),
    ("128x2080Ti-b4096-200ep", 4096, 32, "lars", 0.45, 1e-6, 200, 71.5, 10),
    ("128x2080Ti-b4096-300ep", 4096, 32, "lars", 0.3, 1e-6, 300, 72.3, 15),
]


def test_these_are_all_recipes():
    assert list(RECIPES) == [row[0] for row in PUBLISHED] + ["digits", "cifar10"]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_published_recipes(row):
    name, batch, per_device, optimizer, rate, decay, epochs, top1, hours = row
    config = build_config({"recipe": name, "dataset": "digits"})
    assert (config.batch_size, config.device_batch_size, config.optimizer) == (batch, per_device, optimizer)
    assert (config.learning_rate_per_256, config.weight_decay, config.epochs) == (rate, decay, epochs)
    assert config.learning_rate == pytest.approx(rate * batch / 256)
    assert config.num_virtual_devices == int(name.split("x")[0])
    assert (RECIPES[name].top1, RECIPES[name].hours) == (top1, pytest.approx(hours))
    assert (config.encoder, config.image_size, config.weight_momentum, config.warmup_epochs) == (
        "resnet50",
        224,
        0.99,
        10,
    )
    assert (config.hidden_size, config.projection_size, config.optimizer_momentum) == (4096, 256, 0.9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "/no/such/folder"}, "--dataset /no/such/folder: no such file or folder; give `digits`"),
        ({"dataset": "imagenet"}, "--dataset imagenet: no such file or folder"),
        ({"dataset": "x" * 300}, "no such file or folder"),
        ({"encoder": "resnet51"}, "--encoder resnet51: unknown, did you mean resnet50?; give one of resnet18"),
        ({"encoder": "x" * 300}, "unknown; give one of"),
    ],
)
def test_inputs_that_are_not_there(settings, message):
    with pytest.raises(ConfigurationError) as caught:
        pretrain.check_inputs(build_config({"recipe": "digits", **settings}))
    assert message in str(caught.value)


def test_a_tracker_that_is_not_installed(monkeypatch):
    config = build_config({"tracker": "tensorboard"})
    pretrain.check_inputs(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"tensorboard is not installed: type `pip install tensorboard`"):
        pretrain.check_inputs(config)


def test_where_a_run_is_published(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    pretrain.check_inputs(build_config({"push_to_hub": "me/digits"}))
    with pytest.raises(ConfigurationError, match="--push_to_hub digits: a name on the Hub is needed, USER/NAME"):
        pretrain.check_inputs(build_config({"push_to_hub": "digits"}))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigurationError, match="--push_to_hub me/digits needs a login: type `hf auth login`"):
        pretrain.check_inputs(build_config({"push_to_hub": "me/digits"}))


def config_in(folder, **settings):
    return build_config({"output_dir": str(folder), **settings})


def test_an_output_folder_that_cannot_be(tmp_path):
    check_output_dir(config_in(tmp_path / "new" / "deep"))
    (tmp_path / "notes.txt").write_text("not of a run")
    check_output_dir(config_in(tmp_path))
    with pytest.raises(ConfigurationError, match=r"cannot be written: .*notes\.txt takes no files"):
        check_output_dir(config_in(tmp_path / "notes.txt" / "run"))
    with pytest.raises(ConfigurationError, match="cannot be written"):
        check_output_dir(config_in("/proc/run"))
    with pytest.raises(ConfigurationError, match="longer than 255 bytes"):
        check_output_dir(config_in(tmp_path / ("x" * 300)))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_output_folder_that_holds_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text("# a header\n" + config_in(tmp_path, evaluate_every=8).to_yaml())
    check_output_dir(config_in(tmp_path))  # the same run, which goes on
    free = {"num_workers": 0, "log_every": 3, "keep": (9, 2), "checkpoint_every": ("1epoch",)}
    check_output_dir(config_in(tmp_path, **free))
    with pytest.raises(
        ConfigurationError, match=r"holds another run \(config\.yaml\): .* go on with it by --resume auto"
    ):
        check_output_dir(config_in(tmp_path, resume="never"))
    with pytest.raises(
        ConfigurationError,
        match=r"\(encoder resnet10-quarter there, resnet18 here; blur_sigma 0\.1 2\.0 there, 0\.1 1\.0 here\)",
    ):
        check_output_dir(config_in(tmp_path, encoder="resnet18", blur_sigma=(0.1, 1.0)))
    with pytest.raises(ConfigurationError, match=r"epochs 80 there, 90 here.*name the checkpoint: --resume .*/step-N"):
        check_output_dir(config_in(tmp_path, epochs=90))
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    named = str(tmp_path / "checkpoints" / "step-3")
    check_output_dir(config_in(tmp_path, epochs=90, resume=named))
    with pytest.raises(ConfigurationError, match="epochs 80 there, 70 here"):
        check_output_dir(config_in(tmp_path, epochs=70, resume=named))
    with pytest.raises(ConfigurationError, match=r"--resume .*step-4: no such folder; give auto, never, or"):
        check_output_dir(config_in(tmp_path, resume=str(tmp_path / "step-4")))
    for content in ("", "a list: [", "- a", "\0"):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(ConfigurationError, match=r"holds a config\.yaml that is not a run's"):
            check_output_dir(config_in(tmp_path))
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigurationError, match=r"holds another run \(checkpoints\): give another folder, or remove"):
        check_output_dir(config_in(tmp_path))


@pytest.mark.parametrize(
    ("words", "triggers"),
    [
        (("500steps",), {"step": 500}),
        (("1step",), {"step": 1}),
        (("0.5epoch", "15min"), {"epoch": 0.5, "minute": 15}),
        (("90minutes",), {"minute": 90}),
        (("never",), {}),
    ],
)
def test_when_to_save(words, triggers):
    assert build_config({"checkpoint_every": words}).saves_every == triggers


@pytest.mark.parametrize(
    "words", [("5",), ("0steps",), ("1.5steps",), ("-3steps",), ("1h",), ("3steps", "4steps"), ("never", "1min")]
)
def test_when_to_save_in_words_that_are_none(words):
    with pytest.raises(
        ConfigurationError, match=r"--checkpoint_every .*: a number of steps, epochs or minutes is needed"
    ):
        build_config({"checkpoint_every": words})


def test_at_least_one_checkpoint_is_kept():
    with pytest.raises(ConfigurationError, match="--keep 0 5: at least the last one must be kept"):
        build_config({"keep": (0, 5)})

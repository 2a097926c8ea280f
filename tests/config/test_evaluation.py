import pytest

from m2t_accel.config import evaluation
from m2t_accel.config.command_line import parse_settings
from m2t_accel.config.evaluation import PROTOCOLS, LinearProbeConfig, build_knn, build_linear_probe
from m2t_accel.config.fields import ConfigurationError

GIVEN = {"encoder": "someone/encoder", "dataset": "/data/imagenet"}


def parse(*arguments):
    return parse_settings(
        "test", "", LinearProbeConfig, build_linear_probe, "protocol", evaluation.protocol_table, arguments=arguments
    )[0]


# Source: arXiv 2101.07525 and its published code.
@pytest.mark.parametrize(
    ("name", "rate", "epochs", "schedule"), [("byol", 0.2, 80, "cosine"), ("moco", 30.0, 100, "steps")]
)
def test_the_published_protocols(name, rate, epochs, schedule):
    config = build_linear_probe({**GIVEN, "protocol": name})
    assert (config.learning_rates, config.epochs, config.schedule) == ((rate,), epochs, schedule)
    assert (config.batch_size, config.crop_scale, config.flip_probability) == (256, (0.08, 1.0), 0.5)
    assert config.features == "augmented"


def test_knn_defaults_are_the_usual():
    config = build_knn(GIVEN)
    assert (config.k, config.temperature) == ((20, 200), 0.07)
    assert config.image_size is None, "the encoder's"


def test_the_protocol_goes_by_the_dataset_unless_it_is_named():
    assert build_linear_probe(GIVEN).protocol == "byol"
    assert build_linear_probe({**GIVEN, "dataset": "digits"}).protocol == "digits"
    assert build_linear_probe({**GIVEN, "dataset": "digits", "protocol": "moco"}).learning_rates == (30.0,)


@pytest.mark.parametrize("text", [["0.1,1,10"], ["0.1", "1", "10"], ["0.1,", "1,10"]])
def test_several_learning_rates(text):
    if text == ["0.1,", "1,10"]:
        with pytest.raises(ConfigurationError, match="--learning_rates : a number is needed"):
            parse("--encoder", "a/b", "--dataset", "digits", "--learning_rates", *text)
    else:
        config = parse("--encoder", "a/b", "--dataset", "digits", "--learning_rates", *text)
        assert config.learning_rates == (0.1, 1.0, 10.0)


def test_a_configuration_reads_back_as_itself(tmp_path):
    config = parse("--encoder", "a/b", "--dataset", "digits", "--learning_rates", "0.1,0.3", "--image_size", "64")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse("--config", str(tmp_path / "config.yaml")) == config


def test_the_list(capsys):
    with pytest.raises(SystemExit):
        parse("--protocol", "list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["protocol", *PROTOCOLS]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "digits"}, "--encoder is needed: the folder of a run such as runs/digits"),
        ({"encoder": "a/b"}, "--dataset is needed"),
        ({**GIVEN, "protocol": "mocov3"}, "--protocol mocov3: unknown, did you mean moco?; one of byol, moco, digits"),
        ({**GIVEN, "features": "cache"}, "--features cache: unknown, did you mean cached?"),
        ({**GIVEN, "learning_rates": []}, "--learning_rates is empty"),
        ({**GIVEN, "learning_rates": [0.1, 0]}, "--learning_rates 0 is out of range: more than 0 is allowed"),
        ({**GIVEN, "k": [20]}, "unknown setting k"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(ConfigurationError) as caught:
        build_linear_probe(given)
    assert message in str(caught.value)


def test_where_a_result_goes(tmp_path):
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    for encoder in (tmp_path / "run", tmp_path / "run" / "encoder"):
        assert build_knn({**GIVEN, "encoder": str(encoder)}).output_dir == str(tmp_path / "run" / "knn")
    assert build_linear_probe(GIVEN).output_dir == "runs/encoder/linear_probe"
    assert build_knn({**GIVEN, "random_weights": True}).output_dir == "runs/encoder/knn_random_weights"
    assert build_knn({**GIVEN, "output_dir": "mine"}).output_dir == "mine"
    (tmp_path / "resnet.pth").write_bytes(b"")
    assert build_knn({**GIVEN, "encoder": str(tmp_path / "resnet.pth")}).output_dir == "runs/resnet/knn"


def test_a_result_is_published_with_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    given = {**GIVEN, "encoder": str(tmp_path / "run"), "push_to_hub": "me/digits"}
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"a run is published with its results, but .*run is none"):
        evaluation.check_publishing(build_linear_probe(given))
    (tmp_path / "run" / "training.json").write_text("{}")
    evaluation.check_publishing(build_linear_probe(given))
    evaluation.check_publishing(evaluation.build_finetune(given))
    with pytest.raises(ConfigurationError, match="--output_dir is not directly in its folder"):
        evaluation.check_publishing(build_linear_probe({**given, "output_dir": str(tmp_path / "elsewhere")}))
    with pytest.raises(ConfigurationError, match="--push_to_hub digits: a name on the Hub is needed"):
        evaluation.check_publishing(build_linear_probe({**given, "push_to_hub": "digits"}))
    evaluation.check_publishing(build_linear_probe(GIVEN))


def test_an_encoder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation.check_encoder("a/b")
    with pytest.raises(ConfigurationError, match="--encoder runs/digits/encoder: no such file or folder"):
        evaluation.check_encoder("runs/digits/encoder")
    with pytest.raises(ConfigurationError, match="--encoder runs/digits: no such file or folder"):
        evaluation.check_encoder("runs/digits")

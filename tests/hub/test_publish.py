"""Publishing to a Hub on the loopback, mostly in the test's process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny, write_image
from huggingface_hub import ModelCard, constants
from loopback_hub import TOKEN, loopback_hub
from PIL import Image
from safetensors.torch import load_file, save_file

import m2t_accel
from m2t_accel.config.data import ImageSettings
from m2t_accel.config.evaluation import build_knn
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.evaluation.knn import evaluate_knn
from m2t_accel.hub import publish as module
from m2t_accel.hub.encoders import LoadedEncoder, load_encoder
from m2t_accel.hub.folder import image_processor
from m2t_accel.hub.publish import publish
from m2t_accel.hub.tensor_names import to_torchvision
from m2t_accel.model import create_encoder, embed
from m2t_accel.run import completion

# huggingface_hub uses httpx in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


@pytest.fixture(scope="module")
def evaluated_run(trained_run, tmp_path_factory):
    """Return a run with two kNN results, one of them with random weights."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained_run, folder)
    for random_weights in (False, True):
        given = {"encoder": str(folder), "dataset": "digits", "num_workers": 0, "random_weights": random_weights}
        evaluate_knn(build_knn(given))
    return folder


@pytest.fixture
def run(evaluated_run, tmp_path):
    return shutil.copytree(evaluated_run, tmp_path / "run")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Start a Hub, and let huggingface_hub use it in this process."""
    (tmp_path / "hub").mkdir()
    with loopback_hub(tmp_path / "hub") as server:
        point_to(server.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def point_to(url, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def no_clean_process(monkeypatch):
    """Skip the check in a clean process, which takes seconds."""
    monkeypatch.setattr(module, "check_in_clean_process", lambda *arguments: None)


@pytest.fixture
def loading_script_in_this_process(monkeypatch):
    """Run the script of the clean process here, which saves its imports. A slow test publishes from a real one."""

    def run(words, **options):
        script, *arguments = words[words.index("-c") + 1 :]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["-c", *arguments])
            patch.setitem(sys.modules, "m2t_accel", sys.modules["m2t_accel"])  # restored: the script blocks its import
            exec(compile(script, "LOADING_SCRIPT", "exec"), {})
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_published_encoder_computes_the_same_and_nothing_private_is_published(
    run, hub, trained_run, loading_script_in_this_process, capfd
):
    (run / "mine.txt").write_text("not to be published")
    url = publish(run, "me/digits", private=True)
    assert url.startswith(f"{hub.url}/me/digits/commit/")
    assert hub.private is True
    assert len(hub.commits) == 1
    published = contents(hub.folder / "me" / "digits")
    assert set(published) == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "torchvision.safetensors"),
        *(
            "metrics.jsonl",
            "curves.png",
            "report.html",
            "config.yaml",
            "results/knn.json",
            "results/knn_random_weights.json",
        ),
    }
    for secret in (TOKEN, str(trained_run.parent), str(run.parent), os.path.expanduser("~")):
        assert not [name for name, content in published.items() if secret.encode() in content]
    assert not [name for name, content in contents(run).items() if TOKEN.encode() in content]
    assert TOKEN not in "".join(capfd.readouterr())
    weights = load_file(run / "encoder" / "model.safetensors")
    renamed = load_file(hub.folder / "me" / "digits" / "torchvision.safetensors")
    assert all(torch.equal(renamed[name], tensor) for name, tensor in to_torchvision(weights).items())
    card = published["README.md"].decode()
    assert len(ModelCard(card).data.eval_results) == 2
    for words in ("[report.html](report.html)", "| embeddings at the end | spread (1 even, 0 collapse) 0."):
        assert words in card
    page = published["report.html"].decode()
    body = page[page.index("<body") : page.index('<script id="charts"')]
    assert "<h1>me/digits</h1>" in body
    assert "top1_k20" in body
    assert "<img" not in body, "the images may not be public"

    loaded, expected = load_encoder("me/digits"), load_encoder(str(run))
    assert (loaded.image_size, loaded.network) == (expected.image_size, "teacher")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(embed(loaded.model, images), embed(expected.model, images))


@pytest.mark.parametrize(
    ("folders", "shown"),
    [
        (
            {"secret/train/secret a": 9, "secret/train/secret, b": 9, "secret/val/secret a": 4, "secret/train/c": 2},
            "pictures: 20 images of 3 classes; evaluation on 4 others",
        ),
        ({"secret a": 9, "b/secret deep": 9}, "pictures: 18 images"),
    ],
    ids=["classes", "no classes"],
)
def test_no_name_of_a_folder_or_file_of_the_images_is_published(tmp_path, monkeypatch, folders, shown):
    pictures, titles = tmp_path / "secret" / "pictures", []
    for folder, number in folders.items():
        for i in range(number):
            write_image(pictures / folder / f"secret {i}.png", value=10 * i)
    (pictures / folder / "secret 0.png").write_bytes(b"broken")
    settings = {"batch_size": 8, "device_batch_size": 8, "encoder": "resnet10-quarter"}
    draw = completion.draw_curves
    monkeypatch.setattr(completion, "draw_curves", lambda *paths, title: (titles.append(title), draw(*paths, title)))
    m2t_accel.pretrain(build_config(tiny(tmp_path / "run", dataset=str(pictures), **settings)))
    assert "secret" in (tmp_path / "run" / "bad_images.jsonl").read_text()
    card = module.gather(tmp_path / "run", tmp_path / "staged", "me/x")
    published = contents(tmp_path / "staged") | {"title": titles[0].encode(), "card": card.encode()}
    assert [name for name, content in published.items() if b"secret" in content] == []
    assert f"| data | {shown} |" in card
    assert f">{shown}<" in published["report.html"].decode()


def test_nothing_is_published_in_a_public_repository_that_should_be_private(run, hub, no_clean_process):
    publish(run, "me/digits")
    with pytest.raises(ConfigurationError, match=r"me/digits exists and is public, .*--hub_private_repo"):
        publish(run, "me/digits", private=True)
    assert len(hub.commits) == 1


def test_a_second_push_updates_the_figures_and_keeps_the_users_words(run, hub, no_clean_process):
    card = hub.folder / "me" / "digits" / "README.md"
    publish(run, "me/digits")
    publish(run, "me/digits", revision="v1")
    assert (hub.folder / "me" / "digits@v1" / "model.safetensors").is_file()
    edited = card.read_text().replace("## Limits", "## Thanks\n\nTo my mother.\n\n## Limits")
    card.write_text(edited.replace("library_name", "license: mit\nlibrary_name"))
    result = json.loads((run / "knn" / "result.json").read_text())
    result["figures"] = {"top1_k20": 0.123}
    (run / "knn" / "result.json").write_text(json.dumps(result))
    publish(run, "me/digits")
    for words in ("To my mother.", "license: mit", "**12.30 %**", "value: 0.123"):
        assert words in card.read_text()
    assert len(hub.commits) == 3, "one commit for each push"


def test_a_push_of_other_weights_removes_the_files_of_the_earlier_ones(run, hub, no_clean_process):
    publish(run, "me/digits")
    there = hub.folder / "me" / "digits"
    for name in ("torchvision.safetensors", "results/finetuning.json", "results/theirs.json", "theirs.bin"):
        (there / name).write_text("{}")
    shutil.rmtree(run / "knn")
    (run / "curves.png").unlink()
    publish(run, "me/digits")
    names = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert {"results/knn_random_weights.json", "results/theirs.json", "theirs.bin", "model.safetensors"} <= names
    assert names.isdisjoint({"results/knn.json", "results/finetuning.json", "curves.png", "report.html"})
    assert len(hub.commits) == 2, "one commit for each push"


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ({"repo_id": "somebody-else/digits"}, ["403", "--repo_id somebody-else/digits"]),
        ({"token": "hf_x"}, ["401"]),
        ({"url": "http://127.0.0.1:9", "private": True, "revision": "v2"}, ["Connect", "--private --revision v2"]),
        ({"fails": ("/upload/", 422)}, ["422"]),  # after some requests; a status of 500 would be tried again for 60 s
    ],
    ids=["no rights", "wrong token", "no network", "failed upload"],
)
def test_a_failed_push_leaves_the_run_as_it_was(run, hub, no_clean_process, monkeypatch, problem, words):
    before = contents(run)
    monkeypatch.setenv("HF_TOKEN", problem.get("token", TOKEN))
    point_to(problem.get("url", hub.url), monkeypatch)
    hub.fails = problem.get("fails", hub.fails)
    message = refused(run, problem.get("repo_id", "me/digits"), problem.get("private", False), problem.get("revision"))
    for word in (*words, "the Hub did not take", f"everything is in {run}", "python scripts/push_to_hub.py --run"):
        assert word in message
    assert os.environ["HF_TOKEN"] not in message
    assert hub.commits == []
    assert contents(run) == before


@pytest.mark.slow
def test_training_and_a_linear_probe_end_with_a_push(run_script, tmp_path):
    (tmp_path / "hub").mkdir()
    with loopback_hub(tmp_path / "hub") as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        environment["HF_HOME"] = str(tmp_path / "home")
        push = ["--push_to_hub", "--hub_model_id", "me/digits"]
        flags = [part for name, value in tiny(tmp_path / "run").items() for part in (f"--{name}", value)]
        done = run_script("scripts/pretrain.py", *flags, *push, "--hub_private_repo", environment=environment)
        assert done.returncode == 0, done.stderr
        assert hub.private is True
        assert done.stdout.splitlines()[-1].startswith(f"Published: {hub.url}/me/digits/commit/")
        assert TOKEN not in done.stdout + done.stderr
        assert len(hub.commits) == 1
        assert (hub.folder / "me" / "digits" / "model.safetensors").is_file()
        flags = ["--encoder", tmp_path / "run", "--dataset", "digits", "--max_images", 320]
        flags += ["--epochs", 1, "--num_workers", 0]
        done = run_script("scripts/linear_probe.py", *flags, "--push_to_hub", "me/digits", environment=environment)
        assert done.returncode == 0, done.stderr
    assert (hub.folder / "me" / "digits" / "results" / "linear_probe.json").is_file()
    assert "| linear probe | digits, 360 images |" in (hub.folder / "me" / "digits" / "README.md").read_text()


def refused(run, repo_id="me/digits", *others):
    with pytest.raises(ConfigurationError) as caught:
        publish(run, repo_id, *others)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "type"), [("My Photos", "My-Photos"), ("Bücher", "B-cher"), ("写真", "dataset")])
def test_any_folder_of_images_gives_a_card_that_the_hub_takes(run, hub, no_clean_process, name, type):
    training = json.loads((run / "training.json").read_text())
    (run / "training.json").write_text(json.dumps({**training, "dataset": name}))
    shutil.rmtree(run / "knn")  # leaves the accuracy while training, on this dataset
    publish(run, "me/digits")
    (found,) = ModelCard((hub.folder / "me/digits/README.md").read_text()).data.eval_results
    assert (found.dataset_type, found.dataset_name) == (type, name)


@pytest.fixture
def logged_in(monkeypatch):
    """Provide a token, and fail if it is used."""
    monkeypatch.setattr(module, "get_token", lambda: TOKEN)
    monkeypatch.setattr(module, "send", lambda *arguments: pytest.fail("the Hub was asked"))


def test_a_push_needs_a_login(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "get_token", lambda: None)
    assert "hf auth login" in refused(tmp_path)


@pytest.mark.parametrize(
    "repo_id", ["digits", "a/b/c", "../x", "me/", "me/x y", "me/Bücher", "https://huggingface.co/me/x"]
)
def test_a_name_without_a_user_is_refused(tmp_path, logged_in, repo_id):
    message = refused(tmp_path, repo_id)
    assert f"--repo_id {repo_id}:" in message
    assert "USER/NAME" in message


@pytest.mark.parametrize("name", ["config.yaml", "training.json", "encoder/model.safetensors"])
def test_an_incomplete_run_is_refused(run, logged_in, name):
    (run / name).unlink()
    assert f"there is no {name}; give the folder of a run that has ended" in refused(run)


def test_a_run_of_a_module_of_ones_own_is_not_published(run, logged_in):
    (run / "encoder" / "config.json").unlink()
    assert "there is no encoder/config.json; the run trained a module of your own" in refused(run)


def test_a_changed_config_yaml_is_refused(run, logged_in):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("seed: 0", "seed: 3"))
    assert "its config.yaml has been changed since the run ended (seed): remove" in refused(run)


def test_a_run_that_ends_with_a_push_can_be_published(run, tmp_path):
    """training.json holds --push_to_hub, and config.yaml does not."""
    training = json.loads((run / "training.json").read_text())
    training["config"]["push_to_hub"] = "me/digits"
    (run / "training.json").write_text(json.dumps(training))
    assert "# Momentum" in module.gather(run, tmp_path / "staged", "me/digits")


def test_changed_or_damaged_weights_are_refused(run, logged_in):
    weights = run / "encoder" / "model.safetensors"
    state = load_file(weights)
    name = "embedder.embedder.convolution.weight"
    save_file(state | {name: state[name] + 1e-3}, weights, metadata={"format": "pt"})
    assert "knn/result.json was measured with other weights" in refused(run)
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "cannot be loaded" in refused(run)


@pytest.mark.parametrize("script", ["import m2t_accel_of_nobody", ""])
def test_an_encoder_that_a_clean_process_cannot_load_is_refused(run, logged_in, monkeypatch, script):
    monkeypatch.setattr(module, "LOADING_SCRIPT", script)
    assert "a clean process cannot load the encoder" in refused(run)


def test_a_clean_process_has_the_packages_of_the_user_but_not_m2t_accel(run, logged_in, tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "of_the_user.py").touch()
    folders = [str(tmp_path / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))  # an empty entry would be the working directory
    start = module.LOADING_SCRIPT.partition("import numpy")[0]
    script = f"{start}import of_the_user, os\nassert not {{'', os.getcwd()}} & {{*sys.path}}\nimport m2t_accel"
    monkeypatch.setattr(module, "LOADING_SCRIPT", script)
    assert "(ModuleNotFoundError: import of m2t_accel halted; None in sys.modules)" in refused(run)


def test_other_pixels_or_features_are_refused():
    encoder = LoadedEncoder(create_encoder("resnet10-quarter").eval(), 16, 0.8, (0.5,) * 3, (0.2,) * 3, "teacher", "")
    images = np.random.default_rng(0).integers(0, 256, (3, 60, 80, 3), np.uint8)
    config = ImageSettings(
        dataset="none", image_size=16, evaluation_crop=0.8, image_mean=(0.5,) * 3, image_std=(0.2,) * 3
    )
    pixels = image_processor(config)([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        features = embed(encoder.model, pixels).numpy()
    pixels, run = pixels.numpy(), Path("runs/x")
    module.check_outputs(run, encoder, images, pixels, features)
    for other in (1.001 * features, features[:2]):
        with pytest.raises(ConfigurationError, match=r"--run runs/x: the features .* differ"):
            module.check_outputs(run, encoder, images, pixels, other)
    with pytest.raises(ConfigurationError, match=r"--run runs/x: its image processor"):
        module.check_outputs(run, encoder, images, -pixels, features)


@pytest.mark.parametrize("name", ["metrics.jsonl", "knn/result.json"])
def test_links_out_of_the_run_are_not_followed(run, logged_in, tmp_path, name):
    (tmp_path / "private.json").write_text(json.dumps({"evaluation": "knn", "figures": {}, "protocol": {}}))
    (run / name).unlink()
    (run / name).symlink_to(tmp_path / "private.json")
    assert f"{name} is a link out of the run" in refused(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("training.json", "{", "holds files that are not a run's"),
        ("config.yaml", "epochs: many", "holds files that are not a run's"),
        ("knn/result.json", "[]", "knn/result.json is no result of an evaluation"),
    ],
)
def test_files_of_another_kind_are_refused(run, logged_in, name, content, message):
    (run / name).write_text(content)
    assert message in refused(run)


def test_a_token_in_an_error_is_not_shown(monkeypatch):
    monkeypatch.setattr(module, "get_token", lambda: TOKEN)
    assert module.without_token(f"bad header Bearer {TOKEN}") == "bad header Bearer hf_…"

"""Publishing, to a Hub on the loopback; what asks it runs in processes of its own, whose environment names that Hub."""

import json
import os
import shutil

import pytest
import torch
from helpers import tiny
from loopback_hub import TOKEN, loopback_hub
from safetensors.torch import load_file, save_file

from m2t_accel.config.evaluation import build_knn
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.hub import publish
from m2t_accel.hub.tensor_names import to_torchvision
from m2t_accel.pretrain import pretrain

# Several pushes in one process, which saves the seconds of its start: lines of JSON in, results out.
PUSHES = """
import json, os, sys
from pathlib import Path
from m2t_accel.hub.publish import publish
from m2t_accel.config.fields import ConfigurationError
for line in sys.stdin:
    given = json.loads(line)
    os.environ["HF_TOKEN"] = given.pop("token", os.environ["HF_TOKEN"])
    try:
        print(json.dumps(publish(Path(given.pop("run")), **given)), flush=True)
    except ConfigurationError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""
LOADS = """
import sys
sys.modules["m2t_accel"] = None
from huggingface_hub import ModelCard
from transformers import AutoImageProcessor, AutoModel
size = AutoImageProcessor.from_pretrained("me/digits").size.shortest_edge
print(type(AutoModel.from_pretrained("me/digits")).__name__, size)
print(len(ModelCard.load("me/digits").data.eval_results))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a kNN result, its output folder with a telling name."""
    from m2t_accel.evaluation.knn import evaluate_knn

    folder = tmp_path_factory.mktemp("secret-folder") / "run"
    pretrain(build_config(tiny(folder)))
    evaluate_knn(build_knn({"encoder": str(folder), "dataset": "digits", "num_workers": 0}))
    evaluate_knn(build_knn({"encoder": str(folder), "dataset": "digits", "num_workers": 0, "random_weights": True}))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "hub").mkdir()
    with loopback_hub(tmp_path / "hub") as server:
        server.environment = {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }
        yield server


def pushed(run_script, hub, *pushes, environment=None, is_checked=True):
    """What each push says; nothing that the process prints has the token in it."""
    lines = "\n".join(json.dumps(push) for push in pushes)
    feed = f"import io, sys; sys.stdin = io.StringIO({lines!r})\n"
    if not is_checked:  # which takes five seconds
        feed += "from m2t_accel import publish as room; room.check_as_a_stranger = lambda *_: None\n"
    done = run_script("-c", feed + PUSHES, environment={**hub.environment, **(environment or {})})
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_from_a_run_to_the_hub_and_back(run, hub, run_script, tmp_path):
    there = hub.folder / "me" / "digits"
    (run / "mine.txt").write_text("not to be published")
    first = pushed(
        run_script,
        hub,
        {"run": str(run), "repo_id": "me/digits", "private": True},
        {"run": str(run), "repo_id": "me/digits", "revision": "v1"},
    )
    assert all(url.startswith(f"{hub.url}/me/digits/commit/") for url in first)
    assert hub.private is True
    assert len(hub.commits) == 2, "one commit each"
    files = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert files == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "torchvision.safetensors"),
        *("metrics.jsonl", "curves.png", "config.yaml", "results/knn.json", "results/knn_random_weights.json"),
    }
    assert (hub.folder / "me" / "digits@v1" / "model.safetensors").is_file()
    for path in there.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes()
            assert b"secret-folder" not in path.read_bytes(), path
            assert os.path.expanduser("~").encode() not in path.read_bytes(), path
    assert not any(TOKEN.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())
    weights = load_file(run / "encoder" / "model.safetensors")
    renamed = load_file(there / "torchvision.safetensors")
    assert all(torch.equal(renamed[name], tensor) for name, tensor in to_torchvision(weights).items())

    done = run_script("-c", LOADS, environment={**hub.environment, "HF_HOME": str(tmp_path / "other-home")})
    assert done.stdout.split("\n")[:2] == ["ResNetModel 32", "2"], done.stderr

    # Somebody writes into the card, and measures again.
    edited = (there / "README.md").read_text().replace("## Limits", "## Thanks\n\nTo my mother.\n\n## Limits")
    (there / "README.md").write_text(edited.replace("library_name", "license: mit\nlibrary_name"))
    result = json.loads((run / "knn" / "result.json").read_text())
    result["figures"] = {"top1_k20": 0.123}
    (run / "knn" / "result.json").write_text(json.dumps(result))
    pushed(run_script, hub, {"run": str(run), "repo_id": "me/digits"})
    card = (there / "README.md").read_text()
    assert "To my mother." in card
    assert "license: mit" in card
    assert "**12.30 %**" in card
    assert (run / "mine.txt").is_file()


@pytest.mark.slow
def test_a_hub_that_does_not_take_it(run, hub, run_script):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    push = {"run": str(run), "repo_id": "me/digits"}
    said = pushed(
        run_script, hub, {**push, "repo_id": "somebody-else/digits"}, {**push, "token": "hf_x"}, is_checked=False
    )
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    said += pushed(run_script, hub, {**push, "revision": "v2", "private": True}, environment=nowhere, is_checked=False)
    hub.fails = ("/upload/", 422)  # in the middle; 500 would be tried again for a minute
    said += pushed(run_script, hub, push, is_checked=False)
    expected = [
        ("403", "--repo_id somebody-else/digits"),
        ("401", "To try again: python scripts/push_to_hub.py --run"),
        ("Connect", "--private --revision v2"),
        ("422",),
    ]
    for one, words in zip(said, expected, strict=True):
        for word in (*words, "the Hub did not take", f"everything is in {run}"):
            assert word in one["error"], one
        assert "\n" not in one["error"]
    assert hub.commits == []
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_training_and_a_probe_end_with_a_push(hub, run_script, tmp_path):
    flags = [part for name, value in tiny(tmp_path / "run").items() for part in (f"--{name}", value)]
    done = run_script("scripts/pretrain.py", *flags, "--push_to_hub", "me/digits", environment=hub.environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"Published: {hub.url}/me/digits/commit/")
    assert len(hub.commits) == 1
    assert (hub.folder / "me" / "digits" / "model.safetensors").is_file()
    flags = ["--encoder", tmp_path / "run", "--dataset", "digits", "--epochs", 1, "--num_workers", 0]
    done = run_script("scripts/linear_probe.py", *flags, "--push_to_hub", "me/digits", environment=hub.environment)
    assert done.returncode == 0, done.stderr
    assert (hub.folder / "me" / "digits" / "results" / "linear_probe.json").is_file()
    assert "| linear probe | digits, 360 images |" in (hub.folder / "me" / "digits" / "README.md").read_text()


# --- what is stopped before the Hub is asked


@pytest.fixture
def logged_in(monkeypatch):
    """A token, and no way to use it."""
    monkeypatch.setattr(publish, "get_token", lambda: TOKEN)
    monkeypatch.setattr(publish, "send", lambda *arguments: pytest.fail("the Hub was asked"))


def refused(run, repo_id="me/digits"):
    with pytest.raises(ConfigurationError) as caught:
        publish.publish(run, repo_id)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_login(run, monkeypatch):
    monkeypatch.setattr(publish, "get_token", lambda: None)
    assert "no login for the Hub: type `hf auth login`" in refused(run)


@pytest.mark.parametrize("repo_id", ["digits", "a/b/c", "../x", "me/", "me/x y", "https://huggingface.co/me/x"])
def test_a_name_that_is_none(run, logged_in, repo_id):
    assert refused(run, repo_id) == f"--repo_id {repo_id}: a name on the Hub is needed, USER/NAME"


def test_a_folder_that_is_no_run(run, logged_in, tmp_path):
    assert "there is no config.yaml; give the folder of a run that has ended" in refused(tmp_path / "nothing")
    (run / "encoder" / "model.safetensors").unlink()
    assert "there is no encoder/model.safetensors" in refused(run)


def test_weights_that_do_not_load_or_were_changed(run, logged_in):
    weights = run / "encoder" / "model.safetensors"
    state = load_file(weights)
    name = "embedder.embedder.convolution.weight"
    save_file(state | {name: state[name] + 1e-3}, weights, metadata={"format": "pt"})
    assert "knn/result.json was measured with other weights than those in encoder/" in refused(run)
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "cannot be loaded" in refused(run)


def test_what_a_stranger_computes_must_be_the_same(run, logged_in, monkeypatch):
    script = publish.STRANGER
    monkeypatch.setattr(publish, "STRANGER", script.replace("features=features", "features=1.001 * features"))
    assert "what a clean process computes differs from the run's encoder" in refused(run)
    monkeypatch.setattr(publish, "STRANGER", script.replace("pixels=inputs", "pixels=-inputs"))
    assert "does not show images as its evaluations do" in refused(run)
    monkeypatch.setattr(publish, "STRANGER", "import m2t_accel")
    message = refused(run)
    assert "a clean process cannot load the encoder" in message or "differs" in message


def test_links_out_of_the_run_are_not_followed(run, logged_in, tmp_path):
    (tmp_path / "private.json").write_text(json.dumps({"evaluation": "knn", "figures": {}, "protocol": {}}))
    for name in ("metrics.jsonl", "knn/result.json"):
        content = (run / name).read_bytes()
        (run / name).unlink()
        (run / name).symlink_to(tmp_path / "private.json")
        assert f"{name} is a link out of the run, and is not published" in refused(run)
        (run / name).unlink()
        (run / name).write_bytes(content)


def test_files_that_are_not_a_runs(run, logged_in):
    content = (run / "training.json").read_text()
    (run / "training.json").write_text("{")
    assert "holds files that are not a run's" in refused(run)
    (run / "training.json").write_text(content)
    (run / "knn" / "result.json").write_text("[]")
    assert "knn/result.json is no result of an evaluation" in refused(run)


def test_a_token_in_an_error_is_not_shown(monkeypatch):
    monkeypatch.setattr(publish, "get_token", lambda: TOKEN)
    assert publish.without_token(f"bad header Bearer {TOKEN}") == "bad header Bearer hf_…"

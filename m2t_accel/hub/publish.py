"""A run to the Hub: gathered, loaded in a clean process and compared, then sent in one commit."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import save_file
from transformers import ResNetModel

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, is_hub_id, one_line
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.config.recipes import build_config
from m2t_accel.data.crops import central_view
from m2t_accel.data.photometry import evaluation_view
from m2t_accel.files import read_metrics
from m2t_accel.hub.card import clean, clean_command, merged_card, model_card
from m2t_accel.hub.encoders import LoadedEncoder, load_encoder, weights_fingerprint
from m2t_accel.hub.tensor_names import to_torchvision
from m2t_accel.model import embed

ENCODER_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
RUN_FILES = ("metrics.jsonl", "curves.png")

# What a stranger does: only stock libraries, no network. Pixels and features of three images out.
STRANGER = """
import sys
sys.modules["m2t_accel"] = None
import numpy as np, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
folder, images, output = sys.argv[1:]
processor, encoder = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
inputs = processor([Image.fromarray(image) for image in np.load(images)], return_tensors="pt")
with torch.no_grad():
    features = encoder(**inputs).pooler_output.flatten(1)
np.savez(output, pixels=inputs["pixel_values"].numpy(), features=features.numpy())
"""


def publish(run: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Publish a run's encoder, card, metrics, configuration and results on the Hub; the commit's address comes back.

    Raises:
        ConfigurationError: the folder holds no whole run, what would be published does not compute what the run's
            encoder does, or the Hub did not take it. Everything stays where it is; the message says how to try again.
    """
    if not is_hub_id(repo_id):
        raise ConfigurationError(f"--repo_id {repo_id}: a name on the Hub is needed, USER/NAME")
    if get_token() is None:
        raise ConfigurationError(
            "no login for the Hub: type `hf auth login`, or set HF_TOKEN; then "
            f"{retry(run, repo_id, private, revision)}"
        )
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "repository"
        card = gather(run, staged, repo_id)
        check_as_a_stranger(run, staged)
        try:
            return send(staged, card, repo_id, private, revision)
        except Exception as error:  # of huggingface_hub, httpx, ssl, OSError: no common ancestor
            reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            raise ConfigurationError(
                f"the Hub did not take {repo_id} ({without_token(one_line(reason))}); everything is in {run}. To try "
                f"again: {retry(run, repo_id, private, revision)}"
            ) from None


def retry(run: Path, repo_id: str, private: bool, revision: str | None) -> str:
    words = ["python", "scripts/push_to_hub.py", "--run", str(run), "--repo_id", repo_id]
    words += ["--private"] if private else []
    return shlex.join([*words, "--revision", revision] if revision else words)


def without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "hf_…") if token else text


def gather(run: Path, staged: Path, repo_id: str) -> str:
    """Copy what is published of a run into a new folder, without paths of this machine; the model card comes back.

    Raises:
        ConfigurationError: the run is not whole, or a file of it leads out of it.
    """
    for path in [run / "config.yaml", run / "training.json", *(run / "encoder" / name for name in ENCODER_FILES)]:
        if not path.is_file():
            raise ConfigurationError(
                f"--run {run}: there is no {path.relative_to(run)}; give the folder of a run that has ended"
            )
    staged.mkdir(parents=True)
    for name in ENCODER_FILES:
        shutil.copyfile(inside(run, run / "encoder" / name), staged / name)
    for name in RUN_FILES:
        if (run / name).is_file():
            shutil.copyfile(inside(run, run / name), staged / name)
    try:
        config = build_config(yaml.safe_load(inside(run, run / "config.yaml").read_text(encoding="utf-8")))
        training = json.loads(inside(run, run / "training.json").read_text(encoding="utf-8"))
        accuracies = [row["knn_top1"] for row in read_metrics(run / "metrics.jsonl") if "knn_top1" in row]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--run {run} holds files that are not a run's ({one_line(error)})") from None
    write_settings(config, staged / "config.yaml")
    encoder = load_encoder(str(run / "encoder"))
    state = encoder.model.state_dict()
    if isinstance(encoder.model, ResNetModel):
        renamed = {name: tensor.contiguous() for name, tensor in to_torchvision(state).items()}
        save_file(renamed, staged / "torchvision.safetensors")
    results = []
    for name, result in results_of(run):
        if not result["protocol"].get("random_weights") and result.get("weights") != weights_fingerprint(encoder.model):
            raise ConfigurationError(
                f"--run {run}: {name} was measured with other weights than those in encoder/: remove it, or measure "
                "again"
            )
        result = {**clean(result), "command": clean_command(str(result.get("command", "")))}
        results.append(result)
        (staged / "results").mkdir(exist_ok=True)
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        (staged / "results" / f"{Path(name).parent.name}.json").write_text(text, encoding="utf-8")
    return model_card(config, training, accuracies, results, repo_id, with_curves=(staged / "curves.png").is_file())


def inside(run: Path, path: Path) -> Path:
    """The path, unless it leads out of the run by a link.

    Raises:
        ConfigurationError: it does.
    """
    if not path.resolve().is_relative_to(run.resolve()):
        raise ConfigurationError(f"--run {run}: {path.relative_to(run)} is a link out of the run, and is not published")
    return path


def write_settings(config: PretrainConfig, path: Path) -> None:
    settings = clean(yaml.safe_load(config.to_yaml()))
    path.write_text(yaml.safe_dump(settings, sort_keys=False, default_flow_style=None), encoding="utf-8")


def results_of(run: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """The results of evaluations in a run's folder, each with the name of its file.

    Raises:
        ConfigurationError: one cannot be read.
    """
    for path in sorted(run.glob("*/result.json")):
        name = str(path.relative_to(run))
        try:
            result = json.loads(inside(run, path).read_text(encoding="utf-8"))
            if result["evaluation"] and result["figures"].items() and result["protocol"] is not None:
                yield name, result
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(f"--run {run}: {name} is no result of an evaluation ({one_line(error)})") from None


def check_as_a_stranger(run: Path, staged: Path) -> None:
    """Load what will be published in a clean process, by stock libraries, and compare pixels and features.

    Raises:
        ConfigurationError: it does not load, or computes something else than the run's encoder.
    """
    loaded = load_encoder(str(run / "encoder"))
    images = np.random.default_rng(0).integers(0, 256, (3, 60, 80, 3), np.uint8)
    np.save(staged.parent / "images.npy", images)
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    output = staged.parent / "found.npz"
    words = [sys.executable, "-I", "-c", STRANGER, staged, staged.parent / "images.npy", output]
    done = subprocess.run(
        list(map(str, words)),
        cwd=staged.parent,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not output.exists():
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ConfigurationError(f"--run {run}: a clean process cannot load the encoder ({last[0][:200]})")
    with np.load(output) as found:
        pixels, features = torch.from_numpy(found["pixels"]), torch.from_numpy(found["features"])
    compare(run, loaded, images, pixels, features)


def compare(run: Path, loaded: LoadedEncoder, images: np.ndarray, pixels: torch.Tensor, features: torch.Tensor) -> None:
    """Compare with what evaluations here see, and with the features that they compute."""
    view = {name: getattr(loaded, name) for name in ("image_size", "evaluation_crop", "image_mean", "image_std")}
    settings = ImageSettings(dataset="none", **view)
    crops = [central_view(image, loaded.image_size, loaded.evaluation_crop) for image in images]
    ours = evaluation_view(torch.from_numpy(np.stack(crops)), settings)
    with torch.no_grad():
        wanted = embed(loaded.model, pixels)
    if ours.shape != pixels.shape or not (ours - pixels).abs().max() <= 1 / 255 / min(loaded.image_std):
        raise ConfigurationError(f"--run {run}: its image processor does not show images as its evaluations do")
    if wanted.shape != features.shape or not (wanted - features).abs().max() <= 1e-5 * max(1.0, wanted.abs().max()):
        raise ConfigurationError(f"--run {run}: what a clean process computes differs from the run's encoder")


def send(staged: Path, card: str, repo_id: str, private: bool, revision: str | None) -> str:
    """Send a folder and its card in one commit; the commit's address comes back."""
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    try:
        there = Path(api.hf_hub_download(repo_id, "README.md", revision=revision, force_download=True))
        card = merged_card(there.read_text(encoding="utf-8"), card)
    except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
        pass  # the first push
    (staged / "README.md").write_text(card, encoding="utf-8")
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    operations = [CommitOperationAdd(str(path.relative_to(staged)), path) for path in files]
    commit = api.create_commit(repo_id, operations, commit_message="Publish a run of m2t_accel", revision=revision)
    return commit.commit_url

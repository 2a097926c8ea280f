"""Publish a run on the Hub: gather its files, check them in a separate process, send them in one commit."""

from __future__ import annotations

import dataclasses
import json
import os
import re
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
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import save_file
from transformers import ResNetModel

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, command_without_paths, is_hub_id, one_line, without_paths
from m2t_accel.config.recipes import build_config
from m2t_accel.data.crops import central_view
from m2t_accel.data.photometry import evaluation_view
from m2t_accel.files import read_metrics
from m2t_accel.hub.card import merge_cards, model_card, public_images, public_settings
from m2t_accel.hub.encoders import LoadedEncoder, load_encoder, weights_fingerprint
from m2t_accel.hub.tensor_names import to_torchvision
from m2t_accel.model import embed
from m2t_accel.pages.record import RunRecord, read_run
from m2t_accel.pages.run_page import write_run_page

ENCODER_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
RUN_FILES = ("metrics.jsonl", "curves.png")
# Files that describe the weights of one run, and that another run may lack.
OWN_FILES = re.compile(
    r"metrics\.jsonl|curves\.png|report\.html|torchvision\.safetensors|"
    r"results/(knn|linear_probe|finetuning)(_random_weights)?\.json"
)

# The script loads the folder as a user without m2t_accel does, and writes the pixels and features of the given images.
LOADING_SCRIPT = """
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
    """Publish the encoder, card, metrics, settings and results of a run. Return the URL of the commit.

    Raises:
        ConfigurationError: the run is not complete, the published encoder would compute other features than the run's
            encoder, or the Hub refused the commit. The run is not changed; the message has the command to try again.
    """
    if not is_hub_id(repo_id):
        raise ConfigurationError(f"--repo_id {repo_id}: a name on the Hub is needed, USER/NAME")
    words = ["python", "scripts/push_to_hub.py", "--run", str(run), "--repo_id", repo_id]
    words += ["--private"] * private + (["--revision", revision] if revision else [])
    if get_token() is None:
        raise ConfigurationError(
            f"no login for the Hub: type `hf auth login`, or set HF_TOKEN; then {shlex.join(words)}"
        )
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "repository"
        card = gather(run, staged, repo_id)
        check_in_clean_process(run, staged)
        try:
            return send(staged, card, repo_id, private, revision)
        except ConfigurationError:
            raise
        except Exception as error:  # errors of huggingface_hub, httpx and ssl have no common base class
            reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            raise ConfigurationError(
                f"the Hub did not take {repo_id} ({without_token(one_line(reason))}); everything is in {run}. To try "
                f"again: {shlex.join(words)}"
            ) from None


def without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "hf_…") if token else text


def gather(run: Path, staged: Path, repo_id: str) -> str:
    """Copy the published files of a run to a new folder, without paths of this machine. Return the model card.

    Raises:
        ConfigurationError: a file is missing, cannot be read, belongs to other weights, or is a link out of the run.
    """
    for path in [run / "config.yaml", run / "training.json", *(run / "encoder" / name for name in ENCODER_FILES)]:
        if not path.is_file():
            reason = "give the folder of a run that has ended"
            if path.name == "config.json" and (run / "encoder" / "model.safetensors").is_file():
                reason = "the run trained a module of your own, and only transformers models are published"
            raise ConfigurationError(f"--run {run}: there is no {path.relative_to(run)}; {reason}")
    (staged / "results").mkdir(parents=True)
    for name in (*(f"encoder/{name}" for name in ENCODER_FILES), *RUN_FILES):
        if (run / name).is_file():
            shutil.copyfile(inside(run, run / name), staged / Path(name).name)
    try:
        settings = yaml.safe_load(inside(run, run / "config.yaml").read_text(encoding="utf-8"))
        config = build_config(settings)
        training = json.loads(inside(run, run / "training.json").read_text(encoding="utf-8"))
        recorded = {**training.get("config", {}), "push_to_hub": settings.get("push_to_hub")}  # not in config.yaml
        changed = [name for name, value in recorded.items() if settings.get(name) != value]
        rows = list(read_metrics(run / "metrics.jsonl"))
        accuracies = [row["knn_top1"] for row in rows if "knn_top1" in row]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--run {run} holds files that are not a run's ({one_line(error)})") from None
    if changed:
        raise ConfigurationError(
            f"--run {run}: its config.yaml has been changed since the run ended ({', '.join(changed)}): remove that "
            "file, and the command of the run writes it again"
        )
    (staged / "config.yaml").write_text(public_settings(config), encoding="utf-8")
    model = load_encoder(str(run / "encoder")).model
    if isinstance(model, ResNetModel):
        renamed = {name: tensor.contiguous() for name, tensor in to_torchvision(model.state_dict()).items()}
        save_file(renamed, staged / "torchvision.safetensors")
    results = []
    for name, result in read_results(run):
        if not result["protocol"].get("random_weights") and result.get("weights") != weights_fingerprint(model):
            raise ConfigurationError(
                f"--run {run}: {name} was measured with other weights than those in encoder/: remove it, or measure "
                "again"
            )
        result = {**without_paths(result), "command": command_without_paths(str(result.get("command", "")))}
        results.append(result)
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        (staged / "results" / f"{Path(name).parent.name}.json").write_text(text, encoding="utf-8")
    with_curves = (staged / "curves.png").is_file()
    if with_curves:
        write_run_page(public_record(run, repo_id), staged / "report.html", with_images=False)
    return model_card(config, training, accuracies, results, repo_id, with_curves, rows)


def public_record(run: Path, repo_id: str) -> RunRecord:
    """Return the record of a run without paths of this machine, and without names of image files."""
    record = read_run(run)
    images = public_images(str(record.settings["dataset"]), record.training)
    training = {**record.training, "command": record.command, "data": images}
    for part in training.get("parts", ()):
        part["command"] = command_without_paths(str(part["command"]))
    return dataclasses.replace(
        record,
        name=repo_id,
        settings=without_paths(record.settings),
        command=command_without_paths(record.command),
        training=without_paths(training),
        results=without_paths(record.results),
    )


def inside(run: Path, path: Path) -> Path:
    """Check that a path is inside the run's folder, and return it.

    Raises:
        ConfigurationError: the path is a link out of the run's folder.
    """
    if not path.resolve().is_relative_to(run.resolve()):
        raise ConfigurationError(f"--run {run}: {path.relative_to(run)} is a link out of the run, and is not published")
    return path


def read_results(run: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the relative path and the content of each result of an evaluation in the run's folder.

    Raises:
        ConfigurationError: a result cannot be read.
    """
    for path in sorted(run.glob("*/result.json")):
        name = str(path.relative_to(run))
        inside(run, path)
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            is_result = result["evaluation"] and result["figures"].items() and result["protocol"] is not None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(f"--run {run}: {name} is no result of an evaluation ({one_line(error)})") from None
        if is_result:
            yield name, result


def check_in_clean_process(run: Path, staged: Path) -> None:
    """Load the staged encoder in a process without m2t_accel, and compare its pixels and features with the run's.

    Raises:
        ConfigurationError: the encoder does not load, or the pixels or features differ.
    """
    images = np.random.default_rng(0).integers(0, 256, (3, 60, 80, 3), np.uint8)
    np.save(staged.parent / "images.npy", images)
    output = staged.parent / "found.npz"
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    done = subprocess.run(
        # -P: the working directory is not importable. PYTHONPATH and the user's packages are, as for any user.
        [sys.executable, "-P", "-c", LOADING_SCRIPT, str(staged), str(staged.parent / "images.npy"), str(output)],
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
        check_outputs(run, load_encoder(str(run / "encoder")), images, found["pixels"], found["features"])


def check_outputs(
    run: Path, encoder: LoadedEncoder, images: np.ndarray, pixels: np.ndarray, features: np.ndarray
) -> None:
    """Check the pixels and features of another process against those of the evaluations.

    Args:
        images: (N, H, W, 3) uint8.
        pixels: (N, 3, S, S) float32, the other process's preprocessed images.
        features: (N, C) float32, its features of `pixels`.

    Raises:
        ConfigurationError: the pixels differ by more than one level of 255, or the features by more than rounding.
    """
    pixels, features = torch.from_numpy(pixels), torch.from_numpy(features)
    settings = ImageSettings(dataset="none", **encoder.preprocessing)
    crops = [central_view(image, encoder.image_size, encoder.evaluation_crop) for image in images]
    expected_pixels = evaluation_view(torch.from_numpy(np.stack(crops)), settings)
    with torch.no_grad():
        expected = embed(encoder.model, pixels)
    tolerance = 1 / 255 / min(encoder.image_std)
    if expected_pixels.shape != pixels.shape or not (expected_pixels - pixels).abs().max() <= tolerance:
        raise ConfigurationError(f"--run {run}: its image processor prepares images differently from its evaluations")
    tolerance = 1e-5 * max(1.0, expected.abs().max())
    if expected.shape != features.shape or not (expected - features).abs().max() <= tolerance:
        raise ConfigurationError(f"--run {run}: the features in a clean process differ from those of the run's encoder")


def send(staged: Path, card: str, repo_id: str, private: bool, revision: str | None) -> str:
    """Send a folder and its card to the Hub in one commit. Return the URL of the commit.

    Create the repository and the branch if they do not exist. If there is a card already, merge the two.
    Delete the files of an earlier push that the folder lacks: they may be of other weights.

    Raises:
        ConfigurationError: the repository should be private, but exists and is public.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ConfigurationError(
            f"{repo_id} exists and is public, and nothing was published: make it private in its settings on the Hub, "
            "give another name, or leave out --private (--hub_private_repo)"
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    try:
        published = Path(api.hf_hub_download(repo_id, "README.md", revision=revision, force_download=True))
        card = merge_cards(published.read_text(encoding="utf-8"), card)
    except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
        pass  # the first push
    (staged / "README.md").write_text(card, encoding="utf-8")
    files = {str(path.relative_to(staged)): path for path in sorted(staged.rglob("*")) if path.is_file()}
    there = [file.rfilename for file in api.model_info(repo_id, revision=revision).siblings]
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations += [CommitOperationDelete(name) for name in there if OWN_FILES.fullmatch(name) and name not in files]
    commit = api.create_commit(repo_id, operations, commit_message="Publish a run of m2t_accel", revision=revision)
    return commit.commit_url

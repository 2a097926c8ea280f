"""Write the model card of an encoder, and merge it with a card that was published before."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from m2t_accel.config.data import public_name
from m2t_accel.config.fields import command_without_paths, plain_text, without_paths
from m2t_accel.config.pretrain import PretrainConfig, initial_weights
from m2t_accel.config.recipes import RECIPES

# A second push replaces the text between these marks, and keeps all other text.
SECTION_START = "<!-- m2t_accel: each push replaces the text from this line to the end mark -->"
SECTION_END = "<!-- m2t_accel: end mark -->"

# Names of results that `evaluation_results` writes.
WHILE_TRAINING = "kNN top-1 (k=20, T=0.07), while training"
OWN_METRICS = re.compile(rf"{re.escape(WHILE_TRAINING)}|(knn|linear probe|fine-tuning) top\d(_k\d+)?")

# The numbers in the note of `load_images` about the images.
IMAGES = re.compile(r"([\d,]+ of )?[\d,]+ images?( of [\d,]+ class(es)?( \([\d,]+ are named\))?)?")
EVALUATION_IMAGES = re.compile(r"; evaluation on [\d,]+ others?( \(held out of the training images\))?")

# Settings of an evaluation that the table of results shows.
TABLE_SETTINGS = (
    *("protocol", "learning_rates", "chosen_learning_rate", "epochs", "max_steps", "max_images", "batch_size"),
    *("features", "k", "temperature", "labels", "image_size", "evaluation_crop"),
    *("network", "precision", "training_precision"),
)


def loading_code(name: str) -> str:
    """Return the Markdown block with the code that loads an encoder from a folder or a Hub id."""
    return f"""```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
encoder = AutoModel.from_pretrained("{name}")
features = encoder(**processor(image, return_tensors="pt")).pooler_output.flatten(1)
```"""


# What the teacher's BatchNorm normalises with, by `teacher_statistics`.
TEACHER_STATISTICS = {
    "momentum": "momentum statistics",
    "batch": "the statistics of the batch, as in BYOL, instead of momentum statistics",
    "running": "its running average instead of momentum statistics",
}


def model_card(
    config: PretrainConfig,
    training: Mapping[str, object],
    accuracies: Sequence[float],
    results: Sequence[Mapping[str, object]] = (),
    name: str = "PATH_OR_ID",
    with_curves: bool = False,
    metrics: Sequence[Mapping[str, object]] = (),
) -> str:
    """Return the README.md of a run: purpose, loading code, results and training of the encoder.

    Args:
        training: content of the run's training.json.
        accuracies: the teacher's kNN top-1 measured during training, 0 to 1, from first to last; may be empty.
        results: results of evaluations, as m2t_accel.evaluation writes them.
        name: folder or Hub id that the loading code names.
        with_curves: whether curves.png and report.html are published beside the card.
        metrics: lines of the run's metrics.jsonl.
    """
    dataset = str(training.get("dataset") or public_name(config.dataset))  # earlier versions did not record it
    title = f"Momentum² Teacher {without_paths(config.encoder)}, {Path(dataset).name}"
    start = next((part["init_from"] for part in training.get("parts", ()) if "init_from" in part), {})
    data = ModelCardData(
        model_name=title,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised-learning", "momentum2-teacher", "byol"],
        base_model=start.get("hub_id"),
        eval_results=evaluation_results(dataset, accuracies, results) or None,
    )
    facts = {
        "recipe": config.recipe,
        "data": public_images(config.dataset, training),
        **({"started from": without_paths(config.init_from)} if config.init_from is not None else {}),
        "epochs" if config.max_steps is None else "steps": str(config.max_steps or config.epochs),
        "images seen": f"{training['images_seen']:,}",
        "hardware": training["hardware"],
        "time": training["time"],
        **last_figures(metrics),
        "software": ", ".join(f"{package} {version}" for package, version in training["versions"].items()),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    curves = (
        "\n![loss, kNN, spread of the embeddings, schedules](curves.png)\n\n[report.html](report.html) has all curves "
        "to zoom, and the health of each layer. Download it and open it; it needs no network.\n"
        if with_curves
        else ""
    )
    return f"""---
{data.to_yaml()}
---

{SECTION_START}

# {title}

An image encoder pretrained without labels by Momentum² Teacher ([arXiv 2101.07525](https://arxiv.org/abs/2101.07525)):
a student learns to predict a momentum teacher's output for another view of the same image, and the teacher's BatchNorm
normalises with {TEACHER_STATISTICS[config.teacher_statistics]}. This is the teacher's encoder.

## Load it

{loading_code(name)}

## Results

{results_text(config, accuracies, results)}

## Training

| | |
|---|---|
{rows}
{curves}
```
{command_without_paths(str(training["command"]))}
```

All settings:

```yaml
{public_settings(config).strip()}
```

{SECTION_END}

## Limits

The encoder knows only the kind of images it was trained on, with their biases; measure it on your own task.

## Licence

The author of the weights chooses their licence, and states it in the metadata of this card. The code that trained
them, m2t_accel, is Apache-2.0.

## Citation

```bibtex
@article{{li2021momentum2,
  title={{Momentum\\^{{}}2 Teacher: Momentum Teacher with Momentum Statistics for Self-Supervised Learning}},
  author={{Li, Zeming and Liu, Songtao and Sun, Jian}},
  journal={{arXiv preprint arXiv:2101.07525}},
  year={{2021}}
}}
```
"""


def public_images(dataset: str, training: Mapping[str, object]) -> str:
    """Return the name of a dataset and the numbers of its images, without names of folders and files in it.

    Args:
        dataset: `--dataset` of the run.
        training: content of the run's training.json.
    """
    name = Path(str(training.get("dataset") or public_name(dataset))).name
    note = str(training["data"]).removeprefix(f"{dataset}: ")
    # Only known words are taken: the rest of the note may name persons, by their folders and files.
    images, evaluation = IMAGES.match(note), EVALUATION_IMAGES.search(note)
    return f"{name}{f': {images[0]}' if images else ''}{evaluation[0] if evaluation else ''}"


def last_figures(metrics: Sequence[Mapping[str, object]]) -> dict[str, str]:
    """Return the rows of the card's table about the state at the end of training."""
    last = {name: value for line in metrics for name, value in line.items()}
    embeddings = [
        f"{words} {last[name]:.3g}"
        for name, words in (
            ("embedding_std", "spread (1 even, 0 collapse)"),
            ("effective_rank", "effective rank (RankMe)"),
            ("agreement", "agreement of student and teacher"),
        )
        if name in last
    ]
    layers = f"{last['statistics_distance']:.3g}" if "statistics_distance" in last else None
    return ({"embeddings at the end": ", ".join(embeddings)} if embeddings else {}) | (
        {"largest distance of a batch's statistics from the teacher's": layers} if layers else {}
    )


def public_settings(config: PretrainConfig) -> str:
    """Return the settings of a run as YAML, without paths of this machine."""
    settings = without_paths(yaml.safe_load(config.to_yaml()))
    return yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)


def results_text(config: PretrainConfig, accuracies: Sequence[float], results: Sequence[Mapping[str, object]]) -> str:
    """Return the accuracies measured during training, and a table of the evaluations, as Markdown."""
    lines = []
    if accuracies:
        start = initial_weights(replace(config, init_from=without_paths(config.init_from)))
        lines.append(
            "During training: weighted kNN top-1 (k = 20, T = 0.07, features of the teacher's encoder, centre crop) "
            "of at most 10 000 held-out images by at most 50 000 training images: "
            f"**{100 * accuracies[-1]:.2f} %**, from {100 * accuracies[0]:.2f} % {start}."
        )
    if results:
        lines += ["", "| evaluation | data | result | protocol |", "|---|---|---|---|"]
    for result in results:
        figures = "<br>".join(f"{key}: **{100 * share:.2f} %**" for key, share in result["figures"].items())
        protocol = result.get("protocol", {})
        settings = [f"{key} {plain_text(protocol[key])}" for key in TABLE_SETTINGS if protocol.get(key) is not None]
        num_images = result.get("data", {}).get("test", {}).get("images", "?")
        data = f"{Path(evaluated_dataset(result)).name}, {num_images} images"
        kind = f"{result['evaluation']}{', random weights' if protocol.get('random_weights') else ''}"
        lines.append(f"| {kind} | {data} | {figures} | {', '.join(settings)} |")
    if not lines:
        lines.append("This run was not evaluated.")
    published = RECIPES[config.recipe].top1 if config.teacher_statistics == "momentum" else None
    if published and not any(result["evaluation"] == "linear probe" for result in results):
        lines += [
            "",
            f"The published linear top-1 of this recipe on ImageNet is {published} %; this run has no linear probe.",
        ]
    return "\n".join(lines)


def evaluated_dataset(result: Mapping[str, object]) -> str:
    """Return the Hub id or the name of the dataset of a result; earlier versions did not record it."""
    return str(result.get("dataset_name") or public_name(str(result["dataset"])))


def evaluation_results(
    dataset: str, accuracies: Sequence[float], results: Sequence[Mapping[str, object]]
) -> list[EvalResult]:
    """Return the results for the card's metadata, without those of random weights.

    Args:
        dataset: Hub id or name of the dataset that the encoder was trained on.
    """
    found = []
    results = [result for result in results if not result.get("protocol", {}).get("random_weights")]
    if accuracies and not any(result["evaluation"] == "knn" for result in results):
        found.append(evaluation_result(dataset, WHILE_TRAINING, accuracies[-1]))
    for result in results:
        protocol = without_paths(result.get("protocol", {}))
        for figure, share in result["figures"].items():
            name = f"{result['evaluation']} {figure}"
            found.append(evaluation_result(evaluated_dataset(result), name, share, protocol))
    return found


def evaluation_result(
    dataset: str, name: str, share: float, protocol: Mapping[str, object] | None = None
) -> EvalResult:
    """Return one accuracy, a share from 0 to 1, as the Hub's metadata describes it."""
    return EvalResult(
        task_type="image-feature-extraction",
        # The Hub groups results of one type, and refuses a card with other characters in it.
        dataset_type=re.sub(r"[^A-Za-z0-9_./-]+", "-", dataset).strip("-") or "dataset",
        dataset_name=Path(dataset).name,
        metric_type="accuracy",
        metric_name=name,
        metric_value=round(share, 6),
        metric_args=dict(protocol) if protocol else None,
    )


def merge_cards(published: str, new: str) -> str:
    """Return the published card with the marked section and the results of the new one.

    The rest of the published card stays: other text, other metadata, and results under names that m2t_accel does not
    write. Its own earlier results, and the base model that its own section names, go: they may be of other weights. If
    somebody has removed the marks, the whole published text stays. If the published card has no text, the new text is
    used.

    Raises:
        ValueError: the metadata of the published card are not a mapping, or its results cannot be read.
    """
    old, card = ModelCard(published), ModelCard(new)
    if old.text.strip():
        section = re.compile(f"{re.escape(SECTION_START)}.*?{re.escape(SECTION_END)}", re.DOTALL)
        new_section = section.search(card.text)[0]
        card.text = section.sub(lambda _: new_section, old.text, count=1)
    results = card.data.eval_results or []
    replaced = {(result.dataset_name, result.metric_name) for result in results}
    for result in old.data.eval_results or []:
        is_own = OWN_METRICS.fullmatch(str(result.metric_name))
        if not is_own and (result.dataset_name, result.metric_name) not in replaced:
            results.append(result)
    dropped = ["eval_results", "model_name"]
    if card.data.base_model or f"| started from | {old.data.base_model} |" in old.text:
        dropped.append("base_model")
    for name, value in vars(old.data).items():
        if value is not None and name not in dropped:
            card.data[name] = value
    card.data.eval_results = results or None
    return card.content

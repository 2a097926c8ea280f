"""The model card of an encoder."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.config.recipes import RECIPES

# What a second push may write anew of a card that somebody has edited.
RESULTS, END_OF_RESULTS = "<!-- m2t_accel: results -->", "<!-- m2t_accel: end of results -->"

# Of settings in a result's protocol, those that a table of results shows.
SHOWN = ("protocol", "learning_rates", "chosen_learning_rate", "epochs", "batch_size", "features", "k", "temperature")
SHOWN += ("labels", "image_size", "evaluation_crop", "network", "precision")


def without_paths(text: str) -> str:
    """A text in which a path of this machine is its last name only."""
    if os.path.isabs(text) or text.startswith(("~", "../")):
        return Path(text).name
    # Not the second half of a URL, of `images/s` or of runs/digits.
    return re.sub(r"(?<![\w:/.~])(?:~|\.\.)?/[^\s:;,'\"()\[\]=]+", lambda path: Path(path[0]).name, text)


def clean(value: object) -> object:
    """A value of JSON or YAML without paths of this machine."""
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, Mapping):
        return {key: clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list | tuple) else value


def clean_command(command: str) -> str:
    """A command line without paths of this machine; they may hold blanks."""
    return shlex.join(without_paths(word) for word in shlex.split(command))


def model_card(
    config: PretrainConfig,
    training: Mapping[str, object],
    accuracies: Sequence[float],
    results: Sequence[Mapping[str, object]] = (),
    name: str = "PATH_OR_ID",
    with_curves: bool = False,
) -> str:
    """The card of a run, as a README.md: what the encoder is, how to load it, how it was made, what was measured.

    training: of the run's training.json; accuracies: the teacher's kNN top-1 as measured while it trained, from 0 to
    1, first to last, or none; results: of evaluations, as m2t_accel.evaluation writes them; name: where it will be.
    """
    title = f"Momentum² Teacher {clean(config.encoder)}, {Path(config.dataset).name}"
    data = ModelCardData(
        model_name=title,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised-learning", "momentum2-teacher", "byol"],
        eval_results=evaluation_results(config, accuracies, results) or None,
    )
    facts = {
        "recipe": config.recipe,
        "data": without_paths(str(training["data"]).replace(config.dataset, Path(config.dataset).name)),
        "epochs": str(config.epochs),
        "images seen": f"{training['images_seen']:,}",
        "hardware": training["hardware"],
        "time": training["time"],
        "software": ", ".join(f"{package} {version}" for package, version in training["versions"].items()),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    settings = yaml.safe_load(config.to_yaml())
    settings = yaml.safe_dump(clean(settings), sort_keys=False, default_flow_style=None)
    curves = "\n![loss, kNN, spread of the embeddings, schedules](curves.png)\n" if with_curves else ""
    body = f"""# {title}

An image encoder pretrained without labels by Momentum² Teacher ([arXiv 2101.07525](https://arxiv.org/abs/2101.07525)):
a student learns to predict a momentum teacher's view of the same image, and the teacher's BatchNorm
normalises with momentum statistics. This is the teacher's encoder.

## Load it

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
encoder = AutoModel.from_pretrained("{name}")
features = encoder(**processor(image, return_tensors="pt")).pooler_output.flatten(1)
```

## Results

{results_section(config, accuracies, results)}

## Training

| | |
|---|---|
{rows}
{curves}
```
{clean_command(str(training["command"]))}
```

All settings:

```yaml
{settings.strip()}
```

## Limits

The encoder knows only the kind of images it was trained on, with their biases; measure it on your own task.

## Licence

The licence of the weights is their author's to choose, and to write into this card's metadata. The code that trained
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
    return f"---\n{data.to_yaml()}\n---\n\n{marked(body)}"


def results_section(
    config: PretrainConfig, accuracies: Sequence[float], results: Sequence[Mapping[str, object]]
) -> str:
    """What was measured, between two marks."""
    lines = []
    if accuracies:
        lines.append(
            "While it trained: weighted kNN top-1 (k = 20, T = 0.07, features of the teacher's encoder, centre crop) "
            "of at most 10 000 held-out images by at most 50 000 training images: "
            f"**{100 * accuracies[-1]:.2f} %**, from {100 * accuracies[0]:.2f} % with random weights."
        )
    if results:
        lines += ["", "| evaluation | data | result | protocol |", "|---|---|---|---|"]
        for result in results:
            figures = "<br>".join(f"{key}: **{100 * share:.2f} %**" for key, share in result["figures"].items())
            protocol = result.get("protocol", {})
            shown = ", ".join(f"{key} {in_words(protocol[key])}" for key in SHOWN if protocol.get(key) is not None)
            number = result.get("data", {}).get("test", {}).get("images", "?")
            data = f"{Path(str(result['dataset'])).name}, {number} images"
            kind = f"{result['evaluation']}{', random weights' if protocol.get('random_weights') else ''}"
            lines.append(f"| {kind} | {data} | {figures} | {shown} |")
    if not lines:
        lines.append("It was not measured in this run.")
    published = RECIPES[config.recipe].top1
    if published and not any(result["evaluation"] == "linear probe" for result in results):
        lines += [
            "",
            f"The recipe's published linear top-1 on ImageNet is {published} %; this run was not evaluated so.",
        ]
    return "\n".join([RESULTS, *lines, END_OF_RESULTS])


def in_words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def evaluation_results(
    config: PretrainConfig, accuracies: Sequence[float], results: Sequence[Mapping[str, object]]
) -> list[EvalResult]:
    """The results as a card's metadata has them; those with random weights are no results of this encoder."""
    found = []
    results = [result for result in results if not result.get("protocol", {}).get("random_weights")]
    if accuracies and not any(result["evaluation"] == "knn" for result in results):
        found.append(evaluation_result(config.dataset, "kNN top-1 (k=20, T=0.07), while training", accuracies[-1]))
    for result in results:
        protocol = clean(dict(result.get("protocol", {})))
        for figure, share in result["figures"].items():
            found.append(evaluation_result(str(result["dataset"]), f"{result['evaluation']} {figure}", share, protocol))
    return found


def evaluation_result(
    dataset: str, name: str, share: float, protocol: Mapping[str, object] | None = None
) -> EvalResult:
    is_on_hub = "/" in dataset and not Path(dataset).exists() and not os.path.isabs(dataset)
    return EvalResult(
        task_type="image-feature-extraction",
        dataset_type=dataset if is_on_hub else Path(dataset).name,  # results of the same type are put together
        dataset_name=Path(dataset).name,
        metric_type="accuracy",
        metric_name=name,
        metric_value=round(share, 6),
        metric_args=dict(protocol) if protocol else None,
    )


def marked(body: str) -> str:
    """A card's text with a mark by which a later push can tell whether somebody has edited it."""
    return f"{body.rstrip()}\n\n<!-- m2t_accel: text {fingerprint_of(body)} -->\n"


def fingerprint_of(body: str) -> str:
    """Of a card's text, but for its results and the mark."""
    text = re.sub(r"<!-- m2t_accel: text \w* -->", "", body)
    text = re.sub(f"{re.escape(RESULTS)}.*?{re.escape(END_OF_RESULTS)}", "", text, flags=re.DOTALL)
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def merged_card(there: str, ours: str) -> str:
    """The card that a second push writes: ours where nobody has edited `there`, else theirs with our results.

    Metadata that others have added stays in both cases, and so do results that are not ours.
    """
    their_data, their_body = parts_of(there)
    our_data, our_body = parts_of(ours)
    mark = re.search(r"<!-- m2t_accel: text (\w*) -->", their_body)
    was_edited = mark is None or mark[1] != fingerprint_of(their_body)
    body = our_body
    if was_edited:
        section = re.search(f"{re.escape(RESULTS)}.*?{re.escape(END_OF_RESULTS)}", our_body, flags=re.DOTALL)
        pattern = f"{re.escape(RESULTS)}.*?{re.escape(END_OF_RESULTS)}"
        body = re.sub(pattern, lambda _: section[0], their_body, count=1, flags=re.DOTALL)
    data = {**our_data, **{key: value for key, value in their_data.items() if key != "model-index"}}
    index = our_data.get("model-index") or []
    data["model-index"] = [{**model, "results": with_others(their_data, model["results"])} for model in index]
    if not index:
        data["model-index"] = their_data.get("model-index")
    data = {key: value for key, value in data.items() if value is not None}
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n{body}"


def with_others(their_data: Mapping[str, object], ours: list[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Our results of a card's metadata, and those of theirs that are of another dataset or metric."""

    def names(result: Mapping[str, object]) -> set[tuple[str, str]]:
        return {(result["dataset"]["name"], metric.get("name", metric["type"])) for metric in result["metrics"]}

    known = set().union(*(names(result) for result in ours))
    theirs = [result for model in their_data.get("model-index") or [] for result in model.get("results", [])]
    others = []
    for result in theirs:
        metrics = [
            metric
            for metric in result["metrics"]
            if (result["dataset"]["name"], metric.get("name", metric["type"])) not in known
        ]
        if metrics:
            others.append({**result, "metrics": metrics})
    return [*ours, *others]


def parts_of(card: str) -> tuple[dict[str, object], str]:
    """A card's metadata and its text."""
    parts = re.match(r"\s*---\s*\n(.*?)\n---[ \t]*\n(.*)", card, re.DOTALL)
    if parts is None:
        return {}, card
    data = yaml.safe_load(parts[1])
    return (data if isinstance(data, dict) else {}), parts[2]

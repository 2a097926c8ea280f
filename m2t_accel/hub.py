"""The encoder as others load it: stock transformers weights, an image processor and a model card."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import BitImageProcessor, PreTrainedModel

from m2t_accel.model import quiet_transformers
from m2t_accel.recipes import RECIPES, PretrainConfig


def image_processor(config: PretrainConfig) -> BitImageProcessor:
    """The processor that makes of any image what evaluation sees: shorter side resized, centre cropped, normalised.

    BitImageProcessor states both sizes; ConvNextImageProcessor would drop the crop from 384 pixels on.
    """
    return BitImageProcessor(
        size={"shortest_edge": int(config.image_size / config.evaluation_crop)},
        crop_size={"height": config.image_size, "width": config.image_size},
        resample=2,  # bilinear
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        do_convert_rgb=True,
    )


def save_encoder(encoder: PreTrainedModel, config: PretrainConfig, card: ModelCard, folder: Path) -> None:
    """Write weights (safetensors), configuration, image processor and model card.

    `encoder` is a stock transformers model (`m2t_accel.model.plain_encoder`), so that AutoModel loads the
    folder without this package.
    """
    with quiet_transformers():
        encoder.save_pretrained(folder)
    image_processor(config).save_pretrained(folder)
    card.save(folder / "README.md")


def model_card(config: PretrainConfig, facts: dict[str, str], accuracies: list[float], command: str) -> ModelCard:
    """The card of a run: what it is, how to load it, and how it was made.

    facts: rows of the table of the training, in order; accuracies: the teacher's kNN top-1 as measured in the
    run, from 0 to 1, first to last, or none.
    """
    name = f"Momentum² Teacher {config.encoder}, {Path(config.dataset).name}"
    results = []
    knn = "It was not measured in this run."
    if accuracies:
        knn = (
            f"Weighted kNN top-1 (k = 20, T = 0.07, features of the teacher's encoder, centre crop) of at most 10 000 "
            f"held-out images by at most 50 000 training images: **{100 * accuracies[-1]:.2f} %**, from "
            f"{100 * accuracies[0]:.2f} % with random weights."
        )
        results = [
            EvalResult(
                task_type="image-feature-extraction",
                dataset_type=config.dataset if "/" in config.dataset and not Path(config.dataset).exists() else "local",
                dataset_name=Path(config.dataset).name,
                metric_type="accuracy",
                metric_name="kNN top-1 (k=20, T=0.07)",
                metric_value=round(accuracies[-1], 6),
            )
        ]
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised-learning", "momentum2-teacher", "byol"],
        eval_results=results or None,
    )
    published = RECIPES[config.recipe].top1
    if published:
        knn += f" The recipe's published linear top-1 on ImageNet is {published} %; this run was not evaluated so."
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    content = f"""---
{data.to_yaml()}
---

# {name}

An image encoder pretrained without labels by Momentum² Teacher ([arXiv 2101.07525](https://arxiv.org/abs/2101.07525)):
a student learns to predict a momentum teacher's view of the same image, and the teacher's BatchNorm
normalises with momentum statistics. This is the teacher's encoder.

## Load it

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("PATH_OR_ID")
encoder = AutoModel.from_pretrained("PATH_OR_ID")
features = encoder(**processor(image, return_tensors="pt")).pooler_output.flatten(1)
```

## Results

{knn}

## Training

| | |
|---|---|
{rows}

```
{command}
```

All settings:

```yaml
{config.to_yaml().strip()}
```

## Limits

The encoder knows only the kind of images it was trained on, with their biases; measure it on your own task.

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
    return ModelCard(content)

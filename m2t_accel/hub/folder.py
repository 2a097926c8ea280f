"""The folder of a published encoder: weights and image processor."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_model
from torch import nn
from transformers import BitImageProcessor, PreTrainedModel

from m2t_accel.config.data import ImageSettings
from m2t_accel.files import let_others_read
from m2t_accel.model import quiet_transformers


def image_processor(config: ImageSettings) -> BitImageProcessor:
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


def save_encoder(encoder: nn.Module, config: ImageSettings, card: str, folder: Path) -> None:
    """Write weights (safetensors), configuration, image processor and model card.

    Args:
        encoder: with plain BatchNorm, of `m2t_accel.model.plain_encoder`. AutoModel loads the folder of a transformers
            model without this package; of another module only the weights are written.
    """
    if isinstance(encoder, PreTrainedModel):
        with quiet_transformers():
            encoder.save_pretrained(folder)
    else:
        folder.mkdir(parents=True)
        save_model(encoder, str(folder / "model.safetensors"))
    for path in folder.glob("*.safetensors"):
        let_others_read(path)
    image_processor(config).save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")

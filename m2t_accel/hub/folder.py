"""Write the folder of an encoder: weights, configuration, image processor and model card."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn
from transformers import BitImageProcessor, PreTrainedModel

from m2t_accel.config.data import ImageSettings
from m2t_accel.files import let_others_read
from m2t_accel.model import quiet_transformers


def image_processor(config: ImageSettings) -> BitImageProcessor:
    """Return a processor that prepares images as the evaluations do: shorter side resized, centre cropped, normalised.

    BitImageProcessor states both sizes. ConvNextImageProcessor would not crop from 384 pixels on.
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
    """Write an encoder, its image processor and its model card.

    Args:
        encoder: network with plain BatchNorm, as `m2t_accel.model.plain_encoder` returns it. AutoModel can load the
            folder of a transformers model. For any other module only the weights are written.
        config: sizes and normalisation of the images.
        card: text of README.md.
        folder: folder to create.

    Raises:
        OSError: a file cannot be written.
    """
    try:
        if isinstance(encoder, PreTrainedModel):
            with quiet_transformers():
                encoder.save_pretrained(folder)
        else:
            folder.mkdir(parents=True)
            save_model(encoder, str(folder / "model.safetensors"))
    except SafetensorError as error:  # raised for a full disk
        raise OSError(None, str(error), str(folder)) from None
    for path in folder.glob("*.safetensors"):
        let_others_read(path)
    image_processor(config).save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")

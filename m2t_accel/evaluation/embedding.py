"""Write the features of a dataset's images to a file, draw them as a map, and show images with their neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from pyarrow import parquet
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from m2t_accel.config.evaluation import EmbedConfig
from m2t_accel.config.fields import ConfigurationError, count, write_errors_in_one_line
from m2t_accel.data.decode import decode_image
from m2t_accel.data.loader import dead_workers_in_one_line
from m2t_accel.data.views import read_rows
from m2t_accel.distributed.device import device_errors_in_one_line
from m2t_accel.evaluation.features import (
    Features,
    embed_images,
    fingerprint,
    first_broken,
    gather_features,
    left_out,
    none_decoded,
    read_labels,
)
from m2t_accel.evaluation.setup import Evaluation, open_folder, start_evaluation, write_result
from m2t_accel.files import atomic_write, let_others_read
from m2t_accel.pictures import plain_words, save_picture, thumbnail

THUMBNAIL_SIZE = 96  # pixels
MIN_MAPPED = 10  # images on a map


@device_errors_in_one_line
def embed_dataset(config: EmbedConfig) -> list[str]:
    """Write the features of a split, map.png and neighbours.png. Return lines for the user. A collective call.

    Raises:
        ConfigurationError: the launch, the encoder or the images are not usable, or a file cannot be written.
    """
    evaluation = start_evaluation(config)
    config, accelerator, data = evaluation.config, evaluation.accelerator, evaluation.images
    images = data.train if config.split == "train" else data.validation
    if images is None:
        raise ConfigurationError(f"--split validation: {config.dataset} has no validation split with labels")
    if open_folder(evaluation) is not None:
        return [f"{config.output_dir} is already complete"]
    accelerator.print(f"{evaluation.loaded.note}\n{data.introduction}")
    with dead_workers_in_one_line():
        batches = embed_images(evaluation.encoder, images, config, accelerator)
        features = gather_features(batches, len(images), accelerator, torch.device("cpu"))
    if not len(features.samples):
        raise none_decoded("images", images, config)
    if not accelerator.is_main_process:
        return []
    with write_errors_in_one_line("output_dir", config.output_dir):
        return write_embedding(evaluation, images, features)


def write_embedding(evaluation: Evaluation, images: Dataset, features: Features) -> list[str]:
    """Write the files and pictures on the main process. Return lines for the user.

    Raises:
        OSError: a file cannot be written.
    """
    config, folder = evaluation.config, Path(evaluation.config.output_dir)
    samples = features.samples.numpy()
    labels = read_labels(images)[samples] if "label" in images.features else None
    names = images.features["label"].names if labels is not None else None
    rows = images.select_columns(["image"])["image"]
    paths = [row and row["path"] for row in rows]
    paths = [paths[sample] for sample in samples]
    in_files = [name for name in ("offset", "size") if name in images.features]  # many images have the path of a tar
    places = {name: images.with_format("arrow")[name][:].to_numpy()[samples] for name in in_files}
    file = folder / f"features.{config.format}"
    write_features(file, features, paths, places, labels, names)
    lines = [f"{file}: {count(len(samples), 'image')}, {features.features.shape[1]} features each"]
    if len(samples) < len(images):
        first = first_broken([(images, left_out(images, features.samples))], config)
        lines.append(f"{count(len(images) - len(samples), 'image')} cannot be decoded, and left out{first}")
    chosen = evenly_spaced(len(samples), config.map_images)
    if len(chosen) >= MIN_MAPPED:
        draw_map(folder / "map.png", features.features[chosen], None if labels is None else labels[chosen], names)
        lines.append(f"{folder / 'map.png'}: t-SNE of {len(chosen):,} images")
    elif config.map_images:
        lines.append(f"no map.png: a map takes at least {MIN_MAPPED} images, not {len(chosen)}")
    if config.query_images and len(samples) > 1:
        draw_neighbours(folder / "neighbours.png", images, features, labels, names, config)
        lines.append(f"{folder / 'neighbours.png'}: images, and their nearest neighbours by cosine")
    data = {config.split: {"images": len(samples)}}
    if labels is not None:
        data[config.split]["fingerprint"] = fingerprint(features.digests, features.samples.new_tensor(labels))
    write_result(evaluation, {}, {**data, "undecodable": len(images) - len(samples)}, 0.0)
    return lines


def evenly_spaced(number: int, limit: int) -> np.ndarray:
    """Return at most `limit` evenly spaced numbers of range(number)."""
    return np.arange(number) if number <= limit else np.linspace(0, number - 1, limit).round().astype(int)


def write_features(
    file: Path,
    features: Features,
    paths: Sequence[str | None],
    places: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    names: list[str] | None,
) -> None:
    """Write features with their sample numbers, paths and labels atomically, as parquet or safetensors.

    Args:
        places: for images that are parts of files, their `offset` and `size` in bytes.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(file) as temporary:
        if file.suffix == ".safetensors":
            tensors = {"features": features.features.contiguous(), "samples": features.samples.contiguous()}
            tensors |= {f"{name}s": torch.from_numpy(numbers) for name, numbers in places.items()}
            if labels is not None:
                tensors["labels"] = features.samples.new_tensor(labels)
            # safetensors has no tensors of text, and its header holds 100 MB at most.
            texts = [(path or "").encode() for path in paths]
            tensors["paths"] = torch.from_numpy(np.frombuffer(bytearray().join(texts), np.uint8))
            tensors["path_lengths"] = torch.tensor([len(text) for text in texts])
            try:
                save_file(tensors, temporary, metadata={"classes": "\n".join(names)} if names else None)
            except SafetensorError as error:  # raised for a full disk
                raise OSError(None, str(error), str(file)) from None
            let_others_read(temporary)
        else:
            values = pyarrow.array(features.features.numpy().ravel())
            columns = {
                "sample": pyarrow.array(features.samples.numpy()),
                "path": pyarrow.array(paths, pyarrow.string()),
                **{name: pyarrow.array(numbers) for name, numbers in places.items()},
                "features": pyarrow.FixedSizeListArray.from_arrays(values, features.features.shape[1]),
            }
            if labels is not None:
                columns["label"] = pyarrow.array(labels)
                columns["class"] = pyarrow.array([names[label] for label in labels])
            parquet.write_table(pyarrow.table(columns), temporary)


@plain_words()
def draw_map(picture: Path, features: Tensor, labels: np.ndarray | None, names: list[str] | None) -> None:
    """Draw features (N, C) as points in the plane, placed by t-SNE of their cosines and coloured by label."""
    from matplotlib import colormaps  # late: importing it takes 1 s
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    directions = functional.normalize(features, dim=1).numpy()
    perplexity = min(30.0, (len(directions) - 1) / 3)
    points = TSNE(metric="cosine", perplexity=perplexity, init="random", random_state=0).fit_transform(directions)
    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    size = min(30.0, 20000 / len(points))
    if labels is None:
        axes.scatter(*points.T, s=size, linewidths=0)
    else:
        colours = colormaps["tab20" if len(names) <= 20 else "hsv"].resampled(max(2, len(names)))
        for label in np.unique(labels):
            of_label = points[labels == label]
            axes.scatter(*of_label.T, s=size, linewidths=0, color=colours(int(label)), label=names[label])
        if len(np.unique(labels)) <= 20:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2)
    axes.set_title(f"t-SNE of {len(points):,} images' features (cosine, perplexity {perplexity:.3g})")
    save_picture(figure, picture)


@plain_words()
def draw_neighbours(
    picture: Path,
    images: Dataset,
    features: Features,
    labels: np.ndarray | None,
    names: list[str] | None,
    config: EmbedConfig,
) -> None:
    """Draw evenly spaced images, each followed by its nearest neighbours with their cosine and class."""
    from matplotlib.figure import Figure  # late: importing it takes 1 s

    queries = evenly_spaced(len(features.samples), config.query_images)
    directions = functional.normalize(features.features, dim=1)
    similarities = directions[queries] @ directions.T
    similarities[np.arange(len(queries)), queries] = -1  # an image is not its own neighbour
    count = min(config.nearest, len(directions) - 1)
    best, places = similarities.topk(count, dim=1)
    figure = Figure(figsize=(1.25 * (count + 1) + 0.3, 1.65 * len(queries) + 0.4), layout="constrained")
    axes = figure.subplots(len(queries), count + 1, squeeze=False)
    for i, query in enumerate(queries):
        shown = [int(query), *places[i].tolist()]
        captions = ["", *(f"{value:.3f}" for value in best[i].tolist())]
        for place, axis, caption in zip(shown, axes[i], captions, strict=True):
            (row,) = read_rows(images, [int(features.samples[place])])
            axis.imshow(thumbnail(decode_image(row, config.max_image_pixels), THUMBNAIL_SIZE))
            axis.set_xticks([])
            axis.set_yticks([])
            is_right = labels is None or labels[place] == labels[query]
            label = "" if labels is None else names[labels[place]]
            axis.set_xlabel(f"{caption}\n{label[:20]}", fontsize=7, color="black" if is_right else "firebrick")
            for side in axis.spines.values():
                side.set_visible(place == query)
                side.set_linewidth(2)
    figure.suptitle(
        "left: an image; beside it its nearest neighbours by cosine"
        + ("" if labels is None else ", red: another class"),
        fontsize=8,
    )
    save_picture(figure, picture)

"""How a run is doing, measured and told as it goes: kNN of the teacher, spread of its embeddings, report, curves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from m2t_accel.data import BadImage
from m2t_accel.features import measure_knn
from m2t_accel.launch import gather_from_all, tell_all
from m2t_accel.pictures import plain_words
from m2t_accel.progress import progress_bar
from m2t_accel.recipes import PretrainConfig
from m2t_accel.run_folder import JsonLines, RunFolder
from m2t_accel.settings import ConfigurationError
from m2t_accel.sources import ImageData

# kNN during training is a sign of health, not a result: on large sets an even sample is enough for it.
MAX_KNN_BANK = 50_000
MAX_KNN_QUERIES = 10_000
MIN_BAD_ALLOWED = 10  # undecodable images, whatever their share
COLLAPSED = 0.01  # spread of embeddings (1 at most) that differ by rounding and little more
MAX_BAD_TOLD = 10  # of them on the screen; all are in bad_images.jsonl


def embedding_std(embeddings: Tensor) -> Tensor:
    """How far unit-norm embeddings (N, C) spread: 1 evenly over the sphere, 0 all in one point (collapse).

    The mean over the dimensions of the standard deviation over the batch, times √C. Source: SimSiam
    (arXiv 2011.10566), section 4.1, there without the factor.
    """
    return embeddings.std(dim=0).mean() * math.sqrt(embeddings.shape[1])


class KnnMonitor:
    """kNN accuracy of an encoder on the held-out images."""

    def __init__(self, data: ImageData, config: PretrainConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.num_classes = len(data.class_names)
        self.told = False
        self.bank, self.queries = (
            images.select(np.linspace(0, len(images) - 1, limit).astype(int)) if len(images) > limit else images
            for images, limit in ((data.bank, MAX_KNN_BANK), (data.validation, MAX_KNN_QUERIES))
        )

    def measure(self, encoder: nn.Module, after_batch: Callable[[], None]) -> float:
        """Top-1 accuracy in evaluation mode, from 0 to 1, of what can be decoded; the same on every process.

        `after_batch` may end it by an exception, if it does so on every process.
        """
        result = measure_knn(
            encoder,
            self.bank,
            self.queries,
            self.num_classes,
            self.config,
            self.accelerator,
            after_batch=after_batch,
        )
        if result.num_broken and not self.told:
            self.told = True
            self.accelerator.print(f"kNN is measured without {result.num_broken} images that cannot be decoded")
        return result.accuracies[20]


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """The whole lines of a metrics.jsonl."""
    return JsonLines(path).read()


@plain_words()
def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw what metrics.jsonl holds as one picture: loss, kNN, spread of the embeddings, and the schedules."""
    from matplotlib.figure import Figure  # late: a second of import that only the end of a run needs

    rows = list(read_metrics(metrics))

    def series(name: str) -> tuple[list[float], list[float]]:
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        return [epoch for epoch, _ in points], [value for _, value in points]

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title)
    loss, knn, spread, rates = figure.subplots(2, 2).flat
    loss.plot(*series("loss"))
    loss.set_title("loss (0 aligned, 4 unrelated)")
    epochs, accuracies = series("knn_top1")
    if accuracies:
        knn.plot(epochs, [100 * accuracy for accuracy in accuracies], marker="o", markersize=4)
        knn.set_title(f"teacher kNN top-1 (%): {100 * accuracies[0]:.1f} → {100 * accuracies[-1]:.1f}")
    else:
        knn.set_title("teacher kNN: not measured")
        knn.set_axis_off()
    spread.plot(*series("embedding_std"))
    spread.set_ylim(0, 1.1)
    spread.set_title("embedding standard deviation × √C (0 is collapse)")
    rates.plot(*series("weight_momentum"), label="weight momentum")
    rates.plot(*series("statistics_momentum"), label="statistics momentum")
    epochs, values = series("learning_rate")
    peak = max(values, default=1.0)
    rates.plot(epochs, [value / peak for value in values], label=f"learning rate / {peak:.3g}")
    rates.set_title("schedules")
    rates.legend(loc="center right")
    for axes in (loss, knn, spread, rates):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


class TooManyBadImagesError(ConfigurationError):
    """More images cannot be decoded than are allowed; what was trained so far is sound."""


class BadImages:
    """The images of a run that cannot be decoded: each is told of once and written to bad_images.jsonl."""

    def __init__(self, config: PretrainConfig, num_images: int, known: Iterable[BadImage] = ()) -> None:
        self.config = config
        self.num_images = num_images
        self.known: dict[int, BadImage] = {image.sample: image for image in known}

    def add(self, images: Sequence[BadImage]) -> list[BadImage]:
        """Take in what all processes have met; what is new comes back, in the order of the samples."""
        new = {image.sample: image for image in images if image.sample not in self.known}
        self.known |= new
        return [new[sample] for sample in sorted(new)]

    def told(self, new: Sequence[BadImage]) -> Iterator[str]:
        """A line for people about each of the first ten, and about the others together."""
        number = max(0, MAX_BAD_TOLD - (len(self.known) - len(new)))
        for image in new[:number]:
            yield f"cannot be decoded, another image is shown instead: {image.path} ({image.reason})"
        if new[number:]:
            yield (
                f"{len(new[number:])} more images cannot be decoded, {len(self.known)} in all: see "
                f"{self.config.output_dir}/bad_images.jsonl"
            )

    def check(self) -> None:
        """Stop where there are too many.

        Raises:
            TooManyBadImagesError: there are more than --max_bad_fraction allows.
        """
        allowed = max(MIN_BAD_ALLOWED, int(self.config.max_bad_fraction * self.num_images))
        if len(self.known) > allowed:
            raise TooManyBadImagesError(
                f"{len(self.known)} of {self.num_images:,} images cannot be decoded, more than the {allowed} that "
                f"--max_bad_fraction {self.config.max_bad_fraction:g} allows (ten always are): they are listed in "
                f"{self.config.output_dir}/bad_images.jsonl; repair them and remove that file, or give a larger "
                "--max_bad_fraction"
            )


class Report:
    """What a run shows and writes while it trains: a progress bar, metrics.jsonl and a tracker.

    `add` and `tick` cost the device nothing; `averages` waits for it and is a collective call. Where a line cannot be
    written, the run goes on, and the line is written with the next one.
    """

    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Accelerator,
        folder: RunFolder,
        total_steps: int,
        num_images: int,
        first_step: int = 0,
        seconds: float = 0.0,
        rows: Sequence[Tensor] = (),
    ) -> None:
        """`seconds` were spent before `first_step`; `rows`: as the attribute, of steps before it."""
        self.accelerator = accelerator
        self.config = config
        self.folder = folder
        # Each process knows what all have met: the first has it from the file.
        known = [BadImage(**row) for row in folder.bad_images.read()] if accelerator.is_main_process else []
        self.bad_images = BadImages(config, num_images, tell_all(known))
        self.rows = list(rows)  # (loss, spread) of this process's sub-batches since the last line
        self.bad: list[BadImage] = []
        self.num_steps = 0
        self.told_of_collapse = False
        self.last = time.perf_counter()
        self.started = self.last - seconds
        self.bar = None
        if config.tracker != "none":
            settings = {k: str(v) if isinstance(v, tuple) or v is None else v for k, v in vars(config).items()}
            accelerator.init_trackers("tracker", config=settings)
        self.trackers = accelerator.trackers if config.tracker != "none" else []
        if accelerator.is_main_process:
            self.bar = progress_bar("step", total_steps, initial=first_step)

    def add(self, loss: Tensor, spread: Tensor, bad: Sequence[BadImage]) -> None:
        """Take in a sub-batch."""
        self.rows.append(torch.stack([loss, spread]))
        self.bad += bad

    def tick(self) -> None:
        """Count an optimizer step."""
        self.num_steps += 1
        if self.bar is not None:
            self.bar.update()

    def averages(self) -> dict[str, float]:
        """Loss and spread averaged over all sub-batches of all processes since the last line, and the speed.

        Raises:
            TooManyBadImagesError: on every process.
        """
        mean = torch.stack(self.rows).mean(dim=0)
        share_bad = mean.new_tensor([float(len(self.bad) > 0)])
        loss, spread, share_bad = self.accelerator.reduce(torch.cat([mean, share_bad]), reduction="mean").tolist()
        if share_bad > 0:
            self.tell_bad_images()
        self.bad_images.check()
        speed = self.num_steps * self.config.batch_size / (time.perf_counter() - self.last)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} images/s", refresh=False)
        return {"loss": loss, "embedding_std": spread} | ({"images_per_second": speed} if self.num_steps else {})

    def tell_bad_images(self) -> None:
        """Write down the images that processes could not decode since the last call, and tell of them.

        A collective call.
        """
        new = self.bad_images.add([image for images in gather_from_all(self.bad) for image in images])
        self.bad.clear()
        if self.accelerator.is_main_process:
            self.write_lines(self.folder.bad_images, [image._asdict() for image in new])
            for line in self.bad_images.told(new):
                self.say(line)

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Write one line of metrics; the clock of the speed starts again, so evaluations do not count."""
        self.rows.clear()
        self.num_steps = 0
        if self.accelerator.is_main_process:
            line = {"step": step, "epoch": round(epoch, 6), **values, "seconds": round(self.seconds(), 3)}
            self.write_lines(self.folder.metrics, [line])
            if "knn_top1" in values:
                self.say(f"epoch {epoch:g}: teacher kNN top-1 {100 * values['knn_top1']:.2f} %")
        if self.config.tracker != "none":
            self.accelerator.log({"epoch": epoch, **values}, step=step)
        self.last = time.perf_counter()

    def check_collapse(self, step: int, spread: float) -> None:
        """Warn of embeddings that have fallen into one point, or end the run for it.

        Raises:
            ConfigurationError: they have, and --stop_on_collapse is given; the same on every process.
        """
        collapsed = spread < COLLAPSED
        told, self.told_of_collapse = self.told_of_collapse, collapsed
        if not collapsed or told:
            return
        message = (
            f"step {step}: the teacher's embeddings have collapsed (embedding_std {spread:.4f}; 1 is spread evenly, "
            f"below {COLLAPSED} is one point)"
        )
        if self.config.stop_on_collapse:
            raise ConfigurationError(
                f"{message}, and --stop_on_collapse ends the run: try a smaller --learning_rate_per_256 or a "
                f"--weight_momentum nearer to 1, in another --output_dir"
            )
        self.say(f"warning: {message}; --stop_on_collapse would end the run here")

    def write_lines(self, file: JsonLines, rows: Sequence[dict[str, object]]) -> None:
        try:
            file.add(rows)
        except OSError as error:
            self.say(f"warning: {file.path} cannot be written ({error.strerror}); its lines wait for the next time")

    def say(self, line: str) -> None:
        """Print a line above the bar, by the first process."""
        if self.bar is not None:
            self.bar.write(line)
        elif self.accelerator.is_main_process:
            print(line, flush=True)

    def seconds(self) -> float:
        """Seconds that the run has taken, in all its parts."""
        return time.perf_counter() - self.started

    def close(self) -> None:
        """End the bar and the tracker, whether the run ended well or not."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        for tracker in self.trackers:
            tracker.finish()
        self.trackers = []


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min 3 s, 5 h 12 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

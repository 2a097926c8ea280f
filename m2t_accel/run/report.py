"""The report of a run in progress: metrics, kNN accuracy of the teacher, bad images, collapse."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from m2t_accel.config.fields import ConfigurationError, count
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data import photometry
from m2t_accel.data.loader import upload
from m2t_accel.data.order import num_steps_per_epoch
from m2t_accel.data.sources import ImageData
from m2t_accel.data.views import BadImage
from m2t_accel.distributed.interruption import HostCopy, NoBatchError, reach_agreement
from m2t_accel.distributed.launch import collective_timeout, compiles_networks, hardware
from m2t_accel.distributed.processes import broadcast_object, gather_to_all
from m2t_accel.evaluation.features import NotFiniteError, first_broken, read_labels
from m2t_accel.evaluation.knn import KnnResult, few_neighbours, measure_knn
from m2t_accel.files import JsonLines
from m2t_accel.progress import progress_bar
from m2t_accel.run.folder import RunFolder
from m2t_accel.run.monitor import Monitor, chance_level
from m2t_accel.run.page import RunPage
from m2t_accel.run.resume import Progress
from m2t_accel.run.trackers import Trackers
from m2t_accel.step import SubBatchResult, TrainingStep

# kNN during training shows whether the run is healthy; for that, an evenly spaced sample of a large dataset is enough.
KNN_NEIGHBOURS = 20
MAX_KNN_BANK = 50_000
MAX_KNN_QUERIES = 10_000
MIN_BAD_ALLOWED = 10  # undecodable images are allowed in every run, whatever their share
COLLAPSED = 0.01  # embedding_std (1 at most) below which embeddings differ by little more than rounding
MAX_BAD_PRINTED = 10  # bad images are printed one by one; bad_images.jsonl lists all


class KnnMonitor:
    """Measures the kNN accuracy of an encoder on the held-out images."""

    def __init__(self, data: ImageData, config: PretrainConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.num_classes = len(data.class_names)
        self.broken_reported = False
        self.bank, self.queries = (
            images.select(np.linspace(0, len(images) - 1, limit).astype(int)) if len(images) > limit else images
            for images, limit in ((data.bank, MAX_KNN_BANK), (data.validation, MAX_KNN_QUERIES))
        )
        if len(self.bank) < KNN_NEIGHBOURS:
            accelerator.print(few_neighbours(KNN_NEIGHBOURS, len(self.bank)))

    def measure(self, encoder: nn.Module, after_batch: Callable[[], None]) -> KnnResult:
        """Return the result for k = 20 on the images that can be decoded. A collective call.

        Args:
            after_batch: called after each batch; it may raise, on every process.
        """
        result = measure_knn(
            encoder,
            self.bank,
            self.queries,
            self.num_classes,
            self.config,
            self.accelerator,
            (KNN_NEIGHBOURS,),
            after_batch=after_batch,
        )
        if any(result.broken) and not self.broken_reported:
            self.broken_reported = True
            number = sum(map(len, result.broken))
            first = first_broken(list(zip((self.bank, self.queries), result.broken, strict=True)), self.config)
            self.accelerator.print(f"kNN is measured without {count(number, 'image')} that cannot be decoded{first}")
        return result


class TooManyBadImagesError(ConfigurationError):
    """More images cannot be decoded than are allowed; the state of the run is valid, so it can be saved."""


class BadImages:
    """The images of a run that cannot be decoded, each of which is reported once."""

    def __init__(self, config: PretrainConfig, num_images: int, known: Iterable[BadImage] = ()) -> None:
        self.config = config
        self.num_images = num_images
        self.known: dict[int, BadImage] = {image.sample: image for image in known}

    def add(self, images: Sequence[BadImage]) -> list[BadImage]:
        """Add images that some process could not decode. Return the new ones in the order of the samples."""
        new = {image.sample: image for image in images if image.sample not in self.known}
        self.known |= new
        return [new[sample] for sample in sorted(new)]

    def describe(self, new: Sequence[BadImage]) -> Iterator[str]:
        """Yield a line about each of the first ten bad images of the run, and one about the others together."""
        number = max(0, MAX_BAD_PRINTED - (len(self.known) - len(new)))
        for image in new[:number]:
            yield f"cannot be decoded, another image is shown instead: {image.path} ({image.reason})"
        if new[number:]:
            yield (
                f"{count(len(new[number:]), 'more image')} cannot be decoded, {len(self.known)} in all: see "
                f"{self.config.output_dir}/bad_images.jsonl"
            )

    def check(self) -> None:
        """Check that the number of bad images is allowed.

        Raises:
            TooManyBadImagesError: the number is larger than --max_bad_fraction allows.
        """
        allowed = max(MIN_BAD_ALLOWED, int(self.config.max_bad_fraction * self.num_images))
        if len(self.known) > allowed:
            raise TooManyBadImagesError(
                f"{len(self.known)} of {self.num_images:,} images cannot be decoded, more than the {allowed} that "
                f"--max_bad_fraction {self.config.max_bad_fraction:g} allows (ten are always allowed): "
                f"{self.config.output_dir}/bad_images.jsonl lists them; repair them and remove that file, or give a "
                "larger --max_bad_fraction"
            )


class Report:
    """Show and record the progress of a run: a progress bar, metrics.jsonl, bad_images.jsonl and trackers.

    `add` does not wait for the device; `write_if_due` does, and is a collective call. If a line cannot be
    written, the run continues, and the line is written with the next one.

    Args:
        step: the step whose networks are monitored.
        progress: progress of the run; the report updates its `reported`, `health` and `alarms`.
        rows: (2,) loss and spread of each sub-batch of this process since the last line of metrics.
    """

    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Accelerator,
        folder: RunFolder,
        data: ImageData,
        step: TrainingStep,
        progress: Progress,
        steps_per_epoch: int,
        trackers: Trackers,
        rows: Sequence[Tensor] = (),
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.folder = folder
        self.progress = progress
        self.steps_per_epoch = steps_per_epoch
        self.knn = KnnMonitor(data, config, accelerator) if config.evaluate_every else None
        chance = chance_level(read_labels(self.knn.queries)) if self.knn is not None else None
        self.monitor = Monitor(config, accelerator, step, progress, steps_per_epoch, chance)
        # Process 0 reads the images that are known to be bad from the file.
        known = [BadImage(**row) for row in folder.bad_images.read()] if accelerator.is_main_process else []
        self.bad_images = BadImages(config, len(data.train), broadcast_object(known))
        self.rows = list(rows)
        self.bad: list[BadImage] = []
        self.num_steps = 0  # since the last line of metrics
        self.collapse_reported = False
        self.last = time.perf_counter()
        self.started = self.last - progress.seconds
        self.bar = None
        self.trackers = trackers
        self.page = None
        if accelerator.is_main_process:
            trackers.add(folder.metrics.read())  # a tracker may lack lines of earlier starts
            self.bar = progress_bar("step", config.total_steps(steps_per_epoch), initial=progress.step)
            self.page = RunPage(folder.path, config, data, self.print_line)
            self.page.save_views()

    def write_if_due(self, encoder: nn.Module, stop_if_asked: Callable[[], None]) -> None:
        """Write the line of metrics that is due after this step, unless it exists; evaluate if that is due too.

        Args:
            encoder: the teacher's.
            stop_if_asked: called between the batches of an evaluation; it may raise, on every process.

        Raises:
            StopRequestedError: raised by `stop_if_asked`; the line is not written.
            ConfigurationError: too many images cannot be decoded, or the embeddings have collapsed.
        """
        step, config = self.progress.step, self.config
        evaluates = self.knn is not None and is_due(step, self.steps_per_epoch, config)
        is_line = step % config.log_every == 0 or step == config.total_steps(self.steps_per_epoch)
        if self.progress.reported == step or not (evaluates or (is_line and step > 0)):
            return
        values: dict[str, object] = {}
        alarms: list[str] = []
        if step > 0:
            values = self.averages() | dataclasses.asdict(config.schedule(step - 1, self.steps_per_epoch))
            if self.progress.skipped:
                values["skipped_steps"] = self.progress.skipped
            self.collect_health()
            values |= self.progress.health
            alarms += self.check_collapse(step, values["embedding_std"])
        seconds = time.perf_counter() - self.last
        if evaluates:
            try:
                found = self.knn.measure(encoder, stop_if_asked)
            except NoBatchError:  # between two steps, so that the run can be saved
                stop_if_asked()
                raise
            except NotFiniteError as error:  # float16 overflows: the run may recover, and would fail here again
                alarms.append(f"step {step}: teacher kNN is not measured: {error}")
            else:
                (values["knn_top1"],) = found.accuracies.values()
                if self.page is not None:
                    self.page.save_neighbours(step / self.steps_per_epoch, self.knn.bank, self.knn.queries, found)
        alarms += self.monitor.check_line(values, seconds)
        self.print_alarms(alarms)
        if alarms:
            values["alarms"] = [*values.get("alarms", ()), *alarms]  # those of its health are printed already
        self.write(step, step / self.steps_per_epoch, values)
        self.progress.reported, self.progress.health = step, {}

    def add(self, results: Sequence[SubBatchResult]) -> None:
        """Count an optimizer step, and record its sub-batches."""
        self.rows += [torch.stack([result.loss, result.embedding_std]) for result in results]
        self.num_steps += 1
        if self.bar is not None:
            self.bar.update()

    def collect_health(self) -> None:
        """Collect the health of the last step for the line that is due, and print alarms. A collective call."""
        step = self.progress.step
        self.print_alarms(self.monitor.collect(self.config.schedule(step - 1, self.steps_per_epoch)))

    def averages(self) -> dict[str, float]:
        """Return loss and spread averaged over all sub-batches since the last line, and the speed. A collective call.

        The wait for data is that of the process that waited longest, because the others wait for it.

        Raises:
            TooManyBadImagesError: on every process.
        """
        rank, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        mean = torch.stack(self.rows).mean(dim=0)
        others = [float(len(self.bad) > 0)] + [0.0] * num_processes
        others[1 + rank] = self.monitor.data_wait.seconds / (time.perf_counter() - self.last)
        others = upload(torch.tensor(others, dtype=mean.dtype), mean.device)  # a plain copy would wait for the GPU
        averages = HostCopy(self.accelerator.reduce(torch.cat([mean, others]), reduction="mean"))
        reach_agreement(collective_timeout(self.config), has_arrived=averages.has_arrived)
        loss, spread, share_bad, *waits = averages.tolist()
        if share_bad > 0:
            self.report_bad_images()
        self.bad_images.check()
        speed = self.num_steps * self.config.batch_size / (time.perf_counter() - self.last)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} images/s", refresh=False)
        values = {"loss": loss, "agreement": 1 - loss / 4, "embedding_std": spread}
        if self.num_steps:
            values |= {"images_per_second": speed, "data_wait": min(1.0, num_processes * max(waits))}
        return values

    def report_bad_images(self) -> None:
        """Print and write the images that any process could not decode since the last call. A collective call."""
        new = self.bad_images.add([image for images in gather_to_all(self.bad) for image in images])
        self.bad.clear()
        if self.accelerator.is_main_process:
            self.write_lines(self.folder.bad_images, [image._asdict() for image in new])
            for line in self.bad_images.describe(new):
                self.print_line(line)

    def write(self, step: int, epoch: float, values: dict[str, object]) -> None:
        """Write one line of metrics, and restart the clock of the speed, which does not count evaluations."""
        self.rows.clear()
        self.num_steps = 0
        self.monitor.data_wait.seconds = 0.0
        if self.accelerator.is_main_process:
            line = {"step": step, "epoch": round(epoch, 6), **values, "seconds": round(self.seconds(), 3)}
            self.write_lines(self.folder.metrics, [line])
            self.trackers.add([line])
            for warning in self.trackers.warnings():
                self.print_line(warning)
            if "knn_top1" in values:
                self.print_line(f"epoch {epoch:g}: teacher kNN top-1 {100 * values['knn_top1']:.2f} %")
            self.page.write_if_due()
        self.last = time.perf_counter()

    def check_collapse(self, step: int, spread: float) -> list[str]:
        """Return an alarm when the teacher's embeddings collapse, or end the run.

        Raises:
            ConfigurationError: the embeddings have collapsed and --stop_on_collapse is given; on every process.
        """
        collapsed = spread < COLLAPSED
        reported, self.collapse_reported = self.collapse_reported, collapsed
        if not collapsed or reported:
            return []
        message = (
            f"step {step}: the teacher's embeddings have collapsed (embedding_std {spread:.4f}; 1 is an even spread, "
            f"below {COLLAPSED} all embeddings are nearly the same)"
        )
        if self.config.stop_on_collapse:
            raise ConfigurationError(
                f"{message}, and --stop_on_collapse ends the run: try a smaller --learning_rate_per_256 or a "
                f"--weight_momentum nearer to 1, in another --output_dir"
            )
        return [f"{message}; --stop_on_collapse would end the run"]

    def write_lines(self, file: JsonLines, rows: Sequence[dict[str, object]]) -> None:
        try:
            file.add(rows)
        except OSError as error:
            self.print_line(f"warning: {file.path} cannot be written ({error.strerror}); the next write adds its lines")

    def print_alarms(self, alarms: Iterable[str]) -> None:
        """Print alarms above the progress bar, on process 0."""
        for alarm in alarms:
            self.print_line(f"warning: {alarm}")

    def print_line(self, line: str) -> None:
        """Print a line above the progress bar, on process 0."""
        if self.bar is not None:
            self.bar.write(line)
        elif self.accelerator.is_main_process:
            print(line, flush=True)

    def seconds(self) -> float:
        """Return the seconds that the run has taken, in all its parts."""
        return time.perf_counter() - self.started

    def close(self) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def is_due(step: int, steps_per_epoch: int, config: PretrainConfig) -> bool:
    """Return whether kNN is measured after so many steps: at step 0, every `evaluate_every` epochs, and at the end."""
    return step % (config.evaluate_every * steps_per_epoch) == 0 or step == config.total_steps(steps_per_epoch)


def introduction(
    config: PretrainConfig, data: ImageData, encoder: nn.Module, total_steps: int, accelerator: Accelerator
) -> str:
    """Return lines that describe the images, the encoder, the length of the run and the hardware."""
    size = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    length = count(config.epochs, "epoch") if config.max_steps is None else f"{num_epochs(config, data):.3g} epochs"
    lines = [
        data.introduction,
        f"{config.encoder} ({size:.1f} M parameters), {length}, {count(total_steps, 'step')} of "
        f"{config.batch_size} images ({config.num_virtual_devices} × {config.device_batch_size}), on "
        f"{hardware(accelerator)}",
    ]
    # From Python, `recipe` is `digits` unless it is set, but its settings may not be those of digits.
    if config.recipe == "digits" and config.dataset != "digits" and config.hue == 0:
        lines.append(
            f"Note: recipe digits is for 8-pixel digits (views of {config.image_size} pixels, no flip, no colour); "
            "for photographs give --recipe 8x2080Ti-b256-100ep or another of --recipe list"
        )
    if config.teacher_statistics != "momentum":
        lines.append(f"Note: --teacher_statistics {config.teacher_statistics} is a method to compare with this one")
    compiled = ["the colours"] if photometry.is_compiled(accelerator.device) else []
    compiled += ["the networks"] if compiles_networks() else []
    if compiled:
        lines.append(f"The first step compiles {' and '.join(compiled)}, which may take minutes.")
    return "\n".join(lines)


def settle_evaluation(config: PretrainConfig, data: ImageData) -> PretrainConfig:
    """Return the configuration with a number for `evaluate_every`: about ten evaluations if there are labels, else 0.

    Raises:
        ConfigurationError: --evaluate_every asks for evaluations, but no labelled images can be held out.
    """
    if config.evaluate_every and data.lacks:
        raise ConfigurationError(
            f"--evaluate_every {config.evaluate_every} needs labelled images for kNN: use --evaluate_every 0. "
            f"{config.dataset} has {data.lacks}"
        )
    if config.evaluate_every is None:
        every = max(1, round(num_epochs(config, data) / 10)) if data.validation is not None else 0
        config = dataclasses.replace(config, evaluate_every=every)
    return config


def num_epochs(config: PretrainConfig, data: ImageData) -> float:
    """Return the number of epochs of the run, which `max_steps` may make fractional."""
    steps_per_epoch = num_steps_per_epoch(len(data.train), config.batch_size)
    return config.total_steps(steps_per_epoch) / steps_per_epoch

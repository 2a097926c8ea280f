"""Pretraining: the set-up of a run, and the loop over its optimizer steps. The step itself is m2t_accel.step."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Mapping
from itertools import chain, islice

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from m2t_accel import __version__
from m2t_accel.config.data import check_enough_images
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.pretrain import PretrainConfig, check_inputs
from m2t_accel.data.loader import create_loader, dead_workers_in_one_line, read
from m2t_accel.data.order import num_steps_per_epoch
from m2t_accel.data.photometry import photometry
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.sources import ImageData, load_images
from m2t_accel.data.views import TwoViews
from m2t_accel.distributed.device import device_errors_in_one_line
from m2t_accel.distributed.interruption import (
    NoBatchError,
    StopRequestedError,
    StopSignals,
    end_with_launcher,
    report_lost_processes,
)
from m2t_accel.distributed.launch import collective_timeout, command, hardware, start_accelerator
from m2t_accel.distributed.processes import broadcast_object, check_same_images, on_all_processes
from m2t_accel.hub.warm_start import load_warm_start
from m2t_accel.model import Teacher, create_encoder, create_student, is_stock
from m2t_accel.optim import create_optimizer
from m2t_accel.output import lasting_output
from m2t_accel.pages.record import read_json
from m2t_accel.run import resume
from m2t_accel.run.completion import VERSIONS, finish
from m2t_accel.run.folder import RunFolder, Start
from m2t_accel.run.guard import Guard, ImagesLostError
from m2t_accel.run.output_dir import COMPLETE, check_output_dir
from m2t_accel.run.page import refresh_old_page
from m2t_accel.run.report import Report, TooManyBadImagesError, introduction, settle_evaluation
from m2t_accel.run.saving import Saver
from m2t_accel.run.state import RunState
from m2t_accel.run.trackers import Trackers
from m2t_accel.step import TrainingStep


@device_errors_in_one_line
def pretrain(
    config: PretrainConfig, dataset: Dataset | None = None, encoder: nn.Module | None = None
) -> Teacher | None:
    """Train an encoder as the configuration says, and write the run's folder.

    A run that was stopped resumes from its last checkpoint. Every process of a launch makes this call, with the same
    configuration.

    Args:
        config: all settings of the run.
        dataset: images to train on, with a column of images and, for kNN, one of labels. `config.dataset` is then
            only its name. Default: the images that `config.dataset` names.
        encoder: a module with BatchNorm that takes images (N, 3, H, W) and returns features (N, C), or a `transformers`
            model. A copy of it is trained. Default: the encoder that `config.encoder` names.

    Returns:
        The trained teacher; None if the run was complete already.

    Raises:
        ConfigurationError: the launch, the images, the encoder, the output folder or the checkpoint is not usable, or
            the run was complete already with another encoder, and nothing has been written; or a loss is not finite;
            or too many images cannot be decoded.
        Interrupted: the run was stopped, or has lost a process; the same command resumes it.
    """
    check_types(dataset, encoder)
    timeout = collective_timeout(config)
    accelerator = start_accelerator(config, timeout)
    is_main = accelerator.is_main_process
    if encoder is not None:
        if config.init_from is not None:
            raise ConfigurationError(
                f"--init_from {config.init_from}: pretrain() was given an encoder: load its weights before the call"
            )
        config = dataclasses.replace(config, encoder=type(encoder).__name__)
        encoder = copy.deepcopy(encoder)  # a second call with it starts from the same weights
    folder = RunFolder(config.output_dir)

    def find_start() -> Start | None:
        if not is_main:
            return None
        check_output_dir(config)
        return folder.find_start(config)

    end_with_launcher()
    with report_lost_processes(accelerator):
        start = broadcast_object(on_all_processes(accelerator, find_start))
        if start.complete:
            if encoder is not None:
                on_all_processes(accelerator, lambda: resume.check_same_encoder(folder.path, encoder))
            if is_main:
                images = "" if dataset is None else f", trained on {read_json(folder.path / COMPLETE)['data']}"
                print(*start.remarks, f"{folder.path} is complete{images}: {folder.path}/encoder", sep="\n", flush=True)
                refresh_old_page(folder.path)
            return None
        on_all_processes(accelerator, lambda: check_inputs(config, dataset is None, encoder is None))
        warm = None
        if start.checkpoint is not None:
            config = resume.with_settled_settings(config, start.checkpoint.manifest)
        elif config.init_from is not None:
            warm = load_warm_start(config, accelerator)
            config = dataclasses.replace(config, encoder=warm.encoder)
            start = start._replace(remarks=(*start.remarks, *warm.lines), init_from=warm.record)
        data = on_all_processes(accelerator, lambda: load_images(config, dataset))  # process 0 fills the cache first
        check_enough_images(len(data.train), config)
        check_same_images(accelerator, data.note, data.fingerprint)
        config = settle_evaluation(config, data)
        architecture = warm.architecture if warm is not None else resume.saved_architecture(config, start)
        step = create_step(config, accelerator, encoder, architecture, warm.state if warm is not None else None)
    with (
        StopSignals() as signals,
        lasting_output(),
        contextlib.closing(folder),
        contextlib.ExitStack() as stack,  # closes the run after lost processes are reported: a save may take long
        report_lost_processes(accelerator, timeout),
    ):
        run = stack.enter_context(contextlib.closing(Run(config, data, folder, accelerator, step, start, signals)))
        try:
            train(run)
        except StopRequestedError as stop:
            raise signals.interruption(stop.number, run.stop()) from None
        except NoBatchError:  # in the middle of a step, so there is nothing to save
            run.saver.collect(wait=True)  # an earlier step may still be being written
            where = f"while it waited for a batch. {run.saver.describe_last_good()}; the same command continues"
            raise signals.interruption(signals.received, where) from None
        except (TooManyBadImagesError, ImagesLostError) as error:  # raised between two steps, on every process
            raise ConfigurationError(f"{error}. {run.saver.save_now()}; then the run resumes from there") from None
        if is_main:
            run.finish()
    return step.teacher


def check_types(dataset: object, encoder: object) -> None:
    """Check the types of what `pretrain` was given; None always passes.

    Raises:
        ConfigurationError: the images are not a `datasets.Dataset`, or the encoder is no module.
    """
    if not isinstance(dataset, Dataset | None):
        kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
        hint = "give one of its splits" if isinstance(dataset, dict) else "docs/python.md makes one from an array"
        raise ConfigurationError(f"pretrain() was given a dataset of type {kind}: a datasets.Dataset is needed; {hint}")
    if not isinstance(encoder, nn.Module | None):
        hint = f'; to name one, give its configuration encoder="{encoder}"' if isinstance(encoder, str) else ""
        raise ConfigurationError(
            f"pretrain() was given an encoder of type {type(encoder).__qualname__}: a torch.nn.Module is needed{hint}"
        )


def create_step(
    config: PretrainConfig,
    accelerator: Accelerator,
    encoder: nn.Module | None = None,
    architecture: PretrainedConfig | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> TrainingStep:
    """Create student, teacher and optimizer, the same on every process.

    Args:
        encoder: the encoder to train. Default: one of random weights.
        architecture: its configuration. Default: that of `config.encoder`.
        weights: weights and statistics that it starts from.

    Raises:
        ConfigurationError: the encoder cannot be created, has no BatchNorm, or takes no images of this size.
    """
    set_seed(config.seed)
    is_given = encoder is not None
    if encoder is None:
        encoder = on_all_processes(accelerator, lambda: create_encoder(config.encoder, architecture))
        if weights is not None:
            encoder.load_state_dict(weights, strict=True)
    student = create_student(encoder, config.image_size, config.hidden_size, config.projection_size, config.encoder)
    if is_given and isinstance(encoder, PreTrainedModel) and not is_stock(encoder, config.image_size):
        raise ConfigurationError(
            f"the {type(encoder).__name__} that pretrain() was given has been changed, so its configuration would load "
            "another network: put it into a module of your own that returns its features (N, C)"
        )
    try:
        teacher = Teacher(student, config.teacher_statistics)
    except ValueError as error:
        raise ConfigurationError(
            f"--encoder {config.encoder}: {error}; give a model with plain BatchNorm, such as resnet50"
        ) from None
    optimizer = create_optimizer(
        student,
        config.optimizer,
        config.learning_rate,
        config.optimizer_momentum,
        config.weight_decay,
        fused=True if accelerator.scaler is None else None,
    )
    if accelerator.process_index > 0:  # the networks are the same on all processes, the masks of dropout are not
        set_seed(config.seed + accelerator.process_index)
    return TrainingStep(student, teacher, optimizer, accelerator)


def train(run: Run) -> None:
    """Train to the last step, and save.

    Raises:
        StopRequestedError: a signal asks the run to end; every process is between two steps.
        ConfigurationError: a loss is not finite, or too many images cannot be decoded or read.
    """
    config, accelerator, step, progress = run.config, run.accelerator, run.step, run.progress
    encoder = step.teacher.encoder
    loader = create_loader(TwoViews(run.data.train, config), run.requests, config, accelerator.device)
    num_sub_batches = config.num_virtual_devices // accelerator.num_processes
    with dead_workers_in_one_line():
        # A run that was stopped during an evaluation still lacks the line of metrics of that step.
        run.report.write_if_due(encoder, run.guard.stop_if_asked)
        batches = read(loader, accelerator.device)
        if progress.step < run.total_steps:
            try:
                batches = chain([next(batches)], batches)  # the workers start before the threads that read ahead
            except ConfigurationError:
                if run.requests.failed is None:
                    raise
            run.guard.check_images(run.requests.failure(progress.num_batches))
        while progress.step < run.total_steps:
            now = config.schedule(progress.step, run.steps_per_epoch)
            step.begin(now, measures_health=run.report.monitor.is_due(progress.step + 1))
            results, samples = [], []
            for batch in run.report.monitor.data_wait.watch(islice(batches, num_sub_batches)):
                views = photometry(batch.crops, batch.photometry, config).to(step.view_dtype)
                results.append(step.forward_backward(*views.chunk(2)))
                samples.append(batch.samples)
                run.report.bad += batch.bad
            lost = run.requests.failure(progress.num_batches + 1, run.guard.is_stopping)
            decision = run.guard.agree(progress.step, now, results, samples, lost)
            if has_moved := step.update(now):
                progress.step += 1
                run.report.add(results)
            else:  # float16 has overflowed: the next batch is tried with a lower gradient scale
                progress.skipped += 1
                run.guard.check_scale(progress.step, now, results, samples)
            if decision.stop:
                raise StopRequestedError(decision.stop)
            if decision.images_lost:
                run.guard.check_images(lost)
            run.report.write_if_due(encoder, run.guard.stop_if_asked)
            if has_moved and (decision.save or run.saver.is_due(progress.step)):
                run.saver.begin()
        run.saver.save_now()
    run.report.close()


class Run:
    """A run in progress: its settings, images, networks, folder, checkpoints, and the steps that are done."""

    def __init__(
        self,
        config: PretrainConfig,
        data: ImageData,
        folder: RunFolder,
        accelerator: Accelerator,
        step: TrainingStep,
        start: Start,
        signals: StopSignals,
    ) -> None:
        """Restore the state of the checkpoint, lock the folder, and print a description of the run. A collective call.

        Raises:
            ConfigurationError: the checkpoint does not fit, or a tracker does not start, or the folder cannot be
                written or is in use.
        """
        self.config, self.data, self.folder, self.accelerator, self.step = config, data, folder, accelerator, step
        self.steps_per_epoch = num_steps_per_epoch(len(data.train), config.batch_size)
        self.total_steps = config.total_steps(self.steps_per_epoch)
        manifest = start.checkpoint.manifest if start.checkpoint is not None else None
        self.progress = progress = resume.restore_progress(manifest)
        state = RunState(step.student, step.teacher, step.optimizer, accelerator)
        rows, positions, lines = [], None, list(start.remarks)
        if manifest is not None:
            resume.check_same_images(data, manifest)
            rows, positions = resume.restore_state(state, start.checkpoint, accelerator)
            lines += resume.describe_changes(config, manifest, accelerator, self.steps_per_epoch)
        progress.parts.append(
            {"step": progress.step, "command": command(), "hardware": hardware(accelerator), "versions": VERSIONS}
            | ({"init_from": start.init_from} if start.init_from is not None else {})
            | ({"resume": config.resume} if config.resume not in ("auto", "never") else {})
        )
        header = f"# m2t_accel {__version__}, torch {torch.__version__}, on {hardware(accelerator)}\n# {command()}\n"
        # A run that is repeated with --config config.yaml must not be published over this one.
        text = header + dataclasses.replace(config, resume="auto", push_to_hub=None).to_yaml()
        is_main = accelerator.is_main_process
        self.trackers = trackers = Trackers(config, config.trackers if is_main else ())

        def open_folder() -> list[str]:
            return resume.open_folder(folder, start, text, progress, trackers) if is_main else []

        lines += broadcast_object(on_all_processes(accelerator, open_folder))
        if is_main:
            if start.checkpoint is not None:
                lines.append(f"resumes from step {progress.step} of {self.total_steps}, {start.checkpoint.path}")
            print(
                introduction(config, data, step.student.encoder, self.total_steps, accelerator),
                *lines,
                sep="\n",
                flush=True,
            )
        self.report = Report(config, accelerator, folder, data, step, progress, self.steps_per_epoch, trackers, rows)
        self.requests = DeviceBatches(
            data.train,
            config,
            accelerator.num_processes,
            accelerator.process_index,
            progress.num_batches,
            None if positions is None else positions.numpy(),
            # Skipped steps have used a batch each, also before a resume in another precision. With float16 a step is
            # skipped at most 17 times from the first gradient scale down to 1, and once for each doubling.
            num_spare_steps=progress.skipped + (0 if accelerator.scaler is None else 64 + self.total_steps // 1000),
        )
        self.saver = Saver(
            state, folder, config, accelerator, progress, self.report, data, self.requests, self.steps_per_epoch
        )
        self.saver.last_good = start.checkpoint.path if start.checkpoint is not None else None
        self.guard = Guard(config, data.train, folder, accelerator, self.saver, signals, self.steps_per_epoch)

    def stop(self) -> str:
        """Save after a signal. Return the last part of the message for the user. A collective call."""
        if self.progress.step == 0:
            return "before the first step: the same command starts over"
        saved = self.saver.save_now()
        return f"after step {self.progress.step} of {self.total_steps}. {saved}; the same command resumes from there"

    def finish(self) -> None:
        """Write the encoder and its card, the curves, training.json and report.html.

        Raises:
            ConfigurationError: a file other than report.html cannot be written; the run can resume from its last
                checkpoint.
        """
        try:
            finish(
                self.config,
                self.data,
                self.step,
                self.progress.parts,
                self.progress.step,
                self.report.seconds(),
                self.report.page.close,
            )
            self.trackers.add_curves(self.folder.path / "curves.png")
        except OSError as error:
            reason, last_good = error.strerror or error, self.saver.describe_last_good()
            raise ConfigurationError(
                f"{self.folder.path} cannot be written ({reason}). {last_good}: make room, and type the same command "
                "again"
            ) from None

    def close(self) -> None:
        """Wait for a checkpoint that is being written, end the bar and the trackers, and write the page."""
        self.saver.close()
        self.report.close()
        if self.report.page is not None:
            self.report.page.close()
        for line in self.trackers.close():
            self.report.print_line(line)

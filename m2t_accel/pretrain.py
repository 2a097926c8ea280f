"""The pretraining loop: student and momentum teacher, driven by Accelerate on any number of devices."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor

from m2t_accel import __version__
from m2t_accel.checkpoint import Checkpoint, read_tensors
from m2t_accel.completion import VERSIONS, finish
from m2t_accel.data import (
    DeviceBatches,
    TwoViews,
    ViewBatch,
    describe,
    read_rows,
)
from m2t_accel.data_settings import check_enough_images
from m2t_accel.interruption import (
    Agreement,
    StopRequestedError,
    StopSignals,
    Trouble,
    lost_processes_in_one_line,
)
from m2t_accel.launch import (
    check_same_images,
    command,
    gather_from_all,
    hardware,
    on_all_processes,
    start_accelerator,
    tell_all,
)
from m2t_accel.loader import create_loader, dead_workers_in_one_line, read
from m2t_accel.model import (
    Student,
    Teacher,
    create_encoder,
    create_student,
    momentum_teacher_loss,
)
from m2t_accel.monitor import KnnMonitor, Report, TooManyBadImagesError, embedding_std
from m2t_accel.optim import create_optimizer, set_learning_rate
from m2t_accel.order import steps_per_epoch
from m2t_accel.photometry import photometry
from m2t_accel.recipes import PretrainConfig, check_inputs, check_output_dir
from m2t_accel.run_folder import RunFolder, Start, write_text
from m2t_accel.run_state import RunState
from m2t_accel.saving import Saver
from m2t_accel.schedules import Schedule, schedule
from m2t_accel.settings import ConfigurationError
from m2t_accel.shards import Shards
from m2t_accel.sources import ImageData, load_images


def pretrain(config: PretrainConfig) -> Teacher | None:
    """Train as the configuration says and write the run's folder; the trained teacher is returned.

    A run that was stopped goes on; of one that is complete nothing is changed, and None is returned. A collective call:
    every process of a launch makes it with the same configuration.

    Raises:
        ConfigurationError: the launch, the images, the encoder, the output folder or a checkpoint do not allow the run,
            and nothing has been written; or its numbers are not finite, or its images broken.
        Interrupted: the run was stopped, or has lost a process; the same command goes on.
    """
    timeout = timedelta(minutes=config.collective_timeout)
    accelerator = start_accelerator(config, config.tracker, config.output_dir, timeout)
    is_main = accelerator.is_main_process
    folder = RunFolder(config.output_dir)

    def find_start() -> Start | None:
        if not is_main:
            return None
        check_output_dir(config)
        return folder.find_start(config)

    start = tell_all(on_all_processes(accelerator, find_start))
    if start.complete:
        accelerator.print(f"{config.output_dir} is complete: {config.output_dir}/encoder")
        return None
    on_all_processes(accelerator, lambda: check_inputs(config))
    if start.checkpoint is not None and config.evaluate_every is None:
        config = dataclasses.replace(config, evaluate_every=start.checkpoint.manifest["config"]["evaluate_every"])
    data = on_all_processes(accelerator, lambda: load_images(config))  # the first fills the cache of `datasets`
    check_enough_images(len(data.train), config)
    check_same_images(accelerator, data.note, data.fingerprint)
    config = settle_evaluation(config, data)
    run = Run(config, data, folder, accelerator)
    with StopSignals() as signals, contextlib.closing(run), lost_processes_in_one_line(accelerator, timeout):
        run.begin(start)
        try:
            run.train(signals)
        except StopRequestedError as stop:
            raise signals.interruption(stop.number, run.stop()) from None
        except TooManyBadImagesError as error:  # between two steps, on every process
            raise ConfigurationError(f"{error}. {run.save()}; then the run goes on from there") from None
        if is_main:
            run.finish()
    return run.teacher


class Run:
    """A run of pretraining: its networks, where it stands, and the loop."""

    def __init__(self, config: PretrainConfig, data: ImageData, folder: RunFolder, accelerator: Accelerator) -> None:
        self.config = config
        self.data = data
        self.folder = folder
        self.accelerator = accelerator
        set_seed(config.seed)
        encoder = on_all_processes(accelerator, lambda: create_encoder(config.encoder))
        student = create_student(encoder, config.image_size, config.hidden_size, config.projection_size, config.encoder)
        teacher = Teacher(student)
        optimizer = create_optimizer(
            student, config.optimizer, config.learning_rate, config.optimizer_momentum, config.weight_decay
        )
        student.to(memory_format=torch.channels_last)
        teacher.to(memory_format=torch.channels_last)
        with warnings.catch_warnings():
            # The name that broadcast_buffers will have one day is not yet known to the older torch that we allow.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.student_forward, self.optimizer = accelerator.prepare(student, optimizer)
        # The teacher has no gradient, so nothing to synchronise.
        self.teacher_forward = accelerator.prepare_model(teacher, evaluation_mode=True)
        # Without keep_torch_compile=False a compiled student would lose its DistributedDataParallel, and no_sync with
        # it.
        self.student: Student = accelerator.unwrap_model(self.student_forward, keep_torch_compile=False)
        self.teacher: Teacher = accelerator.unwrap_model(self.teacher_forward, keep_torch_compile=False)
        self.teacher.follow(self.student, weight_momentum=0.0)  # DDP gave rank 0's weights to all students
        self.student_forward.train()
        self.teacher_forward.train()
        self.state = RunState(self.student, self.teacher, self.optimizer, accelerator)

        self.steps_an_epoch = steps_per_epoch(len(data.train), config.batch_size)
        self.total_steps = config.epochs * self.steps_an_epoch
        self.knn = KnnMonitor(data, config, accelerator) if config.evaluate_every else None
        self.agreement = Agreement(timedelta(minutes=config.collective_timeout))
        self.step = 0  # optimizer steps done
        self.reported = -1  # the last of them that has its line of metrics
        self.best: dict[str, float] = {}  # the best evaluation: knn_top1, step
        self.report: Report | None = None
        self.saver: Saver | None = None
        self.last_saved = (0, -1)  # step and reported
        self.parts: list[dict[str, object]] = []  # where and with what the run was computed, from which step on

    # --- begin, stop, finish

    def begin(self, start: Start) -> None:
        """Take up the run where a checkpoint left it, make its folder and say what will be done; a collective call.

        Raises:
            ConfigurationError: the checkpoint does not fit, or the folder cannot be written or is held by another run.
        """
        config, accelerator = self.config, self.accelerator
        manifest = start.checkpoint.manifest if start.checkpoint is not None else None
        rows, told, number, seconds = [], list(start.remarks), 0, 0.0
        if manifest is not None:
            check_same_data(self.data, manifest)
            rows = self.restore(start.checkpoint)
            progress = manifest["progress"]
            self.step, self.reported = manifest["step"], progress["reported"]
            self.best, self.parts = progress["best"], list(progress["parts"])
            number, seconds = manifest["number"], progress["seconds"]
            told += self.changes(manifest)
        self.parts.append(
            {"step": self.step, "command": command(), "hardware": hardware(accelerator), "versions": VERSIONS}
        )
        told += tell_all(on_all_processes(accelerator, lambda: self.open_folder(start)))
        if accelerator.is_main_process:
            size = sum(parameter.numel() for parameter in self.student.encoder.parameters()) / 1e6
            print(introduction(config, self.data, size, self.total_steps, accelerator), *told, sep="\n")
            if start.checkpoint is not None:
                print(f"goes on from step {self.step} of {self.total_steps}, {start.checkpoint.path}")
            sys.stdout.flush()
        self.report = Report(
            config, accelerator, self.folder, self.total_steps, len(self.data.train), self.step, seconds, rows
        )
        last_good = start.checkpoint.path if start.checkpoint is not None else None
        self.saver = Saver(
            self.state,
            self.folder,
            config,
            accelerator,
            self.steps_an_epoch,
            self.report.say,
            last_good,
            number,
        )
        self.last_saved = (self.step, self.reported)

    def restore(self, checkpoint: Checkpoint) -> list[Tensor]:
        """Read the checkpoint, by the first process, and put its state in place on all; a collective call."""
        is_main = self.accelerator.is_main_process
        files = read_tensors(checkpoint) if is_main else None
        try:
            return self.state.restore(files, checkpoint.manifest)
        except ValueError as error:  # the same encoder by name may be another in another version of transformers
            raise ConfigurationError(f"{checkpoint.path} does not fit: {error}") from None

    def changes(self, manifest: Mapping[str, object]) -> list[str]:
        """What is not as it was when the checkpoint was made, in words."""
        told = []
        if manifest["mixed_precision"] != self.accelerator.mixed_precision:
            told.append(
                f"note: mixed_precision is {self.accelerator.mixed_precision}, and was {manifest['mixed_precision']}"
            )
        if manifest["num_processes"] != self.accelerator.num_processes:
            told.append(
                f"note: on {self.accelerator.num_processes} processes, before on {manifest['num_processes']}: the same "
                "images in the same sub-batches, and the same numbers but for rounding"
            )
        epochs = manifest["config"]["epochs"]
        if epochs != self.config.epochs:
            before, now = self.schedule(epochs), self.schedule(self.config.epochs)
            values = ", ".join(
                f"{name} {getattr(before, name):.4g} → {getattr(now, name):.4g}" for name in vars(before)
            )
            told.append(
                f"note: {self.config.epochs} epochs instead of {epochs}; from here on the schedules are those of "
                f"{self.config.epochs}: {values}"
            )
        return told

    def open_folder(self, start: Start) -> list[str]:
        """Hold the folder and make it ready, by the first process; what was done comes back in words.

        Raises:
            ConfigurationError: it cannot be written, or another run holds it.
        """
        if not self.accelerator.is_main_process:
            return []
        header = (
            f"# m2t_accel {__version__}, torch {torch.__version__}, on {hardware(self.accelerator)}\n# {command()}\n"
        )
        try:
            self.folder.hold()
            return self.folder.prepare(start, header + dataclasses.replace(self.config, resume="auto").to_yaml())
        except OSError as error:
            raise ConfigurationError(f"--output_dir {self.folder.path} cannot be written ({error.strerror})") from None

    def stop(self) -> str:
        """Save before the end asked for by a signal; what there is to go on from, in words. A collective call."""
        if self.step == 0:
            return "before the first step: the same command begins anew"
        left = self.save()
        return f"after step {self.step} of {self.total_steps}. {left}; the same command goes on from there"

    def finish(self) -> None:
        """Write what a complete run leaves.

        Raises:
            ConfigurationError: it cannot be written; the run can go on from its last checkpoint.
        """
        try:
            finish(self.config, self.data, self.teacher, self.parts, self.report.seconds())
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(
                f"{self.folder.path} cannot be written ({reason}). {self.saver.whats_left()}: make room, and type the "
                "same command again"
            ) from None

    def close(self) -> None:
        """Let a save that has begun come to its end, and others have the folder."""
        if self.saver is not None:
            self.saver.close()
            self.report.close()
        self.folder.close()

    # --- the loop

    def schedule(self, epochs: int | None = None) -> Schedule:
        """What the next step uses, in a run of so many epochs."""
        config, steps = self.config, self.steps_an_epoch
        total_steps = (epochs or config.epochs) * steps
        warmup_steps = config.warmup_epochs * steps
        return schedule(self.step, total_steps, warmup_steps, config.learning_rate, config.weight_momentum)

    def train(self, signals: StopSignals) -> None:
        """Train to the last step, and save.

        Raises:
            StopRequestedError: a signal asks for the end; the networks are those between two steps.
            ConfigurationError: the numbers are not finite, or too many images broken.
        """
        config, accelerator = self.config, self.accelerator
        batches = DeviceBatches(
            self.data.train, config, accelerator.num_processes, accelerator.process_index, self.step
        )
        loader = create_loader(TwoViews(self.data.train, config), batches, config, accelerator.device)
        self.signals = signals
        sub_batches: list[SubBatch] = []
        with dead_workers_in_one_line():
            self.report_if_due()  # of a checkpoint that was made before its evaluation
            for batch in read(loader, accelerator.device):
                now = self.schedule()
                set_learning_rate(self.optimizer, now.learning_rate)
                self.teacher.set_statistics_momentum(now.statistics_momentum)
                with accelerator.accumulate(self.student_forward):
                    sub_batches.append(self.forward_and_backward(batch))
                    if accelerator.sync_gradients:
                        stop, save = self.agree(sub_batches, now)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.report.add(sub_batches[-1].loss, sub_batches[-1].spread, batch.bad)
                if not accelerator.sync_gradients:
                    continue
                sub_batches.clear()
                self.teacher.commit_statistics()
                self.teacher.follow(self.student, now.weight_momentum)
                self.step += 1
                self.report.tick()
                if stop:
                    raise StopRequestedError(stop)
                self.report_if_due()
                if save or self.saver.is_due(self.step):
                    self.begin_to_save()
            self.save()
        self.report.close()

    def forward_and_backward(self, batch: ViewBatch) -> SubBatch:
        """One forward and backward of a sub-batch on the device; its gradient is added to the parameters'."""
        views = photometry(batch.crops, batch.photometry, self.config).to(next(self.student.parameters()).dtype)
        view_1, view_2 = views.chunk(2)
        q1, q2 = self.student_forward(view_1, view_2)
        with torch.no_grad():
            k1, k2 = self.teacher_forward(view_1, view_2)
        loss = momentum_teacher_loss(q1, q2, k1, k2)
        self.teacher.collect_statistics()
        on_host = HostCopy(loss)  # before the backward, which the device then need not have ended when it is read
        self.accelerator.backward(loss)
        return SubBatch(loss.detach(), on_host, embedding_std(k1), batch.samples)

    def agree(self, sub_batches: Sequence[SubBatch], now: Schedule) -> tuple[int, bool]:
        """With gradients there and no weight changed yet: the signal to stop after this step, and whether to save.

        A collective call.

        Raises:
            ConfigurationError: a loss of this step, or a state that was to be saved, is not finite; on every process.
        """
        self.saver.collect()
        trouble = Trouble.STATE_NOT_FINITE if self.saver.not_finite else Trouble.NONE
        losses = [part.on_host.item() for part in sub_batches]
        if not all(map(math.isfinite, losses)):
            trouble = Trouble.LOSS_NOT_FINITE
        trouble, stop, save = self.agreement.reach(trouble, self.signals.received, self.saver.is_time())
        if trouble is Trouble.LOSS_NOT_FINITE:
            self.fail(sub_batches, losses, now)
        if trouble is Trouble.STATE_NOT_FINITE:
            self.saver.finish()
        return stop, save

    def fail(self, sub_batches: Sequence[SubBatch], losses: Sequence[float], now: Schedule) -> NoReturn:
        """End the run for a loss that is not finite, with what is needed to replay the step; a collective call."""
        epoch, step_of_epoch = divmod(self.step, self.steps_an_epoch)
        rank, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = [
            {"process": rank, "virtual_device": rank + turn * num_processes, "loss": str(loss)}
            | {"samples": part.samples.tolist(), "images": paths_of(self.data.train, part.samples)}
            for turn, (loss, part) in enumerate(zip(losses, sub_batches, strict=True))
            if not math.isfinite(loss)
        ]
        bad = [part for parts in gather_from_all(mine) for part in parts]
        left = self.saver.finish()
        file = self.folder.path / "not_finite.json"
        content = {"step": self.step + 1, "epoch": epoch, "step_of_epoch": step_of_epoch, "seed": self.config.seed}
        content |= {**dataclasses.asdict(now), "sub_batches": bad}
        saved = f"its samples are in {file}"
        if self.accelerator.is_main_process:
            try:
                write_text(file, json.dumps(content, indent=1) + "\n")
            except OSError as error:
                saved = f"its samples could not be written to {file} ({error.strerror})"
        where = ", ".join(map(str, sorted({part["process"] for part in bad})))
        raise ConfigurationError(
            f"the loss is {bad[0]['loss']} in step {self.step + 1} on process {where}, at learning rate "
            f"{now.learning_rate:.4g}; the step is not taken, and {saved}. {left}. Try a --learning_rate_per_256 below "
            f"{self.config.learning_rate_per_256:g} or more --warmup_epochs, in another --output_dir"
        )

    # --- between two steps

    def report_if_due(self) -> None:
        """Write the line of metrics that this step asks for, unless it is there; with an evaluation where one is due.

        Raises:
            StopRequestedError: a signal came during the evaluation; the line is not written.
        """
        evaluates = self.knn is not None and is_due(self.step, self.steps_an_epoch, self.config)
        is_line = self.step % self.config.log_every == 0 or self.step == self.total_steps
        if self.reported == self.step or not (evaluates or (is_line and self.step > 0)):
            return
        values: dict[str, float] = {}
        if self.step > 0:
            self.step -= 1  # what the step used
            used = dataclasses.asdict(self.schedule())
            self.step += 1
            values = self.report.averages() | used
            self.report.check_collapse(self.step, values["embedding_std"])
        if evaluates:
            values["knn_top1"] = self.knn.measure(self.teacher.encoder, self.stop_if_asked)
            if values["knn_top1"] > self.best.get("knn_top1", -1.0):
                self.best = {"knn_top1": values["knn_top1"], "step": self.step}
        self.report.write(self.step, self.step / self.steps_an_epoch, values)
        self.reported = self.step

    def stop_if_asked(self) -> None:
        """A collective call.

        Raises:
            StopRequestedError: a process has received a signal; on every process.
        """
        _, stop, _ = self.agreement.reach(signal=self.signals.received)
        if stop:
            raise StopRequestedError(stop)

    def begin_to_save(self) -> None:
        """Save what the run is now, beside its going on; a collective call."""
        self.report.tell_bad_images()  # who goes on from here does not see them again
        self.saver.save(self.manifest(), self.report.rows)
        self.last_saved = (self.step, self.reported)

    def save(self) -> str:
        """Save what the run is now, unless it is saved, and wait; what there is, in words. A collective call."""
        if self.last_saved != (self.step, self.reported) or self.saver.failing():
            self.begin_to_save()
        return self.saver.finish()

    def manifest(self) -> dict[str, object]:
        """What a checkpoint says of the run, beside its tensors."""
        epoch, step_of_epoch = divmod(self.step, self.steps_an_epoch)
        config = dataclasses.replace(self.config, resume="auto")
        return {
            "step": self.step,
            "epoch": epoch,
            "step_of_epoch": step_of_epoch,
            "num_processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "gradient_scaler": self.state.gradient_scaler(),
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()},
            "data": {"note": self.data.note, "images": len(self.data.train), "fingerprint": self.data.fingerprint},
            "progress": {
                "reported": self.reported,
                "best": self.best,
                "seconds": round(self.report.seconds(), 3),
                "parts": self.parts,
            },
            "versions": VERSIONS,
        }


class SubBatch(NamedTuple):
    """What became of a sub-batch."""

    loss: Tensor  # 0-dimensional, on the device
    on_host: HostCopy  # of the loss
    spread: Tensor  # of the teacher's embeddings
    samples: Tensor


class HostCopy:
    """A number on its way from the device to the main memory."""

    def __init__(self, number: Tensor) -> None:
        number = number.detach()
        on_gpu = number.device.type == "cuda"
        self.copy = torch.empty((), dtype=number.dtype, pin_memory=on_gpu)
        self.copy.copy_(number, non_blocking=True)
        self.there = torch.cuda.Event() if on_gpu else None
        if self.there is not None:
            self.there.record()

    def item(self) -> float:
        """The number, once it has arrived."""
        if self.there is not None:
            self.there.synchronize()
        return self.copy.item()


# --- the start


def settle_evaluation(config: PretrainConfig, data: ImageData) -> PretrainConfig:
    """The configuration with a number for `evaluate_every`: ten evaluations in a run where there are labels.

    Raises:
        ConfigurationError: evaluations are asked for where there are no labels.
    """
    if config.evaluate_every and data.lacks:
        raise ConfigurationError(
            f"--evaluate_every {config.evaluate_every} needs labelled images held out: use --evaluate_every 0. "
            f"{config.dataset} has {data.lacks}"
        )
    if config.evaluate_every is None:
        every = max(1, config.epochs // 10) if data.validation is not None else 0
        config = dataclasses.replace(config, evaluate_every=every)
    return config


def is_due(step: int, steps_an_epoch: int, config: PretrainConfig) -> bool:
    """Whether kNN is measured after the step: before the first, and after some epochs."""
    epochs, rest = divmod(step, steps_an_epoch)
    return rest == 0 and (epochs % config.evaluate_every == 0 or epochs == config.epochs)


def check_same_data(data: ImageData, manifest: Mapping[str, object]) -> None:
    """Check that the images are those that the checkpoint's run was trained on.

    Raises:
        ConfigurationError: they are not.
    """
    if manifest["data"]["fingerprint"] != data.fingerprint:
        raise ConfigurationError(
            f"the images are not those of the run so far (there {manifest['data']['note']}; here {data.note}; names "
            "or order differ, of shards also sizes): give the same --dataset, or another --output_dir"
        )


def paths_of(images: Dataset | Shards, samples: Tensor) -> list[str] | None:
    """Where images are, for people; None of shards, which are not read row by row."""
    if not isinstance(images, Dataset):
        return None
    rows = read_rows(images, samples.tolist())
    return [describe(row, sample) for row, sample in zip(rows, samples.tolist(), strict=True)]


def introduction(
    config: PretrainConfig, data: ImageData, size: float, total_steps: int, accelerator: Accelerator
) -> str:
    """What will be trained (an encoder of `size` million parameters), on what: a few lines."""
    lines = [
        data.note,
        f"{config.encoder} ({size:.1f} M parameters), {config.epochs} epochs, {total_steps} steps of "
        f"{config.batch_size} images ({config.num_virtual_devices} × {config.device_batch_size}), on "
        f"{hardware(accelerator)}",
    ]
    if config.recipe == "digits" and config.dataset != "digits":
        lines.append(
            f"Note: recipe digits is for 8-pixel digits (views of {config.image_size} pixels, no flip, no colour); "
            "for photographs give --recipe 8x2080Ti-b256-100ep or another of --recipe list"
        )
    return "\n".join(lines)

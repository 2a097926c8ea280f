"""The pretraining loop: student and momentum teacher, driven by Accelerate on any number of devices."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import warnings
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor
from torch.optim import Optimizer

from m2t_accel import __version__
from m2t_accel.data import DeviceBatches, TwoViews, ViewBatch, create_loader, dead_workers_in_one_line, read
from m2t_accel.data_settings import check_enough_images
from m2t_accel.hub import model_card, save_encoder
from m2t_accel.launch import check_same_images, command, hardware, on_all_processes, start_accelerator
from m2t_accel.model import (
    Student,
    Teacher,
    create_encoder,
    create_student,
    momentum_teacher_loss,
    plain_encoder,
)
from m2t_accel.monitor import KnnMonitor, Report, draw_curves, duration, embedding_std, read_metrics
from m2t_accel.optim import create_optimizer, set_learning_rate
from m2t_accel.order import steps_per_epoch
from m2t_accel.photometry import photometry
from m2t_accel.recipes import PretrainConfig, check_inputs, check_output_dir
from m2t_accel.schedules import schedule
from m2t_accel.settings import ConfigurationError
from m2t_accel.sources import ImageData, load_images


def pretrain(config: PretrainConfig) -> Teacher:
    """Train as the configuration says and write the run's folder; the trained teacher is returned.

    A collective call: every process of a launch makes it with the same configuration.

    Raises:
        ConfigurationError: the launch, the images, the encoder or the output folder do not allow the run, and
            nothing has been written; or the loss is no longer finite.
    """
    accelerator = start_accelerator(config, config.tracker, config.output_dir)
    is_main = accelerator.is_main_process
    on_all_processes(accelerator, lambda: check_output_dir(config.output_dir) if is_main else None)
    on_all_processes(accelerator, lambda: check_inputs(config))
    data = on_all_processes(accelerator, lambda: load_images(config))  # the first fills the cache of `datasets`
    check_enough_images(len(data.train), config)
    check_same_images(accelerator, data.note)
    config = settle_evaluation(config, data)

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
        student, optimizer = accelerator.prepare(student, optimizer)
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)  # no gradient, so nothing to synchronise
    # Without keep_torch_compile=False a compiled student would lose its DistributedDataParallel, and no_sync with it.
    unwrapped_student: Student = accelerator.unwrap_model(student, keep_torch_compile=False)
    unwrapped_teacher: Teacher = accelerator.unwrap_model(teacher, keep_torch_compile=False)
    unwrapped_teacher.follow(unwrapped_student, weight_momentum=0.0)  # DDP gave rank 0's weights to all students
    student.train()
    teacher.train()

    batches = DeviceBatches(data.train, config, accelerator.num_processes, accelerator.process_index)
    loader = create_loader(TwoViews(data.train, config), batches, config, accelerator.device.type == "cuda")
    steps_an_epoch = steps_per_epoch(len(data.train), config.batch_size)
    total_steps = config.epochs * steps_an_epoch
    warmup_steps = config.warmup_epochs * steps_an_epoch
    on_all_processes(accelerator, lambda: create_run(config, accelerator) if is_main else None)
    if is_main:
        print(introduction(config, data, unwrapped_student, total_steps, accelerator), flush=True)
    knn = KnnMonitor(data, config, accelerator) if config.evaluate_every else None
    step = 0
    report = Report(config, accelerator, total_steps, len(data.train))
    with contextlib.closing(report), dead_workers_in_one_line():
        if knn is not None:
            report.write(step, 0.0, {"knn_top1": knn.measure(unwrapped_teacher.encoder)})
        for batch in read(loader):
            now = schedule(step, total_steps, warmup_steps, config.learning_rate, config.weight_momentum)
            set_learning_rate(optimizer, now.learning_rate)
            unwrapped_teacher.set_statistics_momentum(now.statistics_momentum)
            with accelerator.accumulate(student):
                loss, spread = train_step(accelerator, student, teacher, optimizer, batch, config)
            report.add(loss, spread, batch.bad)
            if not accelerator.sync_gradients:
                continue
            unwrapped_teacher.commit_statistics()
            unwrapped_teacher.follow(unwrapped_student, now.weight_momentum)
            step += 1
            report.tick()
            evaluates = knn is not None and is_due(step, steps_an_epoch, config)
            if step % config.log_every == 0 or step == total_steps or evaluates:
                values = report.averages() | dataclasses.asdict(now)
                if evaluates:
                    values["knn_top1"] = knn.measure(unwrapped_teacher.encoder)
                report.write(step, step / steps_an_epoch, values)
    if is_main:
        finish(accelerator, config, data, unwrapped_teacher, report.seconds())
    accelerator.wait_for_everyone()
    return unwrapped_teacher


def train_step(
    accelerator: Accelerator,
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    optimizer: Optimizer,
    batch: ViewBatch,
    config: PretrainConfig,
) -> tuple[Tensor, Tensor]:
    """One forward and backward of a sub-batch, and the optimizer's step where gradients are complete.

    The loss and the spread of the teacher's embeddings out, both 0-dimensional, on the device, of this
    process's sub-batch.
    """
    crops, parameters = send_to_device((batch.crops, batch.photometry), accelerator.device, non_blocking=True)
    views = photometry(crops, parameters, config).to(next(student.parameters()).dtype)
    view_1, view_2 = views.chunk(2)
    q1, q2 = student(view_1, view_2)
    with torch.no_grad():
        k1, k2 = teacher(view_1, view_2)
    loss = momentum_teacher_loss(q1, q2, k1, k2)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), embedding_std(k1)


# --- the start


def settle_evaluation(config: PretrainConfig, data: ImageData) -> PretrainConfig:
    """The configuration with a number for `evaluate_every`: ten evaluations in a run where there are labels.

    Raises:
        ConfigurationError: evaluations are asked for where there are no labels.
    """
    if config.evaluate_every and data.validation is None:
        lacking = "no labels" if data.class_names is None else "no validation split and --validation_fraction is 0"
        raise ConfigurationError(
            f"--evaluate_every {config.evaluate_every} needs labelled images held out, but {config.dataset} has "
            f"{lacking} (labels are class folders, or a column named by --label_column): use --evaluate_every 0"
        )
    if config.evaluate_every is None:
        every = max(1, config.epochs // 10) if data.validation is not None else 0
        config = dataclasses.replace(config, evaluate_every=every)
    return config


def is_due(step: int, steps_an_epoch: int, config: PretrainConfig) -> bool:
    """Whether the step ends an epoch after which kNN is measured."""
    epochs, rest = divmod(step, steps_an_epoch)
    return rest == 0 and (epochs % config.evaluate_every == 0 or epochs == config.epochs)


def create_run(config: PretrainConfig, accelerator: Accelerator) -> None:
    """Make the run's folder with its config.yaml."""
    folder = Path(config.output_dir)
    header = f"# m2t_accel {__version__}, torch {torch.__version__}, on {hardware(accelerator)}\n# {command()}\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(header + config.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--output_dir {folder} cannot be written ({error.strerror})") from None


def introduction(
    config: PretrainConfig, data: ImageData, student: Student, total_steps: int, accelerator: Accelerator
) -> str:
    """What will be trained, on what: a few lines."""
    size = sum(parameter.numel() for parameter in student.encoder.parameters()) / 1e6
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


# --- the end


def finish(accelerator: Accelerator, config: PretrainConfig, data: ImageData, teacher: Teacher, seconds: float) -> None:
    """Write the encoder, its card and the curves, and say where they are."""
    folder = Path(config.output_dir)
    rows = list(read_metrics(folder / "metrics.jsonl"))
    accuracies = [row["knn_top1"] for row in rows if "knn_top1" in row]
    images_seen = rows[-1]["step"] * config.batch_size
    training = {
        "data": data.note,
        "images_seen": images_seen,
        "hardware": hardware(accelerator),
        "seconds": round(seconds, 1),
        "time": duration(seconds),
        "command": command(),
        "versions": {"m2t_accel": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    (folder / "training.json").write_text(json.dumps(training, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    card = model_card(config, training, accuracies)
    save_encoder(plain_encoder(teacher.encoder), config, card, folder / "encoder")
    draw_curves(
        folder / "metrics.jsonl",
        folder / "curves.png",
        title=f"{config.encoder} on {config.dataset}, recipe {config.recipe}",
    )
    lines = [f"\nTrained in {duration(seconds)}: {images_seen:,} images, {images_seen / seconds:,.0f} a second."]
    if accuracies:
        first, last = 100 * accuracies[0], 100 * accuracies[-1]
        lines.append(f"Teacher kNN top-1: {first:.2f} % with random weights, {last:.2f} % now.")
    lines += [
        f"Encoder:  {folder / 'encoder'}",
        f"Curves:   {folder / 'curves.png'}",
        f'Load it:  from transformers import AutoModel; AutoModel.from_pretrained("{folder / "encoder"}")',
    ]
    if config.recipe == "digits":
        lines += [
            "Next:     your own images (no labels needed), on one GPU:",
            "          accelerate launch --config_file accelerate_configs/1gpu.yaml scripts/pretrain.py \\",
            "              --recipe 8x2080Ti-b256-100ep --dataset FOLDER --output_dir runs/mine",
        ]
    else:
        again = ["--config", f"{folder}/config.yaml", "--seed", str(config.seed + 1)]
        again += ["--output_dir", f"{folder}-seed{config.seed + 1}"]
        lines.append(f"Next:     the same with another seed: scripts/pretrain.py {shlex.join(again)}")
    print("\n".join(lines), flush=True)

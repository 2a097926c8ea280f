"""The pretraining loop: student and momentum teacher, driven by Accelerate on any number of devices."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    send_to_device,
    set_seed,
)
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from m2t_accel import __version__
from m2t_accel.augment import photometry
from m2t_accel.data import (
    DeviceBatches,
    ImageData,
    TwoViews,
    ViewBatch,
    create_loader,
    load_images,
    steps_per_epoch,
)
from m2t_accel.hub import model_card, save_encoder
from m2t_accel.model import (
    Student,
    Teacher,
    create_encoder,
    create_student,
    momentum_teacher_loss,
    plain_encoder,
)
from m2t_accel.monitor import KnnMonitor, draw_curves, embedding_std, read_metrics
from m2t_accel.optim import create_optimizer, set_learning_rate
from m2t_accel.recipes import ConfigurationError, PretrainConfig, check_num_processes, check_output_dir
from m2t_accel.schedules import schedule


def pretrain(config: PretrainConfig) -> Teacher:
    """Train as the configuration says and write the run's folder; the trained teacher is returned.

    A collective call: every process of a launch makes it with the same configuration.

    Raises:
        ConfigurationError: the launch, the images, the encoder or the output folder do not allow the run.
            Nothing has been written then.
    """
    accelerator = start_accelerator(config)
    if accelerator.is_main_process:
        check_output_dir(config.output_dir)
    with accelerator.local_main_process_first():  # the first fills the datasets cache, the others read it
        data = load_images(config)
    config = settle_evaluation(config, data)

    set_seed(config.seed)
    student = create_student(
        create_encoder(config.encoder), config.image_size, config.hidden_size, config.projection_size, config.encoder
    )
    teacher = Teacher(student)
    optimizer = create_optimizer(
        student, config.optimizer, config.learning_rate, config.optimizer_momentum, config.weight_decay
    )
    student.to(memory_format=torch.channels_last)
    teacher.to(memory_format=torch.channels_last)
    student, optimizer = accelerator.prepare(student, optimizer)
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)  # no gradient, so nothing to synchronise
    unwrapped_teacher: Teacher = accelerator.unwrap_model(teacher)
    unwrapped_student: Student = accelerator.unwrap_model(student)
    unwrapped_teacher.follow(unwrapped_student, weight_momentum=0.0)  # DDP gave rank 0's weights to all students
    student.train()
    teacher.train()

    batches = DeviceBatches(len(data.train), config, accelerator.num_processes, accelerator.process_index)
    on_gpu = accelerator.device.type == "cuda"
    loader = create_loader(TwoViews(data.train, config), batches, config, pin_memory=on_gpu, persistent=True)
    steps_an_epoch = steps_per_epoch(len(data.train), config.batch_size)
    total_steps = config.epochs * steps_an_epoch
    report = Report(config, data, accelerator, total_steps, unwrapped_student)
    knn = KnnMonitor(data, config, accelerator) if config.evaluate_every else None
    step = 0
    if knn is not None:
        report.write(step, 0.0, {"knn_top1": knn.measure(unwrapped_teacher.encoder)})

    for epoch in range(config.epochs):
        batches.epoch = epoch
        for batch in loader:
            now = schedule(
                step,
                total_steps,
                config.warmup_epochs * steps_an_epoch,
                config.learning_rate,
                config.weight_momentum,
            )
            set_learning_rate(optimizer, now.learning_rate)
            unwrapped_teacher.set_statistics_momentum(now.statistics_momentum)
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            with accelerator.accumulate(student):
                loss, spread = train_step(accelerator, student, teacher, optimizer, batch, config)
            report.add(loss, spread)
            if not accelerator.sync_gradients:
                continue
            unwrapped_teacher.commit_statistics()
            unwrapped_teacher.follow(unwrapped_student, now.weight_momentum)
            step += 1
            ends_epoch = step == (epoch + 1) * steps_an_epoch
            evaluates = knn is not None and ends_epoch and is_due(epoch + 1, config.evaluate_every, config.epochs)
            report.tick()
            if step % config.log_every == 0 or step == total_steps or evaluates:
                values = report.averages() | dataclasses.asdict(now)
                if evaluates:
                    values["knn_top1"] = knn.measure(unwrapped_teacher.encoder)
                report.write(step, step / steps_an_epoch, values)
    report.close()
    finish(accelerator, config, data, unwrapped_teacher, report)
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
    views = photometry(batch.crops, batch.photometry, config).to(next(student.parameters()).dtype)
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


def start_accelerator(config: PretrainConfig) -> Accelerator:
    """The Accelerator of this launch: every process that was promised is there and has its device.

    Raises:
        ConfigurationError: the launch is not what its file promises, or the processes cannot share the batch.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_launch(os.environ, torch.accelerator.device_count() if torch.accelerator.is_available() else 0)
    check_num_processes(config, world_size)
    accelerator = Accelerator(
        cpu=wants_cpu(os.environ),
        # As a plugin, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS would override a number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.num_virtual_devices // world_size, sync_with_dataloader=False
        ),
        # The student's running statistics serve nothing; those of the teacher are averaged on commit.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output_dir,
    )
    if accelerator.num_processes != world_size:
        raise ConfigurationError(
            f"{world_size} processes were launched but Accelerate joined {accelerator.num_processes}: each would "
            "train alone; use one of the files in accelerate_configs/"
        )
    return accelerator


def wants_cpu(environment: dict[str, str]) -> bool:
    """Whether the launch asks for CPUs: `use_cpu` of one process, or all GPUs hidden (cpu2.yaml's `gpu_ids: -1,-1`)."""
    hidden = set(environment.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")) == {"-1"}
    return hidden or environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def check_launch(environment: dict[str, str], num_devices: int) -> None:
    """Check that the launch started the processes that it was asked for, each with a device of its own.

    Accelerate starts in silence: one process for MULTI_CPU or for several processes of a one-process file, and
    eight that know nothing of one another for an 8-GPU file on a machine without GPUs.

    Raises:
        ConfigurationError: it did not; the message says which file to use.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    local_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
    files = (
        "use accelerate_configs/cpu.yaml (1 process), cpu2.yaml (2), 1gpu.yaml or 8gpu.yaml, "
        "with --num_processes N for another number"
    )
    # Accelerate's one-process launcher gives these addresses only if it was asked for several processes.
    if "WORLD_SIZE" not in environment and {"MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= environment.keys():
        raise ConfigurationError(
            "several processes were asked for but one was started (distributed_type NO or MULTI_CPU starts one): "
            "for two processes without GPUs use accelerate_configs/cpu2.yaml, for GPUs 8gpu.yaml with "
            "--num_processes N"
        )
    if wants_cpu(environment) or local_size == 1:
        return
    if num_devices == 0:
        raise ConfigurationError(
            f"{local_size} processes were started for GPUs, but this machine has none, and each would train alone: "
            f"{files}"
        )
    if local_size > num_devices:
        raise ConfigurationError(
            f"{local_size} processes were started on a machine with {num_devices} GPUs: add --num_processes "
            f"{num_devices}, or {files}"
        )


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


def is_due(epochs_done: int, every: int, epochs: int) -> bool:
    return epochs_done % every == 0 or epochs_done == epochs


# --- what a run tells


class Report:
    """What the run writes and shows while it trains: config.yaml, metrics.jsonl, a tracker and a progress bar.

    `add` and `tick` cost the device nothing; `averages` waits for it and is a collective call.
    """

    def __init__(
        self, config: PretrainConfig, data: ImageData, accelerator: Accelerator, total_steps: int, student: Student
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.folder = Path(config.output_dir)
        self.images = self.steps = 0
        self.sums: list[Tensor] = []
        self.started = self.last = time.perf_counter()
        self.bar = None
        if accelerator.is_main_process:
            create_run(self.folder, config, accelerator)
            size = sum(parameter.numel() for parameter in student.encoder.parameters()) / 1e6
            shown = (
                f"{data.note}\n"
                f"{config.encoder} ({size:.1f} M parameters), {config.epochs} epochs, {total_steps} steps of "
                f"{config.batch_size} images ({config.num_virtual_devices} × {config.device_batch_size}), on "
                f"{hardware(accelerator)}"
            )
            print(shown, flush=True)
        accelerator.wait_for_everyone()
        if config.tracker != "none":
            settings = {k: str(v) if isinstance(v, tuple) or v is None else v for k, v in vars(config).items()}
            accelerator.init_trackers("tracker", config=settings)
        if accelerator.is_main_process:
            # A log file gets a line every half minute, a terminal a bar that moves.
            interval = 0.5 if sys.stderr.isatty() else 30.0
            self.bar = tqdm(total=total_steps, unit="step", mininterval=interval, dynamic_ncols=True)

    def add(self, loss: Tensor, spread: Tensor) -> None:
        """Take in a sub-batch."""
        self.sums.append(torch.stack([loss, spread]))

    def tick(self) -> None:
        """Count an optimizer step."""
        self.steps += 1
        if self.bar is not None:
            self.bar.update()

    def averages(self) -> dict[str, float]:
        """Loss and spread averaged over all sub-batches of all processes since the last call, and the speed."""
        mean = torch.stack(self.sums).mean(dim=0)
        loss, spread = self.accelerator.reduce(mean, reduction="mean").tolist()
        elapsed = time.perf_counter() - self.last
        speed = self.steps * self.config.batch_size / elapsed
        self.sums.clear()
        self.steps = 0
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} images/s", refresh=False)
        return {"loss": loss, "embedding_std": spread, "images_per_second": speed}

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Write one line of metrics; the clock of the speed starts again, so evaluations do not count."""
        if self.accelerator.is_main_process:
            line = {"step": step, "epoch": round(epoch, 6), **values, "seconds": round(self.seconds(), 3)}
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if "knn_top1" in values:
                self.bar.write(f"epoch {epoch:g}: teacher kNN top-1 {100 * values['knn_top1']:.2f} %")
        if self.config.tracker != "none":
            self.accelerator.log({"epoch": epoch, **values}, step=step)
        self.last = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the report was opened."""
        return time.perf_counter() - self.started

    def close(self) -> None:
        """End the bar and the tracker."""
        if self.bar is not None:
            self.bar.close()
        if self.config.tracker != "none":
            self.accelerator.end_training()


def create_run(folder: Path, config: PretrainConfig, accelerator: Accelerator) -> None:
    """Make the run's folder with its config.yaml."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        header = f"# m2t_accel {__version__}, torch {torch.__version__}, on {hardware(accelerator)}\n# {command()}\n"
        (folder / "config.yaml").write_text(header + config.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--output_dir {folder} cannot be written ({error})") from None


def hardware(accelerator: Accelerator) -> str:
    """The devices in words, such as `8 × NVIDIA H200, bf16`."""
    if accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name(accelerator.device)
    else:
        name = f"{accelerator.device.type} ({torch.get_num_threads()} threads)"
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    return f"{accelerator.num_processes} × {name}, {precision}"


def command() -> str:
    """The command line that started this run, with its launcher where there is one, as one would type it."""
    parent = psutil.Process().parent()
    words = parent.cmdline() if parent is not None else []
    for i, word in enumerate(words[:-1]):
        if Path(word).name == "accelerate" and words[i + 1] == "launch":
            return shlex.join(["accelerate", *words[i + 1 :]])
        if word == "accelerate.commands.launch":
            return shlex.join(["accelerate", "launch", *words[i + 1 :]])
    return shlex.join(["python", *sys.argv])


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min 3 s, 5 h 12 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# --- the end


def finish(accelerator: Accelerator, config: PretrainConfig, data: ImageData, teacher: Teacher, report: Report) -> None:
    """Write the encoder, its card and the curves, and say where they are."""
    if not accelerator.is_main_process:
        return
    seconds = report.seconds()
    rows = list(read_metrics(report.folder / "metrics.jsonl"))
    accuracies = [row["knn_top1"] for row in rows if "knn_top1" in row]
    images_seen = rows[-1]["step"] * config.batch_size
    facts = {
        "recipe": config.recipe,
        "data": data.note,
        "epochs": str(config.epochs),
        "images seen": f"{images_seen:,}",
        "hardware": hardware(accelerator),
        "time": duration(seconds),
        "software": f"m2t_accel {__version__}, torch {torch.__version__}",
    }
    encoder_dir = report.folder / "encoder"
    card = model_card(config, facts, accuracies, command())
    save_encoder(plain_encoder(teacher.encoder), config, card, encoder_dir)
    title = f"{config.encoder} on {config.dataset}, recipe {config.recipe}"
    draw_curves(report.folder / "metrics.jsonl", report.folder / "curves.png", title)
    lines = [f"\nTrained in {duration(seconds)}: {images_seen:,} images, {images_seen / seconds:,.0f} a second."]
    if accuracies:
        first, last = 100 * accuracies[0], 100 * accuracies[-1]
        lines.append(f"Teacher kNN top-1: {first:.2f} % with random weights, {last:.2f} % now.")
    lines += [
        f"Encoder:  {encoder_dir}",
        f"Curves:   {report.folder / 'curves.png'}",
        f'Load it:  from transformers import AutoModel; AutoModel.from_pretrained("{encoder_dir}")',
    ]
    if config.recipe == "digits":
        lines += [
            "Next:     your own images (no labels needed), on one GPU:",
            "          accelerate launch --config_file accelerate_configs/1gpu.yaml scripts/pretrain.py \\",
            "              --recipe 8x2080Ti-b256-100ep --dataset FOLDER --output_dir runs/mine",
        ]
    print("\n".join(lines), flush=True)

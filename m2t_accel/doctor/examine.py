"""Examine a run without starting it: every check in its order, and the result as lines and as JSON types."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Callable
from typing import TypeVar

import psutil
from accelerate import Accelerator

from m2t_accel.config.fields import ConfigurationError, count
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.sources import ImageData, load_images
from m2t_accel.distributed.interruption import end_with_launcher
from m2t_accel.distributed.launch import collective_timeout, launcher_arguments, start_accelerator
from m2t_accel.distributed.processes import broadcast_object, check_same_images, on_all_processes
from m2t_accel.doctor import images, machine, plan
from m2t_accel.doctor.advice import Advice, advise
from m2t_accel.doctor.findings import BAD, DOUBTFUL, GOOD, Finding, Findings, failure
from m2t_accel.doctor.speed import (
    LoaderSpeed,
    StepSpeed,
    describe_limit,
    describe_loader,
    describe_step,
    measure_evaluation,
    measure_loader,
    measure_step,
)
from m2t_accel.hub.warm_start import load_warm_start
from m2t_accel.run import resume
from m2t_accel.run.folder import RunFolder, Start
from m2t_accel.run.output_dir import check_output_dir

Result = TypeVar("Result")


def examine(
    config: PretrainConfig, hours: float | None = None, price_per_hour: float | None = None
) -> dict[str, object] | None:
    """Examine the run of these settings: print a line for each finding. Train nothing, and write nothing.

    Every process of a launch makes this call.

    Args:
        hours: time that the run may take; advice on other settings is then given.
        price_per_hour: of all machines of the launch together.

    Returns:
        On the first process, the findings and figures as JSON types; `fails` says whether one is bad. None on others.
    """
    findings = Findings(is_main=os.environ.get("RANK", "0") == "0")
    end_with_launcher()
    accelerator, refused = attempt(start_accelerator, config, collective_timeout(config))
    process = psutil.Process() if launcher_arguments() is None else psutil.Process().parent()
    ready_seconds = time.time() - process.create_time()
    if accelerator is None and not findings.is_main:
        return None  # the first process says why, and examines the rest
    examination = Examination(config, findings, accelerator)
    examination.find_start()
    findings.start_group("environment")
    examination.check_environment()
    findings.start_group("launch")
    if refused is not None:
        findings.add(failure("processes", refused))
    else:
        findings.check("processes", machine.check_processes, config, accelerator)
    findings.check("output", examination.describe_start)
    findings.start_group("data")
    examination.check_data()
    findings.start_group("speed")
    examination.measure()
    findings.start_group("recipe")
    figures = examination.check_recipe(ready_seconds, price_per_hour)
    advice = None
    if hours is not None:
        findings.start_group("advice")
        advice = examination.advise(hours, figures)
    findings.print(f"\n{verdict(findings)}")
    return {"fails": bool(findings.names(BAD)), "findings": findings.as_rows(), "figures": figures} | (
        {"advice": {"settings": dict(advice.reasons), "warnings": advice.warnings, "command": advice.command}}
        if advice is not None
        else {}
    )


def attempt(action: Callable[..., Result], *arguments: object) -> tuple[Result | None, Exception | None]:
    """Return the result of a call, and the error that it raised."""
    try:
        return action(*arguments), None
    except Exception as error:  # it becomes a line, and the other checks still run
        return None, error


def verdict(findings: Findings) -> str:
    """Return the last line: whether the run would fail."""
    bad, doubtful = findings.names(BAD), findings.names(DOUBTFUL)
    if bad:
        return f"The run would fail: {', '.join(dict.fromkeys(bad))}."
    if doubtful:
        return (
            f"The run can start. Look at {count(len(doubtful), 'doubtful line')}: {', '.join(dict.fromkeys(doubtful))}."
        )
    return "The run can start."


class Examination:
    """Results of the checks so far. A part is None where its check has failed."""

    def __init__(self, config: PretrainConfig, findings: Findings, accelerator: Accelerator | None) -> None:
        self.config, self.findings, self.accelerator = config, findings, accelerator
        self.start: Start | None = None
        self.start_error: Exception | None = None
        self.architecture = None
        self.in_place = False  # whether the images are read in place because they are not copied yet
        self.data: ImageData | None = None
        self.load_seconds = 0.0
        self.loader: LoaderSpeed | None = None
        self.step: StepSpeed | None = None
        self.evaluation_seconds: float | None = None

    def together(self, action: Callable[[], Result]) -> Result:
        """Call on all processes what fails on all if it fails on one. A collective call."""
        return action() if self.accelerator is None else on_all_processes(self.accelerator, action)

    def find_start(self) -> None:
        """Find where the run starts, and the encoder that it starts from. A collective call."""

        def find() -> Start | None:
            if not self.findings.is_main:
                return None
            check_output_dir(self.config)
            return RunFolder(self.config.output_dir).find_start(self.config)

        self.start, self.start_error = attempt(lambda: broadcast_object(self.together(find)))
        if self.config.init_from is None or self.start_error is not None or self.start.complete:
            return
        if self.start.checkpoint is not None:
            self.config = resume.with_settled_settings(self.config, self.start.checkpoint.manifest)
            self.architecture = resume.saved_architecture(self.config, self.start)
        elif self.accelerator is not None:
            warm, self.start_error = attempt(load_warm_start, self.config, self.accelerator)
            if warm is not None:
                self.config = dataclasses.replace(self.config, encoder=warm.encoder)
                self.architecture = warm.architecture
                self.start = self.start._replace(remarks=(*self.start.remarks, *warm.lines))

    def check_environment(self) -> None:
        """Check the machine, and whether its disks have room."""
        check, config = self.findings.check, self.config
        check("versions", machine.check_versions)
        check("devices", machine.check_devices)
        check("memory", machine.check_memory, config)
        check("open files", machine.check_open_files, config)
        check("disk", machine.check_disk, config, self.architecture)
        check("cache", machine.check_cache, config)

    def describe_start(self) -> list[Finding]:
        """Return where the run starts.

        Raises:
            Exception: the folder or the source of the weights is not usable.
        """
        if self.start_error is not None:
            raise self.start_error
        return list(machine.describe_start(self.config, self.start))

    def check_data(self) -> None:
        """Load the images as the run does, and check them. A collective call."""
        config = self.config
        started = time.perf_counter()

        def load() -> ImageData:
            self.in_place = machine.missing_copy(config)
            return load_images(dataclasses.replace(config, streaming=True) if self.in_place else config)

        self.data, error = attempt(self.together, load)
        self.load_seconds = time.perf_counter() - started
        if error is not None and self.in_place:
            text = f"not examined, because the run has not copied them yet, and they cannot be read in place ({error})"
            self.findings.add(Finding(DOUBTFUL, "images", text))
            return
        if error is not None:
            self.findings.add(failure("images", error))
            return
        data, check = self.data, self.findings.check
        if self.accelerator is not None:
            _, error = attempt(check_same_images, self.accelerator, data.note, data.fingerprint)
            if error is not None:
                self.findings.add(failure("images", error))
        check("images", images.check_found, config, data)
        check("held out", images.check_held_out, config, data)
        check("classes", images.check_classes, data)
        if self.findings.is_main:
            sample, error = attempt(images.decode_sample, data.train, config.max_image_pixels)
            if error is not None:
                self.findings.add(failure("damage", error))
            else:
                check("damage", images.check_damage, config, data, sample)
                check("sizes", images.check_sizes, config, sample)
                check("values", images.check_values, sample)
        check("order", images.check_order, config, data)

    def measure(self) -> None:
        """Measure the loader, the step and an evaluation. A collective call."""
        config, data, accelerator, findings = self.config, self.data, self.accelerator, self.findings
        if accelerator is None or data is None or len(data.train) < config.batch_size:
            reason = "the launch failed" if accelerator is None else "the images are missing or too few"
            findings.add(Finding(DOUBTFUL, "speed", f"not measured, because {reason}"))
            return
        self.loader, error = attempt(measure_loader, config, data)
        if error is not None:
            findings.add(failure("loader", error))
            return
        findings.check("loader", describe_loader, self.loader, self.in_place)
        self.step, error = attempt(measure_step, config, data, accelerator, self.architecture)
        if error is not None:
            self.end_other_process("step", error)
            findings.add(failure("step", error))
            return
        findings.check("step", describe_step, config, self.step, accelerator)
        findings.check("limit", describe_limit, self.loader, self.step)
        if data.validation is not None and config.evaluates:
            self.evaluation_seconds, error = attempt(measure_evaluation, config, data, self.step, accelerator)
            if error is not None:
                self.end_other_process("evaluation", error)
                findings.add(failure("evaluation", error))

    def end_other_process(self, name: str, error: Exception) -> None:
        """End a process whose measurement has failed, unless it is the first one, which reports its own error.

        The others may be waiting for its gradients, up to the timeout of the backend. The script delays the message,
        so that the first process can report the error if it has failed, too.

        Raises:
            ConfigurationError: this is not the first process.
        """
        if not self.findings.is_main:
            process = self.accelerator.process_index
            raise ConfigurationError(f"process {process}, {name}: {failure(name, error).text}") from error

    def check_recipe(self, ready_seconds: float, price_per_hour: float | None) -> dict[str, object]:
        """Check the settings of the run, and predict its time. Return the figures."""
        findings, config, figures = self.findings, self.config, {}
        if self.step is not None:
            checkpoint = self.start.checkpoint if self.start is not None else None
            course, error = attempt(
                plan.predict,
                config,
                self.data,
                self.loader,
                self.step,
                self.evaluation_seconds,
                ready_seconds + self.load_seconds,
                0 if checkpoint is None else checkpoint.manifest["step"],
            )
            if error is not None:
                findings.add(failure("time", error))
            else:
                findings.check("time", plan.check_time, config, course, self.step, datetime.datetime.now())
                findings.check("cost", plan.check_cost, course, self.step, price_per_hour)
                figures = course._asdict() | {
                    "images_per_second_of_the_step": self.step.images_per_second,
                    "images_per_second_of_the_loader": self.loader.images_per_second,
                    "measured_sub_batch": self.step.size,
                    "megabytes": self.step.megabytes,
                    "watts": self.step.watts,
                }
        findings.check("hardware", plan.check_hardware, config, self.accelerator)
        findings.check("learning rate", plan.check_learning_rate, config)
        findings.check("batch", plan.check_settings, config)
        return figures

    def advise(self, hours: float, figures: dict[str, object]) -> Advice | None:
        """Print settings for so many hours, each with its reason, and the command."""
        findings = self.findings
        if not figures:
            findings.add(Finding(DOUBTFUL, "advice", "none, because the speed is not measured"))
            return None
        arguments = launcher_arguments()
        launcher = ["python", "scripts/pretrain.py"]
        if arguments is not None:
            script = next(i for i, word in enumerate(arguments) if word.endswith("doctor.py"))
            launcher = ["accelerate", "launch", *arguments[:script], "scripts/pretrain.py"]
        advice, error = attempt(
            advise,
            self.config,
            len(self.data.train),
            hours,
            figures["images_per_second"],
            self.step.num_processes,
            launcher,
            figures["start_seconds"] + figures["evaluations"] * figures["evaluation_seconds"],
        )
        if error is not None:
            findings.add(failure("advice", error))
            return None
        for name, reason in advice.reasons:
            findings.add(Finding(GOOD, "settings", f"{name}: {reason}"))
        for warning in advice.warnings:
            findings.add(Finding(DOUBTFUL, "settings", warning))
        findings.print(f"\n{advice.command}")
        return advice

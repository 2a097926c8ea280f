"""Monitor a run: its health on at most about 100 lines of metrics, its wait for data, and alarms about known faults."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator

from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.distributed.interruption import HostCopy, reach_agreement
from m2t_accel.distributed.launch import collective_timeout
from m2t_accel.health import effective_rank
from m2t_accel.momentum_norm import MomentumBatchNorm
from m2t_accel.run.resume import Progress
from m2t_accel.schedules import Schedule
from m2t_accel.step import TrainingStep

NUM_HEALTH_LINES = 100
LEAST_INTERVAL = 20  # steps between two; a measurement takes up to 9 % of a small step on a CPU, so below 0.5 % of all

# Limits of the alarms; docs/reports.md has the measurements behind them.
SAME_VIEWS = 0.5  # share of the images of a step
TEACHER_TOLERANCE = 0.5  # of the move that the weight momentum asks for
LEAST_MOVE = 1e-5  # of the teacher's weights, relative; a smaller move is lost in the rounding of float32
STATISTICS_TOLERANCE = 0.02  # of the statistics momentum
LEAST_DISTANCE = 1e-3  # of statistics; a smaller one has too few digits left to tell the momentum
LARGEST_UPDATE = 0.1  # of the student's weights in one step
SMALLEST_RANK = 2.0
SPREAD = 0.5  # embedding_std above which embeddings differ, so that kNN must be better than chance
CHANCE_AFTER = 0.2  # of the run; before that, an encoder may not have learned anything yet
MOST_WAIT = 0.5  # of the time
WAIT_WINDOW = 60.0  # seconds of training over which the wait is judged

Batch = TypeVar("Batch")


class DataWait:
    """Adds up the seconds in which the device of this process waits for batches.

    On a GPU this is the time between the end of all work that was queued before a batch, and its arrival. The clock of
    the program would also count waits during which the GPU still computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds = 0.0
        self.pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches."""
        batches = iter(batches)
        while True:
            before = self.now()
            try:
                batch = next(batches)
            except StopIteration:
                return
            after = self.now()
            if self.on_gpu:
                self.pending.append((before, after))
                self.add_completed()
            else:
                self.seconds += after - before
            yield batch

    def now(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add_completed(self) -> None:
        """Add the waits that the GPU has reached, without waiting for it."""
        while self.pending and self.pending[0][1].query():
            before, after = self.pending.popleft()
            self.seconds += before.elapsed_time(after) / 1000


class Monitor:
    """Measures the health of a run, and describes faults in one line each, once for each kind.

    Args:
        progress: progress of the run; the monitor adds to its `alarms`.
        chance: accuracy of kNN up to which it is no better than chance; None if there are too few images to tell.
    """

    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Accelerator,
        step: TrainingStep,
        progress: Progress,
        steps_per_epoch: int,
        chance: float | None = None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.step = step
        self.progress = progress
        self.total_steps = config.total_steps(steps_per_epoch)
        self.chance = chance
        interval = max(LEAST_INTERVAL, self.total_steps / NUM_HEALTH_LINES)
        self.interval = config.log_every * math.ceil(interval / config.log_every)
        self.data_wait = DataWait(accelerator.device)
        self.window = [0.0, 0.0]  # seconds of waiting and of training
        self.layer_names = [
            name for name, module in step.teacher.named_modules() if isinstance(module, MomentumBatchNorm)
        ]

    def is_due(self, step: int) -> bool:
        """Return whether health is measured in this step, counted from 1.

        It is measured in about 100 steps of a long run, evenly spaced, and in the lines 1, 2, 4, 8, ... before the
        first of them, because a fault of the settings should be seen before a hundredth of a long run.
        """
        line, is_line = divmod(step, self.config.log_every)
        is_early = not is_line and step < self.interval and line & (line - 1) == 0
        return step % self.interval == 0 or is_early or step == self.total_steps

    def collect(self, now: Schedule) -> list[str]:
        """Add the health of the last step to `progress.health`, if it was measured. A collective call.

        Args:
            now: the scheduled values of that step.

        Returns:
            A line for the user about each fault; `progress.health` has the same lines as `alarms`.
        """
        health, self.step.health = self.step.health, None
        if health is None:
            return []
        names = [*health.figures, "same_views"]
        same_views = torch.stack(health.same_views).mean()
        scalars = torch.cat([torch.stack([*health.figures.values(), same_views]), health.layers])
        copies = (
            HostCopy(self.accelerator.reduce(scalars, reduction="mean")),
            HostCopy(self.accelerator.gather(torch.cat(health.embeddings))),
        )
        reach_agreement(collective_timeout(self.config), has_arrived=lambda: all(copy.has_arrived() for copy in copies))
        values, embeddings = (copy.tensor() for copy in copies)
        figures = dict(zip(names, values.tolist(), strict=False))
        layers = dict(zip(self.layer_names, values[len(names) :].tolist(), strict=True))
        moved = {name: figures.pop(name) for name in ("teacher_moved", "statistics_moved", "same_views")}
        figures |= {"effective_rank": effective_rank(embeddings), "statistics_distance": max(layers.values())}
        # A value that is not finite is no JSON. The guard ends the run at the next loss.
        self.progress.health = {name: value for name, value in figures.items() if math.isfinite(value)}
        if all(map(math.isfinite, layers.values())):
            self.progress.health["layers"] = layers
        alarms = self.check_health(figures | moved, now)
        if alarms:
            self.progress.health["alarms"] = alarms
        return alarms

    def check_health(self, figures: Mapping[str, float], now: Schedule) -> list[str]:
        """Return a line for each fault that the figures of one step show."""
        alarms = {}
        if figures["same_views"] > SAME_VIEWS:
            alarms["same_views"] = (
                f"the two views are equal for {100 * figures['same_views']:.0f} % of the images, so there is nothing "
                "to learn: give a wider --crop_scale, a --jitter_probability above 0 or other random changes; "
                "`scripts/preview.py` draws the views"
            )
        asked = 1 - now.weight_momentum
        is_off = abs(figures["teacher_moved"] - asked) > TEACHER_TOLERANCE * asked
        if is_off and asked * figures["teacher_distance"] > LEAST_MOVE:
            alarms["teacher"] = (
                f"the teacher moved by {figures['teacher_moved']:.4g} of its way to the student, although its weight "
                f"momentum {now.weight_momentum:.6g} asks for {asked:.4g}: nothing else may change the teacher's "
                "weights, and Teacher.follow must run in each step"
            )
        is_off = abs(figures["statistics_moved"] - now.statistics_momentum) > STATISTICS_TOLERANCE
        if is_off and figures["statistics_distance"] > LEAST_DISTANCE:
            alarms["statistics"] = (
                f"the history of the teacher's BatchNorm moved by {figures['statistics_moved']:.4g} of its way to the "
                f"batch, although the statistics momentum is {now.statistics_momentum:.4g}: nothing else may set it or "
                "change the running statistics"
            )
        if not figures["update_ratio"] <= LARGEST_UPDATE:
            alarms["update"] = (
                f"one update changed the student's weights by {100 * figures['update_ratio']:.3g} % (normal is below "
                f"{100 * LARGEST_UPDATE:g} %) at learning rate {now.learning_rate:.4g}: try a --learning_rate_per_256 "
                f"below {self.config.learning_rate_per_256:g} or more --warmup_epochs, in another --output_dir"
            )
        if figures["effective_rank"] < SMALLEST_RANK:
            alarms["rank"] = (
                f"the teacher's embeddings use only about {figures['effective_rank']:.2f} dimensions (effective_rank): "
                "try a smaller --learning_rate_per_256, a --weight_momentum nearer to 1 or views that differ more, in "
                "another --output_dir"
            )
        return self.new(alarms)

    def check_line(self, values: Mapping[str, float], seconds: float) -> list[str]:
        """Return a line for each fault that a line of metrics shows.

        Args:
            values: the line.
            seconds: duration of the training since the line before.
        """
        alarms = {}
        is_late = self.progress.step >= CHANCE_AFTER * self.total_steps
        is_chance = self.chance is not None and values.get("knn_top1", 1.0) <= self.chance
        if is_late and is_chance and values["embedding_std"] > SPREAD:
            alarms["chance"] = (
                f"teacher kNN top-1 of {100 * values['knn_top1']:.2f} % is no better than chance, although the "
                f"embeddings are spread (embedding_std {values['embedding_std']:.2f}): check that the labels belong to "
                "the images (class folders, --label_column), and that both splits have the same classes"
            )
        self.window[0] += seconds * values.get("data_wait", 0.0)
        self.window[1] += seconds
        if self.window[1] >= WAIT_WINDOW:
            share = self.window[0] / self.window[1]
            self.window = [0.0, 0.0]
            if share > MOST_WAIT:
                alarms["data_wait"] = (
                    f"training waited for images in {100 * share:.0f} % of the time: try more --num_workers, or images "
                    "that are smaller or on a faster disk; `scripts/benchmark.py data` measures how fast they arrive"
                )
        return self.new(alarms)

    def new(self, alarms: Mapping[str, str]) -> list[str]:
        """Return a line for each alarm of a kind that this run has not had, and record the kinds."""
        new = {kind: text for kind, text in alarms.items() if kind not in self.progress.alarms}
        self.progress.alarms += new
        return [f"step {self.progress.step}: {text}" for text in new.values()]


def chance_level(labels: np.ndarray) -> float | None:
    """Return the accuracy up to which a classification of images is no better than chance.

    That is the share of the most common class, plus three standard deviations for the number of images.

    Args:
        labels: (N,) int64.

    Returns:
        None if no accuracy would tell: one class has more than half of the images, or there are too few of them.
    """
    share = np.bincount(labels).max() / len(labels)
    level = share + 3 * math.sqrt(share * (1 - share) / len(labels))
    return level if share <= 0.5 and level < (1 + share) / 2 else None

"""Schedules as pure functions of the step number, so there is no scheduler state to save or to advance twice.

`step` counts optimizer steps done, from 0; `total_steps` is the number of optimizer steps of the whole run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WARMUP_START = 1e-6
KINDS_OF_STATISTICS = ("momentum", "batch", "running")  # m2t_accel.momentum_norm says what each is
FIXED_STATISTICS_MOMENTUM = 0.1  # of the kinds other than this method's; the default of torch's BatchNorm


def cosine(progress: float, total: float = 1) -> float:
    """Return c(p) = (1 + cos πp) / 2, which falls from 1 at p = progress / total = 0 to 0 at p = 1."""
    # cosine(step, total) and cosine(step / total) may differ in the last bit; no caller may switch between them.
    return (1 + math.cos(math.pi * progress / total)) / 2


def learning_rate(step: int, total_steps: int, warmup_steps: float, peak: float) -> float:
    """Return the learning rate of one step: linear from 1e-6 to `peak` over `warmup_steps`, then a cosine to 0.

    Source: the warmup cosine of the published code, set for each step.
    """
    if step <= warmup_steps and warmup_steps > 0:
        return WARMUP_START + (peak - WARMUP_START) * step / warmup_steps
    return peak * cosine((step - warmup_steps) / (total_steps - warmup_steps))


def weight_momentum(step: int, total_steps: int, base: float) -> float:
    """Return the teacher's weight momentum m = 1 - (1 - m0) c(p) after `step` steps: from m0 = `base` to 1.

    Source: arXiv 2101.07525, section 3; BYOL (arXiv 2006.07733), section 3.3.
    """
    return 1 - (1 - base) * cosine(step / total_steps)


def statistics_momentum(step: int, total_steps: int, kind: str = "momentum") -> float:
    """Return the statistics momentum α = c(p) at `step`: the batch's share in the teacher's statistics, from 1 to 0.

    For the kinds `batch` and `running` it is 0.1 in all steps.

    Source: arXiv 2101.07525, section 3.2.
    """
    return cosine(step / total_steps) if kind == "momentum" else FIXED_STATISTICS_MOMENTUM


@dataclass(frozen=True)
class Schedule:
    """The scheduled values of one optimizer step."""

    learning_rate: float
    statistics_momentum: float
    weight_momentum: float  # of the teacher's update after the step, so at step + 1


def schedule(
    step: int,
    total_steps: int,
    warmup_steps: float,
    peak: float,
    base_momentum: float,
    kind_of_statistics: str = "momentum",
) -> Schedule:
    """Return all scheduled values of optimizer step `step`."""
    return Schedule(
        learning_rate=learning_rate(step, total_steps, warmup_steps, peak),
        statistics_momentum=statistics_momentum(step, total_steps, kind_of_statistics),
        weight_momentum=weight_momentum(step + 1, total_steps, base_momentum),
    )

"""Schedules as pure functions of the step number: nothing to save, nothing to tick twice.

`step` counts optimizer steps done, from 0; `total_steps` is the number of optimizer steps of the whole run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WARMUP_START = 1e-6


def cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1: c(p) = (1 + cos πp) / 2."""
    return (1 + math.cos(math.pi * progress)) / 2


def learning_rate(step: int, total_steps: int, warmup_steps: float, peak: float) -> float:
    """Learning rate of one step: linear from 1e-6 to `peak` over `warmup_steps`, then a cosine to 0.

    Source: the published code's warmup cosine, set per step.
    """
    if step <= warmup_steps and warmup_steps > 0:
        return WARMUP_START + (peak - WARMUP_START) * step / warmup_steps
    return peak * cosine((step - warmup_steps) / (total_steps - warmup_steps))


def weight_momentum(step: int, total_steps: int, base: float) -> float:
    """The teacher's weight momentum after `step` steps: from `base` to 1, m = 1 - (1 - m0) c(p).

    Source: arXiv 2101.07525, section 3; BYOL (arXiv 2006.07733), section 3.3.
    """
    return 1 - (1 - base) * cosine(step / total_steps)


def statistics_momentum(step: int, total_steps: int) -> float:
    """The share of the batch in the teacher's BatchNorm statistics at `step`: from 1 to 0, α = c(p).

    Source: arXiv 2101.07525, section 3.2: momentum statistics with a cosine schedule.
    """
    return cosine(step / total_steps)


@dataclass(frozen=True)
class Schedule:
    """What one optimizer step uses."""

    learning_rate: float
    statistics_momentum: float
    weight_momentum: float  # of the update that follows the step, so at step + 1


def schedule(step: int, total_steps: int, warmup_steps: float, peak: float, base_momentum: float) -> Schedule:
    """All scheduled values of optimizer step `step`."""
    return Schedule(
        learning_rate=learning_rate(step, total_steps, warmup_steps, peak),
        statistics_momentum=statistics_momentum(step, total_steps),
        weight_momentum=weight_momentum(step + 1, total_steps, base_momentum),
    )

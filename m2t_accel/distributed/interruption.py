"""How a run ends before its time: a signal, a machine that is lost, numbers that are not finite, told by all to all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed
from accelerate import Accelerator

from m2t_accel.config.fields import STATUS_CTRL_C, STATUS_GO_ON, Interrupted, one_line
from m2t_accel.distributed.launch import launcher_arguments
from m2t_accel.distributed.processes import control_group, groups

# SLURM and other schedulers send one of them before they end a job; Ctrl-C is SIGINT.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # of Linux's prctl
ROLL_CALL = timedelta(seconds=10)  # for an answer, after a collective call has failed


class StopSignals:
    """Takes note of the signals that ask a run to end, so that it ends between two steps. A context manager.

    After a Ctrl-C the next one is not caught: it ends the process at once, wherever it is.
    """

    def __init__(self) -> None:
        self.received = 0  # the number of the signal, or 0
        self.before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        with contextlib.suppress(ValueError):  # signals are of the main thread; elsewhere they stay what they are
            for number in SIGNALS:
                self.before[number] = signal.signal(number, self.receive)
            if launcher_arguments() is not None and sys.platform == "linux":
                # `accelerate launch` hands no signal on to a single process: it dies, and this is how we know.
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self.received:
            self.received = number
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{signal.Signals(number).name}: the run ends after this step and saves{again}\n".encode())

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def interruption(self, number: int, told: str) -> Interrupted:
        """What to raise for a signal, with what was saved told in words."""
        status = STATUS_CTRL_C if number == signal.SIGINT else STATUS_GO_ON
        return Interrupted(f"stopped by {signal.Signals(number).name}, {told}", status)


class StopRequestedError(Exception):
    """A signal asks for the end of the run; raised between two steps, on every process alike."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Trouble(IntEnum):
    """What keeps a process from going on; of several the greatest counts."""

    NONE = 0
    LOSS_NOT_FINITE = 1
    STATE_NOT_FINITE = 2


class Agreement:
    """The same decision on every process, once a step.

    It is a maximum over small numbers in the main memory, over a group of its own: no device is waited for.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.timeout = timeout

    def reach(self, trouble: Trouble = Trouble.NONE, signal: int = 0, save: bool = False) -> tuple[Trouble, int, bool]:
        """The greatest of each over all processes; a collective call."""
        group = control_group()
        if group is not None:
            words = torch.tensor([trouble, signal, save], dtype=torch.int64)
            work = torch.distributed.all_reduce(words, torch.distributed.ReduceOp.MAX, group=group, async_op=True)
            work.wait(self.timeout)
            trouble, signal, save = words.tolist()
        return Trouble(trouble), signal, bool(save)


@contextlib.contextmanager
def report_lost_processes(accelerator: Accelerator, timeout: timedelta) -> Iterator[None]:
    """Around all that processes do together: a process or machine that is gone, or silent for the timeout.

    Raises:
        Interrupted: there is one.
    """
    try:
        yield
    except RuntimeError as error:
        lost = r"closed by peer|Connection reset|Broken pipe|[Tt]imed? ?out|NCCL|connectFullMesh|Connection refused"
        if accelerator.num_processes == 1 or not re.search(lost, str(error)):
            raise
        raise Interrupted(
            f"process {accelerator.process_index} of {accelerator.num_processes} has lost the others: "
            f"{who_is_missing(accelerator)} ({one_line(error)}). Processes are waited for {minutes(timeout)} "
            "(--collective_timeout). The same command goes on from the last checkpoint",
            STATUS_GO_ON,
        ) from error


def who_is_missing(accelerator: Accelerator) -> str:
    """Which processes do not answer, as far as the first one can tell."""
    answers: list[str] = []
    # A group on which no call has failed: gloo closes the connections of a call that timed out.
    group = None if groups() is None else groups().patient

    def ask() -> None:
        try:
            torch.distributed.monitored_barrier(group, ROLL_CALL, wait_all_ranks=True)
        except (RuntimeError, ValueError) as error:
            answers.append(str(error))

    # In a thread, because the others wait for the first one's answer without an end.
    call = threading.Thread(target=ask, daemon=True)
    call.start()
    call.join(ROLL_CALL.total_seconds() + 2)
    missing = re.search(r"[Rr]anks? ([\d, ]*\d) failed to pass", answers[0]) if answers else None
    if accelerator.process_index == 0 and missing is not None:
        return f"no word from process {missing[1]}"
    return "one of them has ended, hangs or is cut off"


def minutes(time: timedelta) -> str:
    return f"{time.total_seconds() / 60:g} minutes"

"""End a run on all processes together: after a signal, a lost process or a loss that is not finite."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor

from m2t_accel.config.fields import STATUS_CTRL_C, STATUS_RESUMABLE, Interrupted, one_line
from m2t_accel.distributed.launch import launcher_arguments
from m2t_accel.distributed.processes import control_group, groups

# SLURM and other schedulers send one of the first two before they end a job. A terminal that closes, as that of a lost
# ssh connection, sends SIGHUP. SIGINT is Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # option of Linux's prctl
BATCH_TIMEOUT = 10  # seconds to wait for a batch of the workers after a signal
RESPONSE_TIMEOUT = timedelta(seconds=10)  # for each process to respond after a collective call has failed
QUESTION_INTERVAL = 2.0  # seconds that a process waits for its device before it asks whether the others still live
POLL_INTERVAL = 0.001  # seconds between two looks at an event of the device


_waiting_since: float | None = None  # the start of the wait for the next batch


@contextlib.contextmanager
def waiting_for_a_batch() -> Iterator[None]:
    """End this wait if a signal arrives and the batch does not follow within BATCH_TIMEOUT."""
    global _waiting_since
    _waiting_since = time.monotonic()
    try:
        yield
    finally:
        _waiting_since = None


class NoBatchError(Exception):
    """A signal asks the run to end, but the batch that the step needs does not come: a worker hangs."""


class StopSignals:
    """Context manager that records a signal to end the run. The run can then end between two steps.

    A second Ctrl-C ends the process immediately; in an interactive session it raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the signal, or 0
        self.received_at = 0.0
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        with contextlib.suppress(ValueError):  # only the main thread can set handlers; in others nothing changes
            for number in SIGNALS:
                if number == signal.SIGHUP and survives_terminal():
                    continue
                self.previous[number] = signal.signal(number, self.receive)
            self.previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.check_wait)
        return self

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Record the first signal, and print that the run will end."""
        if number == signal.SIGINT:
            is_interactive = hasattr(sys, "ps1")  # also in a notebook, whose kernel must live on
            signal.signal(signal.SIGINT, signal.default_int_handler if is_interactive else signal.SIG_DFL)
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 1, 1)
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            line = f"\n{signal.Signals(number).name}: the run ends after this step and saves{again}\n"
            with contextlib.suppress(OSError):  # Ctrl-C has also ended `| tee`, or the terminal is closed
                os.write(2, line.encode())  # not print, which the signal may have interrupted

    def check_wait(self, number: int, frame: FrameType | None) -> None:
        """End a wait that takes too long; called every second after a signal.

        Raises:
            NoBatchError: the process has waited too long for a batch.
        """
        if _waiting_since is not None and time.monotonic() - max(_waiting_since, self.received_at) > BATCH_TIMEOUT:
            raise NoBatchError

    def __exit__(self, *exception: object) -> None:
        if self.received:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def interruption(self, number: int, saved: str) -> Interrupted:
        """Return the exception for a run that a signal has stopped.

        Args:
            number: the signal.
            saved: which step was saved, and where; part of the message.
        """
        status = STATUS_CTRL_C if number == signal.SIGINT else STATUS_RESUMABLE
        return Interrupted(f"stopped by {signal.Signals(number).name}, {saved}", status)


def survives_terminal() -> bool:
    """Return whether this process ignores SIGHUP, as after `nohup`, and its launcher does not forward one.

    torch's launcher of several processes handles SIGHUP even after `nohup`: it forwards the signal, and kills what has
    not ended after 30 s.
    """
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and "TORCHELASTIC_RUN_ID" not in os.environ


def end_with_launcher() -> None:
    """Ask for a SIGTERM when the launcher dies: `accelerate launch` does not forward signals to a single process."""
    if launcher_arguments() is not None:
        end_with_parent(signal.SIGTERM)


def end_with_parent(number: int) -> None:
    """Ask the kernel for a signal when the parent of this process dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


class StopRequestedError(Exception):
    """A signal asks the run to end. It is raised between two steps, on every process."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class HostCopy:
    """A copy of a small tensor in main memory, made while a GPU continues to compute.

    It arrives when the GPU has done all that was queued before. After a lost process that may be never: see
    `reach_agreement`.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        on_gpu = tensor.device.type == "cuda"
        self.copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self.copy.copy_(tensor, non_blocking=on_gpu)  # on another accelerator, wait for the copy at once
        self.arrival = torch.cuda.Event() if on_gpu else None
        if self.arrival is not None:
            self.arrival.record()

    def has_arrived(self) -> bool:
        """Return whether the copy is complete, without waiting."""
        return self.arrival is None or self.arrival.query()

    def item(self) -> float:
        """Return the value; on a GPU, wait for the copy first."""
        return self.tolist()

    def tolist(self) -> list | float:
        """Return the values; on a GPU, wait for the copy first."""
        return self.tensor().tolist()

    def tensor(self) -> Tensor:
        """Return the copy; on a GPU, wait for it first."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.copy


class Trouble(IntEnum):
    """Reasons for a process to fail, or to ask again; the processes agree on the greatest."""

    NONE = 0
    IMAGES_LOST = 1  # the images of the next step cannot be read
    LOSS_NOT_FINITE = 2
    STATE_NOT_FINITE = 3
    DEVICE_BUSY = 4  # a process still waits for values from its device


def reach_agreement(
    timeout: timedelta,
    find_trouble: Callable[[], Trouble] = lambda: Trouble.NONE,
    stop_signal: int = 0,
    save: bool = False,
    has_arrived: Callable[[], bool] = lambda: True,
) -> tuple[Trouble, int, bool]:
    """Return the maximum of each value over all processes, so that all decide the same. A collective call.

    The values stay in main memory and travel over a gloo group. If a process is lost, the devices of the others wait
    for it in a collective call, and may wait for ever. So this call does not wait for the device alone: every two
    seconds it asks the other processes, which fails if one is lost.

    Args:
        timeout: limit for the call.
        find_trouble: returns the reason for this process to fail; called once its device has delivered.
        stop_signal: the number of the signal that this process has received, or 0.
        save: whether this process wants a checkpoint.
        has_arrived: returns whether the device of this process has delivered the values that `find_trouble` needs.

    Raises:
        RuntimeError: a process is lost, or a device has not delivered within the timeout.
    """
    group, deadline = control_group(), time.monotonic() + timeout.total_seconds()
    while True:
        next_question = time.monotonic() + QUESTION_INTERVAL
        while not (arrived := has_arrived()) and time.monotonic() < next_question:
            time.sleep(POLL_INTERVAL)
        trouble = find_trouble() if arrived else Trouble.DEVICE_BUSY
        values = [trouble, stop_signal, save]
        if group is not None:
            tensor = torch.tensor(values, dtype=torch.int64)
            work = torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=group, async_op=True)
            work.wait(timeout)
            values = tensor.tolist()
        if values[0] != Trouble.DEVICE_BUSY:
            return Trouble(values[0]), values[1], bool(values[2])
        if group is not None and time.monotonic() > deadline:
            raise RuntimeError("Timed out: a device has not finished its work")


@contextlib.contextmanager
def report_lost_processes(accelerator: Accelerator, timeout: timedelta | None = None) -> Iterator[None]:
    """Turn the error of a collective call into one line that names the missing process.

    Args:
        accelerator: the Accelerator of this process.
        timeout: the limit of a collective call, for the message. None: the run has not begun, and waits as long as the
            copy of a dataset takes.

    Raises:
        Interrupted: a process or machine is gone, or did not respond within the timeout.
    """
    try:
        yield
    except RuntimeError as error:
        lost = r"closed by peer|Connection reset|Broken pipe|[Tt]imed? ?out|NCCL|connectFullMesh|Connection refused"
        if accelerator.num_processes == 1 or not re.search(lost, str(error)):
            raise
        again = "The same command tries again"
        if timeout is not None:
            minutes = timeout.total_seconds() / 60
            again = (
                f"The limit for a response is {minutes:g} minutes (--collective_timeout). The same command resumes "
                "from the last checkpoint"
            )
        raise Interrupted(
            f"process {accelerator.process_index} of {accelerator.num_processes} has lost the others: "
            f"{describe_missing(accelerator)} ({one_line(error)}). {again}"
        ) from error


def describe_missing(accelerator: Accelerator) -> str:
    """Return a clause that names the processes which do not respond; only the first process can find them."""
    errors: list[str] = []
    # Use a group on which no call has failed, because gloo closes the connections of a call that timed out.
    group = None if groups() is None else groups().download

    def call() -> None:
        try:
            torch.distributed.monitored_barrier(group, RESPONSE_TIMEOUT, wait_all_ranks=True)
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))

    # A thread, because on the other processes the call waits for the first one without a limit.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(RESPONSE_TIMEOUT.total_seconds() + 2)
    missing = re.search(r"[Rr]anks? ([\d, ]*\d) failed to pass", errors[0]) if errors else None
    if accelerator.process_index == 0 and missing is not None:
        return f"process {missing[1]} does not respond"
    return "one of them has ended, hangs or is disconnected"

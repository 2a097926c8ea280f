import os
import re
import signal
import sys
import threading
from datetime import timedelta

import pytest
from accelerate import Accelerator

from m2t_accel.config.fields import Interrupted
from m2t_accel.distributed import interruption
from m2t_accel.distributed.interruption import (
    StopRequestedError,
    StopSignals,
    Trouble,
    reach_agreement,
    report_lost_processes,
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_recorded_and_printed_once(number, capfd):
    previous = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
        os.kill(os.getpid(), signal.SIGTERM)  # a later signal of the launcher does not count
        assert signals.received == number
    assert signal.getsignal(number) is previous
    printed = capfd.readouterr().err
    assert printed.count("ends after this step") == 1
    assert number.name in printed
    assert ("Ctrl-C again" in printed) == (number == signal.SIGINT)


def test_the_second_ctrl_c_is_not_caught(capfd, monkeypatch):
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)  # as IPython and its kernels do
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("launcher", "received"), [(None, 0), ("1", signal.SIGHUP)])
def test_after_nohup_a_closed_terminal_ends_only_what_the_launcher_ends_anyway(monkeypatch, launcher, received):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launcher is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launcher)
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == received
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_signal_is_recorded_if_nothing_reads_stderr(monkeypatch):
    def fail(file, line):
        raise BrokenPipeError

    with StopSignals() as signals:
        monkeypatch.setattr(os, "write", fail)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT


def test_outside_the_main_thread_handlers_stay_as_they_are():
    previous = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        with StopSignals() as signals:
            found.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(0, previous)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_the_exit_status_of_a_stopped_run(number, status):
    interruption = StopSignals().interruption(number, "after step 3")
    assert (interruption.status, str(interruption)) == (status, f"stopped by {number.name}, after step 3")


def test_one_process_agrees_with_itself():
    assert reach_agreement(timedelta(seconds=1)) == (Trouble.NONE, 0, False)
    trouble = reach_agreement(timedelta(seconds=1), lambda: Trouble.LOSS_NOT_FINITE, 15, True)
    assert trouble == (Trouble.LOSS_NOT_FINITE, 15, True)


def test_the_values_of_a_device_are_read_after_they_have_arrived(monkeypatch):
    monkeypatch.setattr(interruption, "QUESTION_INTERVAL", 0.003)
    calls = []

    def has_arrived():
        calls.append("look")
        return len(calls) > 9

    def find_trouble():
        calls.append("read")
        return Trouble.IMAGES_LOST

    # Without other processes there is no limit for the device.
    assert reach_agreement(timedelta(0), find_trouble, has_arrived=has_arrived)[0] is Trouble.IMAGES_LOST
    assert calls == ["look"] * 10 + ["read"]


class TwoProcesses:
    num_processes, process_index = 2, 1


@pytest.mark.parametrize(
    "message",
    [
        "[../gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:1: Connection reset by peer",
        "Connection closed by peer [10.0.0.2]:37462",
        "Timed out waiting 6000ms for recv operation to complete",
        "NCCL error in: ProcessGroupNCCL.cpp, remote process exited",
    ],
)
def test_a_lost_process_is_reported_in_one_line(message):
    with (
        pytest.raises(Interrupted, match=r"process 1 of 2 .*6 minutes \(--collective_timeout") as caught,
        report_lost_processes(TwoProcesses(), timedelta(minutes=6)),
    ):
        raise RuntimeError(message)
    assert caught.value.status == 75


def test_other_errors_are_not_changed():
    with pytest.raises(RuntimeError, match="shapes"), report_lost_processes(TwoProcesses(), timedelta(minutes=6)):
        raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="NCCL"), report_lost_processes(Accelerator(), timedelta(minutes=6)):
        raise RuntimeError("NCCL of one process")
    with pytest.raises(StopRequestedError), report_lost_processes(TwoProcesses(), timedelta(minutes=6)):
        raise StopRequestedError(signal.SIGTERM)


# The second of three processes does not take part in a call.
SILENCE = """
import os, sys, tempfile, time
from datetime import timedelta
import torch
from m2t_accel.distributed import interruption
from m2t_accel.distributed.processes import create_groups
from m2t_accel.config.fields import Interrupted

class ThreeProcesses:
    num_processes, process_index = 3, 0

torch.set_num_threads(1)
interruption.RESPONSE_TIMEOUT = timedelta(seconds=2)
path, children, timeout = tempfile.mktemp(), [], timedelta(seconds=2)
for rank in range(3):
    children.append(os.fork())
    if children[-1] == 0:
        store = torch.distributed.FileStore(path, 3)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=3)
        create_groups(timeout)
        interruption.reach_agreement(timeout)
        if rank == 1:
            time.sleep(60)
        ThreeProcesses.process_index = rank
        try:
            with interruption.report_lost_processes(ThreeProcesses(), timeout):
                interruption.reach_agreement(timeout)
        except Interrupted as error:
            os.write(1, f"{error}\\n".encode())  # one write, which lines of other processes do not enter
        os._exit(0)
for child in (children[0], children[2]):
    os.waitpid(child, 0)
os.kill(children[1], 9)
"""


@pytest.mark.slow
def test_a_silent_process_is_named(run_script):
    """The call that asks which process is missing needs a group of its own: a timeout breaks the group of the call."""
    printed = run_script("-c", SILENCE).stdout
    assert "process 0 of 3 has lost the others: process 1 does not respond (" in printed
    assert "process 2 of 3 has lost the others: " in printed


# The device of each process waits for ever, as in a collective call that the last process has not joined.
BUSY = """
import os, sys, tempfile, time
from datetime import timedelta
from types import SimpleNamespace
import torch
from m2t_accel.distributed import interruption
from m2t_accel.distributed.processes import create_groups
from m2t_accel.config.fields import Interrupted

torch.set_num_threads(1)
interruption.QUESTION_INTERVAL = 0.1
interruption.RESPONSE_TIMEOUT = timedelta(seconds=1)
dies, timeout = sys.argv[1] == "dies", timedelta(minutes=2 if sys.argv[1] == "dies" else 0.01)
path, children = tempfile.mktemp(), []
for rank in range(3):
    children.append(os.fork())
    if children[-1] == 0:
        store = torch.distributed.FileStore(path, 3)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=3)
        create_groups(timedelta(minutes=2))
        interruption.reach_agreement(timedelta(minutes=2))
        began = time.monotonic()
        if rank == 2 and dies:
            time.sleep(0.5)
            os._exit(0)
        try:
            with interruption.report_lost_processes(SimpleNamespace(num_processes=3, process_index=rank), timeout):
                interruption.reach_agreement(timeout, has_arrived=lambda: rank == 1 and not dies)
        except Interrupted as error:
            line = f"{rank} {time.monotonic() - began < 60} {error}\\n"
            os.write(1, line.encode())  # one write, which lines of other processes do not enter
        os._exit(0)
for child in children:
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("case", "ranks", "reason"), [("dies", "01", "peer"), ("hangs", "012", "Timed out|peer")])
def test_a_process_does_not_wait_for_a_device_that_waits_for_a_lost_process(run_script, case, ranks, reason):
    """The process that is lost is reported at once; a device that is never done, after the timeout."""
    lines = sorted(run_script("-c", BUSY, case).stdout.splitlines())
    assert [line.split()[:2] for line in lines] == [[rank, "True"] for rank in ranks]
    assert all("has lost the others" in line and re.search(reason, line) for line in lines), lines

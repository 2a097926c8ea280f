"""How a run ends before its time."""

import os
import signal
import threading
from datetime import timedelta

import pytest
from accelerate import Accelerator

from m2t_accel.config.fields import Interrupted
from m2t_accel.distributed.interruption import (
    Agreement,
    StopRequestedError,
    StopSignals,
    Trouble,
    report_lost_processes,
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_and_told(number, capfd):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's, after the one that counts
        assert signals.received == number
    assert signal.getsignal(number) is before
    told = capfd.readouterr().err
    assert told.count("the run ends after this step and saves") == 1
    assert number.name in told
    assert ("Ctrl-C again ends it at once" in told) == (number == signal.SIGINT)


def test_the_second_ctrl_c_is_not_caught(capfd):
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_outside_of_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        with StopSignals() as signals:
            found.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(0, before)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_the_exit_status_of_a_stop(number, status):
    interruption = StopSignals().interruption(number, "after step 3")
    assert (interruption.status, str(interruption)) == (status, f"stopped by {number.name}, after step 3")


def test_one_process_agrees_with_itself():
    agreement = Agreement(timedelta(seconds=1))
    assert agreement.reach() == (Trouble.NONE, 0, False)
    assert agreement.reach(Trouble.LOSS_NOT_FINITE, 15, True) == (Trouble.LOSS_NOT_FINITE, 15, True)


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
def test_a_lost_process_is_one_line(message):
    with (
        pytest.raises(Interrupted, match=r"process 1 of 2 has lost the others: .*waited for 6 minutes") as caught,
        report_lost_processes(TwoProcesses(), timedelta(minutes=6)),
    ):
        raise RuntimeError(message)
    assert caught.value.status == 75


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="shapes"), report_lost_processes(TwoProcesses(), timedelta(minutes=6)):
        raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="NCCL"), report_lost_processes(Accelerator(), timedelta(minutes=6)):
        raise RuntimeError("NCCL of one process")
    with pytest.raises(StopRequestedError), report_lost_processes(TwoProcesses(), timedelta(minutes=6)):
        raise StopRequestedError(signal.SIGTERM)


SILENCE = """
import os, sys, tempfile, time
from datetime import timedelta
import torch
from m2t_accel.distributed import interruption
from m2t_accel.distributed.processes import create_groups
from m2t_accel.config.fields import Interrupted

class OfThree:
    num_processes, process_index = 3, 0

torch.set_num_threads(1)
interruption.ROLL_CALL = timedelta(seconds=2)
path, children, timeout = tempfile.mktemp(), [], timedelta(seconds=2)
for rank in range(3):
    children.append(os.fork())
    if children[-1] == 0:
        store = torch.distributed.FileStore(path, 3)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=3)
        create_groups(timeout)
        agreement = interruption.Agreement(timeout)
        agreement.reach()
        if rank == 1:
            time.sleep(60)
        OfThree.process_index = rank
        try:
            with interruption.report_lost_processes(OfThree(), timeout):
                agreement.reach()
        except Interrupted as error:
            print(error, flush=True)
        os._exit(0)
for child in (children[0], children[2]):
    os.waitpid(child, 0)
os.kill(children[1], 9)
"""


@pytest.mark.slow
def test_who_is_silent_in_the_agreement_is_named(run_script):
    """The group of a call that timed out is of no use any more: the roll is called over another."""
    said = run_script("-c", SILENCE).stdout
    assert "process 0 of 3 has lost the others: no word from process 1 (" in said
    assert "process 2 of 3 has lost the others: " in said

import pytest
from accelerate import Accelerator

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.distributed.processes import check_same_images, on_all_processes


def test_the_error_of_another_process_is_raised_on_this_one(monkeypatch):
    assert on_all_processes(Accelerator(), lambda: 5) == 5
    monkeypatch.setattr("m2t_accel.distributed.processes.gather_to_all", lambda message: [message, "--dataset x"])
    with pytest.raises(ConfigurationError, match="--dataset x"):
        on_all_processes(Accelerator(), lambda: 5)


def test_an_unexpected_error_reaches_the_other_processes_and_stays_itself_on_its_own(monkeypatch):
    sent = []
    monkeypatch.setattr("m2t_accel.distributed.processes.gather_to_all", lambda message: [sent.append(message)])

    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        on_all_processes(Accelerator(), fail)
    assert sent == ["another process has failed: OSError: [Errno 28] No space left on device"]


def test_machines_with_different_images_are_refused(monkeypatch):
    check_same_images(Accelerator(), "digits: 1,437 images", "abc")
    monkeypatch.setattr("m2t_accel.distributed.processes.gather_to_all", lambda found: [found, "other: 3 images"])
    with pytest.raises(ConfigurationError, match=r"digits: 1,437 images \[abc\].*other: 3 images"):
        check_same_images(Accelerator(), "digits: 1,437 images", "abc")


# Two processes that end right after a collective call, six times.
EXITS = """
import collections, os, sys, tempfile
from datetime import timedelta
import torch
from torch.nn.parallel import DistributedDataParallel
from m2t_accel.config.command_line import errors_in_one_line
from m2t_accel.config.fields import ConfigurationError, Interrupted
from m2t_accel.distributed.processes import control_group, create_groups, destroy_process_group, groups

ENDS = {"success": None, "error": ConfigurationError("wrong"), "signal": Interrupted("stopped", 75)}
error = ENDS[sys.argv[1]]
if error is not None:
    import torch._dynamo  # else each network below would import it
torch.set_num_threads(1)
sys.setswitchinterval(1000)  # gloo's threads get the interpreter only when another thread waits
os.environ.update(ACCELERATE_USE_CPU="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
statuses = collections.Counter()
for _ in range(6):
    path, children = tempfile.mktemp(), []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            store = torch.distributed.FileStore(path, 2)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
            create_groups(timedelta(seconds=60))
            for group in (control_group(), groups().download, None):
                torch.distributed.all_reduce(torch.ones(1000), group=group)
            with errors_in_one_line():
                if error is not None:
                    network = DistributedDataParallel(torch.nn.Linear(9, 9))
                    network(torch.ones(9)).sum().backward()
                    raise error
                destroy_process_group()
            sys.exit()
    statuses.update(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
print(dict(statuses))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status", "printed"),
    [("success", 0, ""), ("error", 2, "-c: error: wrong\n"), ("signal", 75, "-c: stopped\n")],
)
def test_a_process_that_ends_after_a_collective_call_does_not_abort(run_script, end, status, printed):
    """With torch's destroy_process_group alone, or with SystemExit after an error, one of five or ten does."""
    done = run_script("-c", EXITS, end)
    assert (done.stdout, done.stderr) == (f"{{{status}: 12}}\n", 12 * printed)


# Three processes, in which the gradient of each parameter differs.
BUCKETS = """
import os, sys, tempfile
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from m2t_accel.distributed.processes import order_gradient_buckets

torch.set_num_threads(1)
path, children = tempfile.mktemp(), []
for rank in range(3):
    children.append(os.fork())
    if children[-1] == 0:
        store = torch.distributed.FileStore(path, 3)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=3)
        torch.manual_seed(0)
        layers = [torch.nn.Linear(70, 70) for _ in range(60)]
        network = DistributedDataParallel(torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(70)))
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        if sys.argv[1] == "ordered":
            order_gradient_buckets(network)
        same = all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())
        same = same and torch.random.initial_seed() == 0 and all(p.grad is None for p in network.parameters())
        found = []
        for _ in range(2):
            images = torch.randn(8, 70, generator=torch.Generator().manual_seed(rank))
            network(images).pow(2).sum().backward()
            found.append([p.grad.clone() for p in network.parameters()])
            network.zero_grad()
        if rank == 0:
            print(same, sum(not a.equal(b) for a, b in zip(*found)) > 0)
            sys.stdout.flush()
        torch.distributed.barrier()
        os._exit(0)
for child in children:
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ordered", "as torch does"])
def test_the_first_backward_sums_gradients_as_later_ones_do(run_script, case):
    assert run_script("-c", BUCKETS, case).stdout == f"True {case != 'ordered'}\n"

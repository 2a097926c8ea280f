"""Measure what a run survives: `python tests/survive.py kills`, `short`, `processes`, `truncation`, `cost`, `scaling`.

Each printed figure was measured by that call. The documentation quotes them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
DIGITS = ("--recipe", "digits", "--warmup_epochs", "2", "--device_batch_size", "32", "--num_workers", "1")
# The line that `short` prints if runs that had trained were killed and resumed, and equal the run that was not killed.
ALL_EQUAL = (
    r"short: [1-9]\d* kills .* [1-9]\d* after a step, .* [1-9]\d* resumes; 0 of [1-9]\d* tensors differ, "
    r"metrics by at most 0\.0, 0 samples lost, 0 repeated"
)
TRAINS = r"resumes from step|epoch 0: "  # in the first line that a run prints after its set-up


def command(record: Path, output_dir: Path, num_processes: int, arguments: Sequence[object]) -> list[str]:
    """Return the command of a recorded run."""
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", "accelerate_configs/cpu2.yaml"]
    launch += ["--num_processes", str(num_processes)]
    words = [sys.executable, *(launch if num_processes > 1 else [])]
    words += ["tests/pretrain_recorded.py", str(record), *map(str, arguments), "--output_dir", str(output_dir)]
    return words


def start(words: Sequence[str]) -> subprocess.Popen:
    """Start a command in the repository's root, with one thread per process and in a process group of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_", "LOCAL_", "WORLD_"))}
    # Rounding depends on the number of threads, and two processes on two cores have one each.
    return subprocess.Popen(
        list(words),
        cwd=ROOT,
        env={**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(words: Sequence[str]) -> str:
    """Run a command to its end. Return what it printed."""
    process = start(words)
    printed, _ = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}:\n{printed[-3000:]}")
    return printed


def read_until(process: subprocess.Popen, pattern: str) -> str:
    """Read the output of a process up to a line that contains the pattern. Return it."""
    printed = ""
    for line in process.stdout:
        printed += line
        if re.search(pattern, line):
            return printed
    raise RuntimeError(f"the process ended without a line {pattern}:\n{printed[-3000:]}")


def kill_at_random(
    process: subprocess.Popen, output_dir: Path, rng: random.Random, in_a_save: bool
) -> tuple[str, bool]:
    """Kill -9 the run, or one of its processes, at a random moment.

    Returns:
        The process that was killed ("all" or its number), and whether a checkpoint was being written.
    """
    trainers = trainers_of(process)  # before the save: reading all command lines takes longer than one
    time.sleep(rng.uniform(0.05, 1.6))
    checkpoints = output_dir / "checkpoints"
    deadline = time.monotonic() + 5
    while in_a_save and time.monotonic() < deadline and not any(checkpoints.glob(".step-*.partial")):
        time.sleep(0.0005)
    which = rng.choice(["all", *range(len(trainers))]) if len(trainers) > 1 else "all"
    victims = trainers if which == "all" else [trainers[which]]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.02)
    was_saving = any(checkpoints.glob(".step-*.partial"))
    process.communicate(timeout=120)
    return str(which), was_saving


def trainers_of(process: subprocess.Popen) -> list[int]:
    """Return the processes of a run that train: no launcher, and no loader's worker, which is a fork of a trainer."""
    found = []
    root = psutil.Process(process.pid)
    for candidate in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            words, parent_words = candidate.cmdline(), candidate.parent().cmdline()
            runs_script = any(word.endswith(("pretrain_recorded.py", "scripts/pretrain.py")) for word in words)
            if runs_script and "accelerate.commands.launch" not in words and words != parent_words:
                found.append(candidate.pid)
    return found


def last_tensors(output_dir: Path) -> dict[str, object]:
    """Return all tensors of the last checkpoint and of the encoder."""
    from safetensors.torch import load_file

    from m2t_accel.run.checkpoint import list_checkpoints, read_tensors, verify

    files = read_tensors(verify(list_checkpoints(output_dir / "checkpoints")[0]))
    files["encoder"] = load_file(output_dir / "encoder" / "model.safetensors")
    return {f"{file}: {name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}


def different(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Return the names of the tensors that are not the same bit for bit."""
    names = sorted(one.keys() ^ other.keys())
    return names + [name for name in one.keys() & other.keys() if not one[name].equal(other[name])]


def samples_of(record: Path) -> dict[tuple[int, int], list[list[int]]]:
    """Return the samples of each computation of a step, by (step, virtual device)."""
    shown: dict[tuple[int, int], list[list[int]]] = {}
    for file in record.iterdir():
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                step, device, samples = json.loads(line)
                shown.setdefault((step, device), []).append(samples)
    return shown


def num_recorded(record: Path) -> int:
    """Return the number of sub-batches that the processes of a run have recorded so far."""
    return sum(map(len, samples_of(record).values())) if record.exists() else 0


def lost_and_repeated(record: Path, reference: Path) -> tuple[int, int]:
    """Count the samples that a run lacks in a sub-batch of the reference, and those that it has in excess."""
    expected, lost, repeated = samples_of(reference), 0, 0
    found = samples_of(record)
    for place in expected.keys() | found.keys():
        reference_samples = set(expected.get(place, [[]])[0])
        for samples in found.get(place, [[]]):
            lost += len(reference_samples - set(samples))
            repeated += len(samples) - len(set(samples) & reference_samples)
    return lost, repeated


def metrics(output_dir: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl without what a clock has measured."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second", "data_wait")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def largest_difference(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """Return the largest difference between the metrics of two runs; infinite if their lines differ in kind."""
    from m2t_accel.run.trackers import scalars

    one, other = ([scalars(row) for row in rows] for rows in (one, other))
    if [row.keys() for row in one] != [row.keys() for row in other]:
        return float("inf")
    return max(abs(a[name] - b[name]) for a, b in zip(one, other, strict=True) for name in a)


def streamed_digits(folder: Path, as_pixels: bool = False) -> list[object]:
    """Write digits, as PNG or as pixels, to parquet files with row groups of 48. Return flags to stream them."""
    from datasets import Array2D, Dataset, Features

    from m2t_accel.data.decode import decode_image
    from m2t_accel.data.sources import load_digits

    folder.mkdir()
    for name, split in zip(("train", "validation"), load_digits().values(), strict=True):
        if as_pixels:
            pixels = [decode_image(image)[:, :, 0] for image in split["image"]]
            features = Features({"pixels": Array2D((8, 8), "uint8"), "label": split.features["label"]})
            split = Dataset.from_dict({"pixels": pixels, "label": split["label"]}, features)
        split.to_parquet(folder / f"{name}-0.parquet", batch_size=48)
    return ["--dataset", folder, "--streaming"]


def kills(
    work: Path, num_processes: Sequence[int], source: Sequence[object], epochs: int, seed: int = 0
) -> dict[str, object]:
    """Compare a run that is killed at random moments with one that is not.

    Args:
        num_processes: of each start of the run; the last start is not killed. If they differ, the other run has one
            process, and tensors of single processes are not compared.
        source: flags of the images; none for the digits that scikit-learn has.
    """
    arguments = [*DIGITS, *source, "--epochs", epochs, "--checkpoint_every", "7steps", "--log_every", 5]
    reference, victim = work / "reference", work / "victim"
    all_equal = len(set(num_processes)) == 1
    run(command(work / "reference-record", reference, num_processes[0] if all_equal else 1, arguments))
    rng = random.Random(seed)
    killed, in_saves = [], 0
    for number in num_processes[:-1]:
        process = start(command(work / "victim-record", victim, number, arguments))
        read_until(process, TRAINS)
        who, was_saving = kill_at_random(process, victim, rng, in_a_save=len(killed) % 2 == 0)
        if (victim / "training.json").exists():
            raise RuntimeError("the run was complete before the last kill: give it more epochs")
        killed.append(who)
        in_saves += was_saving
    run(command(work / "victim-record", victim, num_processes[-1], arguments))
    lost, repeated = lost_and_repeated(work / "victim-record", work / "reference-record")
    tensors = [last_tensors(folder) for folder in (reference, victim)]
    if not all_equal:
        tensors = [{name: t for name, t in part.items() if not name.startswith("processes")} for part in tensors]
    return {
        "kills": len(killed),
        "in saves": in_saves,
        "who": killed,
        "tensors": len(tensors[0]),
        "different": different(*tensors),
        "metrics differ by": largest_difference(metrics(reference), metrics(victim)),
        "lost": lost,
        "repeated": repeated,
    }


def train_in_a_fork(rank: int, num_processes: int, port: int, record: Path, words: Sequence[str]) -> None:
    """Train as one process of a recorded run. A launch would take seconds to import torch."""
    import torch

    from m2t_accel.run import completion

    completion.draw_curves = lambda *arguments, **options: None  # takes as long as the training
    torch.set_num_threads(1)
    with record.with_suffix(".txt").open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    if num_processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = ["pretrain_recorded.py", str(record), *words]
    runpy.run_path(str(ROOT / "tests" / "pretrain_recorded.py"), run_name="__main__")


def fork_run(record: Path, output_dir: Path, num_processes: int) -> list[multiprocessing.Process]:
    """Start a recorded run of 16 steps as forks of this process. Return its processes."""
    arguments = ["--recipe", "digits", "--max_images", 480, "--max_steps", 16, "--warmup_epochs", 0.1]
    arguments += ["--batch_size", 4 * num_processes, "--device_batch_size", 4, "--hidden_size", 32]
    arguments += ["--projection_size", 16, "--num_workers", 0, "--evaluate_every", 0, "--log_every", 1]
    arguments += ["--checkpoint_every", "2steps", "--output_dir", output_dir]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context, processes = multiprocessing.get_context("fork"), []
    for rank in range(num_processes):
        given = (rank, num_processes, port, record, list(map(str, arguments)))
        processes.append(context.Process(target=train_in_a_fork, args=given, daemon=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn about a fork beside threads
            processes[-1].start()
    return processes


def kills_of_short_runs(work: Path, num_processes: int, kills: int, minutes: float, seed: int = 0) -> dict[str, float]:
    """Kill short runs at random moments until they are complete, and compare each with a run that is not killed.

    A moment is anywhere between the fork of the processes and their end, set-up included. The kill hits all processes,
    or one of them.

    Args:
        kills: number of kills after which no run is killed any more, if one was resumed from a checkpoint by then.
        minutes: time after which no run is killed any more.
    """
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="-1", ACCELERATE_USE_CPU="true")
    # The forks have these modules then.
    import sklearn.datasets  # noqa: F401

    import m2t_accel.pretrain  # noqa: F401
    from m2t_accel.run.checkpoint import list_checkpoints

    rng, began = random.Random(seed), time.monotonic()
    reference, reference_record = work / "reference", work / "reference-record"
    for process in fork_run(reference_record, reference, num_processes):
        process.join()
        if process.exitcode:
            raise RuntimeError(reference_record.with_suffix(".txt").read_text()[-3000:])
    duration = time.monotonic() - began
    expected = last_tensors(reference)
    found = dict.fromkeys(("runs", "kills", "of one", "after a step", "in saves", "resumes", "lost", "repeated"), 0)
    found |= {"tensors": 0, "different": 0, "metrics differ by": 0.0}

    def goes_on() -> bool:
        is_early = found["kills"] < kills or not found["resumes"]  # a kill before the first checkpoint tests little
        return is_early and time.monotonic() - began < 60 * minutes

    while goes_on():
        output_dir, record = work / f"run-{found['runs']}", work / f"record-{found['runs']}"
        statuses = [None]
        while set(statuses) != {0}:
            found["resumes"] += bool(list_checkpoints(output_dir / "checkpoints"))
            num_before = num_recorded(record)
            processes = fork_run(record, output_dir, num_processes)
            victims = []
            if goes_on():
                time.sleep(rng.uniform(0, duration))
                victims = processes if rng.random() < 0.5 else [rng.choice(processes)]
                for process in victims:
                    process.kill()
            for process in processes:
                process.join(30 if victims else 120)
                process.kill()  # a process that waits for one that never came; a launcher does the same
                process.join()
            statuses = [process.exitcode for process in processes]
            if any(process.exitcode == -signal.SIGKILL for process in victims):
                found["kills"] += 1
                found["of one"] += len(victims) < num_processes
                found["after a step"] += num_recorded(record) > num_before
                found["in saves"] += any((output_dir / "checkpoints").glob(".step-*.partial"))
            elif any(statuses):
                raise RuntimeError(f"a run ended with {statuses}:\n{record.with_suffix('.txt').read_text()[-3000:]}")
        lost, repeated = lost_and_repeated(record, reference_record)
        found["lost"] += lost
        found["repeated"] += repeated
        found["tensors"] += len(expected)
        found["different"] += len(different(expected, last_tensors(output_dir)))
        difference = largest_difference(metrics(reference), metrics(output_dir))
        found["metrics differ by"] = max(found["metrics differ by"], difference)
        found["runs"] += 1
        shutil.rmtree(output_dir)
    return found


def stopped_and_moved(work: Path, first: int, second: int, float64: bool, epochs: int = 6) -> dict[str, object]:
    """Compare a run that starts on `first` processes and ends on `second` with one on `first` alone."""
    precision = ["--float64"] if float64 else []
    arguments = [*precision, *DIGITS, "--epochs", epochs, "--log_every", 1, "--checkpoint_every", "1epoch"]
    reference, moved = work / "reference", work / "moved"
    run(command(work / "reference-record", reference, first, arguments))
    half = (epochs // 2) * 22 + 5
    words = command(work / "moved-record", moved, first, [*arguments, "--checkpoint_every", f"{half}steps"])
    process = start(words)
    read_until(process, TRAINS)
    while not (moved / "checkpoints" / f"step-{half}").exists():
        if process.poll() is not None:
            raise RuntimeError("the run ended before it was stopped")
        time.sleep(0.01)
    for pid in trainers_of(process):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    for path in (moved / "checkpoints").iterdir():
        if path.name != f"step-{half}":
            shutil.rmtree(path)
    printed = run(command(work / "moved-record", moved, second, arguments))
    assert f"resumes from step {half} of" in printed, printed
    losses = [[row["loss"] for row in metrics(folder) if "loss" in row] for folder in (reference, moved)]
    lost, repeated = lost_and_repeated(work / "moved-record", work / "reference-record")
    return {
        "steps": len(losses[0]),
        "from step": half,
        "largest difference of a loss": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "lost": lost,
        "repeated": repeated,
    }


def truncations(work: Path) -> tuple[int, int]:
    """Cut each file of a checkpoint at its start, middle and end. Return the number of cuts, and of those noticed."""
    from m2t_accel.run.checkpoint import DamagedCheckpointError, list_checkpoints, verify

    run(command(work / "record", work / "run", 1, [*DIGITS, "--epochs", 3]))
    (path,) = list_checkpoints(work / "run" / "checkpoints")
    verify(path)
    cuts = noticed = 0
    for file in path.iterdir():
        whole = file.read_bytes()
        for length in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            cuts += 1
            try:
                verify(path)
            except DamagedCheckpointError as error:
                noticed += file.name in str(error)
        file.write_bytes(whole)
    verify(path)
    return cuts, noticed


def cost_of_a_save(work: Path, repeats: int) -> dict[str, float]:
    """Measure how much longer the steps of a ResNet-50 take while its state is saved.

    Each of `repeats` pairs has two equal stretches of steps, in alternating order, one with a save at its start. The
    figures are medians, in seconds.
    """
    import torch
    from accelerate import Accelerator

    from m2t_accel.config.recipes import build_config
    from m2t_accel.data.sources import load_images
    from m2t_accel.distributed.interruption import StopSignals
    from m2t_accel.pretrain import Run, create_step
    from m2t_accel.run.folder import RunFolder, Start

    torch.manual_seed(0)
    config = build_config({"recipe": "8x2080Ti-b256-100ep", "dataset": "digits", "output_dir": str(work / "run")})
    config = dataclasses.replace(config, evaluate_every=0)
    accelerator = Accelerator(mixed_precision="bf16")
    training = create_step(config, accelerator)
    run = Run(config, load_images(config), RunFolder(work / "run"), accelerator, training, Start(), StopSignals())
    on_gpu = accelerator.device.type == "cuda"
    batch_size, num_steps = (32, 40) if on_gpu else (4, 4)
    views = torch.rand(2, batch_size, 3, 224, 224, device=accelerator.device)
    now = config.schedule(0, 1000)

    def step() -> None:
        training.begin(now)
        training.forward_backward(views[0], views[1])
        training.update(now)
        run.progress.step += 1

    def finished() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    saver = run.saver
    seconds: dict[bool, list[float]] = {False: [], True: []}
    copies, writes = [], []
    step()
    saver.begin()
    saver.wait()
    for i in range(repeats):
        for saves in (False, True) if i % 2 else (True, False):
            finished()
            began = time.perf_counter()
            if saves:
                saver.begin()
                copies.append(time.perf_counter() - began)
            for _ in range(num_steps):
                step()
            finished()
            seconds[saves].append(time.perf_counter() - began)
            saver.wait()
    for _ in range(3):
        began = time.perf_counter()
        run.progress.step += 1
        saver.begin()
        saver.wait()
        writes.append(time.perf_counter() - began)
    size = sum(path.stat().st_size for path in saver.last_good.iterdir())
    without, with_save = (statistics.median(seconds[saves]) for saves in (False, True))
    run.report.bar = None
    run.close()
    extra = statistics.median(a - b for a, b in zip(seconds[True], seconds[False], strict=True))
    return {
        "megabytes": size / 1e6,
        "copy": statistics.median(copies),
        "copy and write, alone": statistics.median(writes),
        "stretch without a save": without,
        "stretch with a save": with_save,
        "longer by": extra,
        "share of a minute": extra / 60,
    }


def scaling(work: Path, repeats: int) -> dict[str, object]:
    """Measure the seconds of a step on one process, and on two with twice the batch, each with one thread."""
    found: dict[int, list[float]] = {1: [], 2: []}
    step = ["scripts/benchmark.py", "step", "--variants", "eager", "--device_batch_size", "4", "--json"]
    for i in range(repeats):
        for number in (1, 2) if i % 2 else (2, 1):
            config = ["--config_file", f"accelerate_configs/cpu{'' if number == 1 else 2}.yaml"]
            file = work / f"{number}.json"
            run([sys.executable, "-m", "accelerate.commands.launch", "--quiet", *config, *step, str(file)])
            found[number].append(json.loads(file.read_text())["variants"]["eager"]["ms"] / 1000)
    one, two = (statistics.median(found[number]) for number in (1, 2))
    sent = json.loads((work / "2.json").read_text())["megabytes_sent"]
    return {"one": one, "two": two, "efficiency": one / two, "megabytes sent by each of two": sent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "short", "processes", "truncation", "cost", "scaling"))
    parser.add_argument("--kills", type=int, default=20, help="of a run on one process; one on more is killed 6 times")
    parser.add_argument("--minutes", type=float, default=10, help="`short` kills no run after so many minutes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--num_processes", type=int, nargs="+", default=(1, 2), choices=(1, 2, 3, 4))
    options = parser.parse_args()

    def folder() -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="survive-")

    if options.what == "kills":
        for num_processes in options.num_processes:
            for streamed in (False, True):
                number, began = options.kills if num_processes == 1 else 6, time.monotonic()
                with folder() as work:
                    source = streamed_digits(Path(work, "set")) if streamed else []
                    found = kills(Path(work), [num_processes] * (number + 1), source, epochs=60)
                print(
                    f"{num_processes} processes, {'streamed' if streamed else 'local'}: {found['kills']} kills, "
                    f"{found['in saves']} of them in saves (killed: {', '.join(found['who'])}); "
                    f"{len(found['different'])} of {found['tensors']} tensors differ, metrics by at most "
                    f"{found['metrics differ by']}, {found['lost']} samples lost, "
                    f"{found['repeated']} repeated; {time.monotonic() - began:.0f} s",
                    flush=True,
                )
    elif options.what == "short":
        for num_processes in options.num_processes:
            began = time.monotonic()
            with folder() as work:
                found = kills_of_short_runs(Path(work), num_processes, options.kills, options.minutes)
            print(
                f"{num_processes} processes, short: {found['kills']} kills of {found['runs']} runs "
                f"({found['of one']} of one process among others, {found['after a step']} after a step, "
                f"{found['in saves']} in saves), {found['resumes']} resumes; {found['different']} of "
                f"{found['tensors']} tensors differ, metrics by at most {found['metrics differ by']}, "
                f"{found['lost']} samples lost, {found['repeated']} repeated; {time.monotonic() - began:.0f} s",
                flush=True,
            )
    elif options.what == "processes":
        for first, second in ((1, 2), (2, 1)):
            for float64 in (False, True):
                with folder() as work:
                    found = stopped_and_moved(Path(work), first, second, float64)
                print(f"{first} → {second} processes, float{64 if float64 else 32}: {found}", flush=True)
    elif options.what == "truncation":
        with folder() as work:
            print("{} cuts, {} noticed".format(*truncations(Path(work))))
    elif options.what == "cost":
        with folder() as work:
            for name, value in cost_of_a_save(Path(work), options.repeats).items():
                print(f"{name:<24} {value:.4g}")
    else:
        with folder() as work:
            for name, value in scaling(Path(work), options.repeats).items():
                print(f"{name:<14} {value}")


if __name__ == "__main__":
    main()

"""Run what a study lacks: its runs and their evaluations, some at a time, each a process with a log file."""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.distributed.interruption import StopSignals, end_with_parent
from m2t_accel.pages.record import read_run
from m2t_accel.progress import duration
from m2t_accel.run.folder import RunFolder
from m2t_accel.study.plan import Study, StudyRun, flag_words
from m2t_accel.study.results import Results, is_complete, is_trained, probe_result

LOG = "log.txt"  # in the folder of a run
POLL_INTERVAL = 0.2  # seconds between two looks at the processes

PRETRAINING, PROBE, RANDOM_WEIGHTS = "pretraining", "linear probe", "linear probe of random weights"


class Task(NamedTuple):
    """A command of a study, in the folder of a run."""

    run: StudyRun
    kind: str  # PRETRAINING, PROBE or RANDOM_WEIGHTS

    @property
    def key(self) -> tuple[str, str]:
        """Return what no two tasks share; the runs of one seed share their random weights."""
        return self.kind, str(self.run.of_random_weights) if self.kind == RANDOM_WEIGHTS else self.run.name

    def __str__(self) -> str:
        return f"{self.run.name}: {self.kind}"

    def is_done(self) -> bool:
        if self.kind == PRETRAINING:
            return is_trained(self.run)
        return probe_result(self.run, self.kind == RANDOM_WEIGHTS) is not None

    def figure(self) -> str:
        """Return its result in words."""
        if self.kind == PRETRAINING:
            share = read_run(self.run.folder).last("knn_top1")
            return "kNN was not measured" if share is None else f"kNN top-1 {100 * share:.2f} %"
        return f"top-1 {100 * probe_result(self.run, self.kind == RANDOM_WEIGHTS)['figures']['top1']:.2f} %"

    def words(self, scripts: Path) -> list[str]:
        """Return the script and its arguments."""
        if self.kind == PRETRAINING:
            given = {**self.run.given, "output_dir": self.run.config.output_dir}
            return [str(scripts / "pretrain.py"), *flag_words(given)]
        given = {**self.run.probe, **({"random_weights": True} if self.kind == RANDOM_WEIGHTS else {})}
        return [str(scripts / "linear_probe.py"), *flag_words(given)]


def next_task(
    study: Study, stored: Results, begun: Collection[tuple[str, str]] = (), busy: Collection[str] = ()
) -> Task | None:
    """Return the next task that can start: its run is the first in the grid's order, and its input is complete.

    Args:
        stored: results that need not be measured again.
        begun: keys of the tasks that are under way, done or have failed.
        busy: names of the runs that have a task under way; a process that has written its result may not have ended.
    """
    results = {result["name"]: result for result in stored["runs"]}
    measured = [each["settings"] for each in stored["random_weights"] if each["linear_top1"] is not None]
    for run in (run for run in study.runs if run.name not in busy):
        # Random weights first: they need the folder of a run, and a run with a complete result may lose its folder.
        task = Task(run, RANDOM_WEIGHTS)
        is_missing = run.probe is not None and run.of_random_weights not in measured and task.key not in begun
        group = [each for each in study.runs if each.of_random_weights == run.of_random_weights]
        if is_missing and is_trained(run) and not any(Task(each, RANDOM_WEIGHTS).is_done() for each in group):
            return task
        if is_complete(results.get(run.name), study):
            continue
        tasks = [Task(run, PRETRAINING)] + ([Task(run, PROBE)] if run.probe is not None else [])
        task = next((task for task in tasks if not task.is_done()), None)
        if task is not None and task.key not in begun:
            return task
    return None


def run_study(
    study: Study, stored: Results, runs_dir: Path, scripts: Path, jobs: int, report: Callable[[], object]
) -> int:
    """Run everything that is missing, `jobs` processes at a time. Return the number of tasks that have failed.

    After a signal the processes get a SIGTERM: a run saves a checkpoint and ends.

    Args:
        stored: results that need not be measured again.
        runs_dir: folder of the runs; it is locked meanwhile.
        scripts: folder of the scripts.
        report: called after each task.

    Raises:
        ConfigurationError: another process runs a study in runs_dir.
        Interrupted: a signal has stopped the study.
    """
    environment = dict(os.environ)
    if jobs > 1:  # threads of several processes that wait for each other on the same cores slow all of them
        environment.setdefault("OMP_NUM_THREADS", "1")
    begun: set[tuple[str, str]] = set()
    running: list[tuple[Task, subprocess.Popen, float]] = []
    failures = 0
    with contextlib.closing(lock(runs_dir)), StopSignals() as signals:
        while True:
            while not signals.received and len(running) < jobs:
                task = next_task(study, stored, begun, [task.run.name for task, _, _ in running])
                if task is None:
                    break
                begun.add(task.key)
                running.append((task, start(task, scripts, environment), time.monotonic()))
                say(f"{task} starts")
            if not running:
                break
            time.sleep(POLL_INTERVAL)
            if signals.received:
                for _, process, _ in running:
                    process.terminate()
                for _, process, _ in running:
                    process.wait()
            ended = [each for each in running if each[1].poll() is not None]
            running = [each for each in running if each[1].poll() is None]
            for task, process, begin in ended:
                if process.returncode == 0 and task.is_done():
                    say(f"{task} is done, in {duration(time.monotonic() - begin)}: {task.figure()}")
                    report()
                elif not signals.received:
                    failures += 1
                    say(f"{task} FAILED with exit status {process.returncode}: {last_words(task.run.folder / LOG)}")
    if signals.received:
        raise signals.interruption(signals.received, "and all its processes have ended; the same command continues")
    return failures


def lock(runs_dir: Path) -> RunFolder:
    """Lock the folder of the runs, so that two studies do not start the same run.

    Raises:
        ConfigurationError: another process has locked it.
    """
    folder = RunFolder(runs_dir)
    try:
        folder.acquire_lock()
    except ConfigurationError:
        raise ConfigurationError(
            f"--runs_dir {runs_dir}: another study.py is running in it: wait for it, or give another folder"
        ) from None
    return folder


def start(task: Task, scripts: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start the process of a task. Its output is added to the log file in the folder of the run."""
    words = task.words(scripts)
    task.run.folder.mkdir(parents=True, exist_ok=True)
    with (task.run.folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n$ {shlex.join(['python', *words])}\n")
        log.flush()
        return subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the study alone, which then stops its processes
            preexec_fn=lambda: end_with_parent(signal.SIGTERM),  # also after a kill -9 of the study
        )


def last_words(log: Path) -> str:
    """Return the last line of a log file, and its path."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    line = text.splitlines()[-1] if text else ""
    return f"{textwrap.shorten(line, 300, placeholder=' …')} ({log})"


def say(line: str) -> None:
    print(f"{datetime.datetime.now():%H:%M} {line}", flush=True)

"""Send the metrics of a run to trackers, such as TensorBoard or MLflow, while training continues."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from m2t_accel.config.fields import ConfigurationError, one_line, plain_text
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.files import write_text
from m2t_accel.run.state import get_random_state, set_random_state

PROJECT = "m2t_accel"
START_TIMEOUT = 300.0  # seconds
FINISH_TIMEOUT = 60.0  # seconds; a cluster kills a job soon after its first signal

COMET_NAMES = {"COMET_EXPERIMENT_NAME", "COMET_START_EXPERIMENT_NAME"}

# What to type if a tracker does not start.
REMEDIES = {
    "tensorboard": "its files are written to the folder tensorboard/ of the run",
    "wandb": "type `wandb login`, or put WANDB_MODE=offline before the command",
    "trackio": "type `hf auth login`, or unset TRACKIO_SPACE_ID and TRACKIO_SERVER_URL to write to this machine",
    "mlflow": "MLFLOW_TRACKING_URI names its server; sqlite:///mlflow.db, for example, needs none",
    "comet_ml": "type `comet login`, or put COMET_START_ONLINE=false before the command",
    "swanlab": "type `swanlab login`, or put SWANLAB_MODE=offline before the command",
    "clearml": "type `clearml-init`, or put CLEARML_OFFLINE_MODE=1 before the command",
    "aim": "its files are written beside the folder of the run",
    "dvclive": "its files are written to the folder dvclive/ of the run",
}


class Trackers:
    """The trackers of a run. Process 0 has them all, the others none.

    trackers.json in the folder of the run has, for each tracker, the id of its run and the last step that it has. So a
    run that resumes continues the run of the tracker, and sends no step twice.
    """

    def __init__(self, config: PretrainConfig, names: Sequence[str]) -> None:
        folder = Path(config.output_dir)
        self.config = config
        self.file = folder / "trackers.json"
        self.lock = threading.Lock()  # of the file
        self.states: dict[str, dict[str, object]] = {}  # also of trackers that this start does not use
        if names:
            with contextlib.suppress(OSError, ValueError):
                self.states = json.loads(self.file.read_text(encoding="utf-8"))
        self.trackers = [Tracker(name, folder, self.states.get(name, {}), self.save) for name in names]

    def start(self, reported: int, resumes: bool) -> list[str]:
        """Start all trackers. Return a line for the user about each.

        Args:
            reported: the last step that has a line in metrics.jsonl.
            resumes: whether the run resumes from a checkpoint. Then a tracker that does not start is left out.

        Raises:
            ConfigurationError: a tracker of a new run does not start.
        """
        lines, random_state = [], get_random_state()
        for tracker in list(self.trackers):
            try:
                with no_input():
                    lines.append(tracker.start(settings_for_trackers(self.config), reported))
            except Exception as error:
                self.trackers.remove(tracker)
                message = (
                    f"--report_to {tracker.name}: does not start ({one_line(error)}): {REMEDIES[tracker.name]}; or "
                    "leave the name out"
                )
                if not resumes:
                    self.close()
                    raise ConfigurationError(message) from None
                lines.append(f"warning: {message}. The run continues without it")
        set_random_state(random_state)  # ClearML sets the seeds of all generators; an encoder may draw from them
        return lines

    def add(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Send lines of metrics. Each tracker leaves out the steps that it has."""
        for row in rows:
            for tracker in self.trackers:
                tracker.submit(lambda tracker=tracker, row=row: tracker.add(row))

    def add_curves(self, picture: Path) -> None:
        """Send the curves of the run."""
        for tracker in self.trackers if picture.exists() else ():
            tracker.submit(lambda tracker=tracker: send_picture(tracker.name, tracker.inner, picture, tracker.step))

    def warnings(self) -> list[str]:
        """Return the warnings since the last call."""
        return [tracker.warnings.popleft() for tracker in self.trackers for _ in range(len(tracker.warnings))]

    def close(self) -> list[str]:
        """Send the waiting lines and end the trackers, within FINISH_TIMEOUT. Return the last warnings."""
        for tracker in self.trackers:
            tracker.submit(tracker.finish)
            tracker.submit(None)
        end = time.monotonic() + FINISH_TIMEOUT
        for tracker in self.trackers:
            tracker.join(max(0, end - time.monotonic()))
        lines, self.trackers = self.warnings(), []
        return lines

    def save(self, name: str, state: Mapping[str, object]) -> None:
        """Write the state of one tracker to trackers.json; a failure may repeat lines, but does not end the run."""
        with self.lock, contextlib.suppress(OSError):
            self.states[name] = dict(state)
            write_text(self.file, json.dumps(self.states, indent=2) + "\n")


class Tracker:
    """One tracker, in a thread of its own: training does not wait for it, and its errors become warnings.

    Lines that it does not accept, for example while its server is unreachable, are sent again with the next line.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        state: Mapping[str, object],
        save: Callable[[str, Mapping[str, object]], None],
    ) -> None:
        self.name = name
        self.folder = folder
        self.run_id: str | None = state.get("run")
        self.step: int = state.get("step", -1)  # the last one that the tracker has
        self.save = save
        self.inner: GeneralTracker | None = None
        self.waiting: deque[Mapping[str, float]] = deque()
        self.warnings: deque[str] = deque()
        self.is_broken = False
        self.tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon: a tracker that hangs does not keep the process alive.
        self.thread = threading.Thread(target=self.work, name=name, daemon=True)
        self.thread.start()

    def work(self) -> None:
        """Run the tasks, and warn about the first of several failures."""
        for task in iter(self.tasks.get, None):
            try:
                task()
            except Exception as error:
                if not self.is_broken:
                    self.warnings.append(
                        f"warning: --report_to {self.name} fails ({one_line(error)}); the run continues, and "
                        "metrics.jsonl has all lines"
                    )
                self.is_broken = True
            else:
                self.is_broken = False

    def submit(self, task: Callable[[], None] | None) -> None:
        """Run a task after those before it; None ends the thread."""
        self.tasks.put(task)

    def start(self, settings: Mapping[str, object], reported: int) -> str:
        """Continue the run of the tracker, or start one. Return a line for the user.

        Raises:
            Exception: the tracker's own, or TimeoutError.
        """
        started: Future[str] = Future()

        def start() -> None:
            try:
                started.set_result(self.continue_or_start(settings, reported))
            except BaseException as error:  # some libraries call sys.exit
                started.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

        self.submit(start)
        try:
            return started.result(START_TIMEOUT)
        except TimeoutError:
            raise TimeoutError(f"no answer in {START_TIMEOUT:g} s") from None

    def continue_or_start(self, settings: Mapping[str, object], reported: int) -> str:
        if self.run_id is not None:
            if self.name == "tensorboard":  # the only one that can remove steps
                self.step = min(self.step, reported)
            try:
                self.inner = start_tracker(self.name, self.folder, settings, self.run_id, self.step + 1)
                return f"{self.name}: run {self.run_id} continues after step {self.step}"
            except Exception as error:
                reason = f", because run {self.run_id} cannot continue ({one_line(error)})"
        else:
            reason = ""
        self.step = -1
        self.inner = start_tracker(self.name, self.folder, settings, None, 0)
        self.run_id = identity(self.name, self.inner)
        self.inner.store_init_configuration(dict(settings))
        self.save(self.name, {"run": self.run_id, "step": self.step})
        return f"{self.name}: run {self.run_id} starts{reason}"

    def add(self, row: Mapping[str, float]) -> None:
        """Send a line of metrics, unless the tracker has this step."""
        if row["step"] > self.step:
            self.waiting.append(row)
        self.send()

    def send(self) -> None:
        """Send the lines that wait."""
        while self.waiting:
            values = scalars(self.waiting[0])
            step = values.pop("step")
            # wandb otherwise keeps the line until the next one, and loses it if the process is killed.
            self.inner.log(values, step=step, **({"commit": True} if self.name == "wandb" else {}))
            self.waiting.popleft()
            self.step = step
            self.save(self.name, {"run": self.run_id, "step": step})

    def finish(self) -> None:
        """Send the lines that wait, and end the tracker."""
        if self.inner is not None:
            try:
                self.send()
            finally:
                self.inner.finish()

    def join(self, seconds: float) -> None:
        """Wait at most this many seconds for the thread to end."""
        self.thread.join(seconds)
        if self.thread.is_alive() or self.waiting:
            self.warnings.append(
                f"warning: --report_to {self.name} may lack the lines after step {self.step}; metrics.jsonl has them, "
                "and a run that resumes sends them"
            )


def scalars(row: Mapping[str, object]) -> dict[str, float]:
    """Return the figures of a line of metrics, without its alarms; those of a group are named GROUP/NAME."""
    values: dict[str, float] = {}
    for name, value in row.items():
        if name == "alarms":  # texts
            continue
        group = value if isinstance(value, Mapping) else None
        values |= {name: value} if group is None else {f"{name}/{part}": figure for part, figure in group.items()}
    return values


def settings_for_trackers(config: PretrainConfig) -> dict[str, object]:
    """Return the settings as numbers, texts and booleans."""
    return {k: v if isinstance(v, bool | int | float | str) else plain_text(v) for k, v in vars(config).items()}


@contextlib.contextmanager
def no_input() -> Iterator[None]:
    """Replace stdin by an empty file, so that no library waits for a login to be typed; it raises an error instead."""
    stdin = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin


def start_tracker(
    name: str, folder: Path, settings: Mapping[str, object], run_id: str | None, first_step: int
) -> GeneralTracker:
    """Start a run of a tracker, or continue the run `run_id`. Variables of the user's environment come first.

    Args:
        name: name of the tracker in Accelerate.
        folder: folder of this run; its name is the name of the tracker's run.
        settings: settings of the run.
        run_id: what `identity` returned for the run to continue.
        first_step: the first step to come.

    Raises:
        Exception: the library's own.
    """
    environment = os.environ
    project, run_name = PROJECT, folder.resolve().name
    options: dict[str, object] = {}
    match name:
        case "tensorboard":
            project, options = "tensorboard", {"logging_dir": str(folder), "purge_step": first_step}
        case "wandb":
            # Without a limit, a lost network would keep a run that has ended.
            environment.setdefault("WANDB_FINISH_TIMEOUT", f"{FINISH_TIMEOUT:g}")
            project = environment.get("WANDB_PROJECT", PROJECT)
            options = {"name": environment.get("WANDB_NAME", run_name), "dir": environment.get("WANDB_DIR", folder)}
            if run_id is not None:
                options |= {"id": run_id, "resume": "allow"}
        case "trackio":
            project = environment.get("TRACKIO_PROJECT", PROJECT)
            options = {"name": run_name, "resume": "never" if run_id is None else "must"}
            options["config"] = dict(settings)  # a run that continues would lose them
        case "mlflow":
            options = {"run_name": environment.get("MLFLOW_RUN_NAME", run_name), "run_id": run_id}
        case "comet_ml":
            project = environment.get("COMET_PROJECT_NAME", PROJECT)
            options = {} if run_id is None else {"experiment_key": run_id, "mode": "get"}
        case "swanlab":
            project = environment.get("SWANLAB_PROJ_NAME", PROJECT)
            options = {"experiment_name": environment.get("SWANLAB_EXP_NAME", run_name)}
            if run_id is not None:
                options |= {"id": run_id, "resume": "must"}
        case "clearml":
            options = {"task_name": environment.get("CLEARML_TASK", run_name), "reuse_last_task_id": False}
            if run_id is not None:
                options["continue_last_task"] = run_id
        case "aim":
            options = {"logging_dir": str(folder.resolve().parent), "experiment": PROJECT, "run_hash": run_id}
        case "dvclive":
            options = {"dir": str(folder / "dvclive"), "resume": run_id is not None}
            # By default dvclive commits all files of the Git repository, and writes into its root.
            options |= {"save_dvc_exp": False, "dvcyaml": str(folder / "dvclive" / "dvc.yaml")}
    tracker = LOGGER_TYPE_TO_CLASS[name](project, **options)
    tracker.start()
    match name:
        case "trackio" if run_id is not None and tracker.run.id != run_id:
            tracker.finish()
            raise RuntimeError("a later run has its name")
        case "comet_ml" if run_id is None and not environment.keys() & COMET_NAMES:
            tracker.writer.set_name(run_name)
        case "clearml" if run_id is not None:
            tracker.task.set_initial_iteration(0)  # otherwise the steps are counted from the last one
        case "aim":
            tracker.writer.name = run_name
    return tracker


def identity(name: str, tracker: GeneralTracker) -> str:
    """Return the id of the run of a tracker, by which `start_tracker` continues it."""
    match name:
        case "mlflow":
            return tracker.active_run.info.run_id
        case "comet_ml":
            return tracker.writer.get_key()
        case "aim":
            return tracker.writer.hash
        case "tensorboard" | "dvclive":
            return name  # the folder
    return tracker.tracker.id


def send_picture(name: str, tracker: GeneralTracker, picture: Path, step: int) -> None:
    """Send the picture of the curves, in the way of the tracker."""
    match name:
        case "tensorboard":
            from PIL import Image

            pixels = np.asarray(Image.open(picture, formats=["PNG"]).convert("RGB"))
            tracker.log_images({"curves": pixels[None]}, step, dataformats="NHWC")
        case "wandb":
            import wandb

            tracker.run.log({"curves": wandb.Image(str(picture))})
        case "trackio":
            import trackio

            tracker.run.log({"curves": trackio.Image(str(picture))})
        case "mlflow":
            tracker.log_artifact(str(picture))
        case "comet_ml":
            tracker.writer.log_image(str(picture), name="curves")
        case "swanlab":
            import swanlab

            tracker.run.log({"curves": swanlab.Image(str(picture))})
        case "clearml":
            tracker.task.get_logger().report_image("curves", "curves", step, local_path=str(picture))
        case "aim":
            import aim

            tracker.writer.track(aim.Image(str(picture)), name="curves", step=step)
        case "dvclive":
            tracker.live.log_image("curves.png", str(picture))

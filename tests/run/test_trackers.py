"""Tests of trackers: continued runs, failures, and what TensorBoard, wandb, MLflow and Trackio really have."""

import importlib.util
import json
import random
import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from helpers import tiny
from PIL import Image

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.config.recipes import build_config
from m2t_accel.run import trackers
from m2t_accel.run.trackers import Trackers


class Server:
    """A server of runs, the switches of its failures, and a client like one of Accelerate's trackers."""

    def __init__(self):
        self.runs = {}
        self.settings = {}
        self.ask = self.away = self.slow = False

    def client(self, project, name, id=None, resume=None, **others):
        def start():
            random.seed(1)
            torch.manual_seed(1)
            if self.ask:
                input("API key: ")
            if self.away:
                raise ConnectionError("no route")
            if id is not None and id not in self.runs:
                raise ValueError(f"no run {id}")
            tracker.run.id = id or f"{project}-{name}-{len(self.runs)}"
            self.runs.setdefault(tracker.run.id, [])

        def log(values, step, commit):
            if self.away:
                raise ConnectionError("no route")
            self.runs[tracker.run.id].append((step, values["loss"]))

        def finish():
            if self.slow:
                threading.Event().wait(5)

        run = SimpleNamespace(id=None)
        tracker = SimpleNamespace(run=run, tracker=run, start=start, log=log, finish=finish)
        tracker.store_init_configuration = self.settings.update
        return tracker


@pytest.fixture
def server(monkeypatch):
    for name in ("WANDB_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    server = Server()
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", server.client)
    return server


def rows(*steps, loss=1.0):
    return [{"step": step, "epoch": step / 5, "loss": loss} for step in steps]


def begin(folder, reported=-1, resumes=False, name="wandb"):
    """Start the tracker of a run. Return the trackers and the printed lines."""
    folder.mkdir(exist_ok=True)  # a run has locked it before
    config = build_config(tiny(folder, report_to=name))
    started = Trackers(config, config.trackers)
    return started, started.start(reported, resumes)


def report(folder, *steps, **others):
    """Start, send the lines of these steps, and close. Return all printed lines."""
    started, lines = begin(folder, **others)
    started.add(rows(*steps))
    return lines + started.close()


def test_a_run_that_goes_on_repeats_no_step(server, tmp_path):
    assert report(tmp_path / "mine", 0, 1, 2, 3) == ["wandb: run m2t_accel-mine-0 starts"]
    lines = report(tmp_path / "mine", 0, 1, 2, 3, 4, reported=1, resumes=True)
    assert lines == ["wandb: run m2t_accel-mine-0 continues after step 3"]
    assert server.runs == {"m2t_accel-mine-0": [(step, 1.0) for step in range(5)]}
    assert server.settings["crop_scale"] == "0.5 1.2"
    assert server.settings["epochs"] == 2


def test_a_group_of_figures_is_sent_as_scalars(server, tmp_path, monkeypatch):
    sent = []
    client = server.client

    def client_that_records(*arguments, **options):
        tracker = client(*arguments, **options)
        tracker.log = lambda values, step, commit: sent.append(values)
        return tracker

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", client_that_records)
    started, _ = begin(tmp_path / "run")
    layers = {"stem": 0.5, "projector.1": 0.25}
    started.add([{"step": 1, "loss": 2.0, "layers": layers, "alarms": ["step 1: a text is no scalar"]}])
    started.close()
    assert sent == [{"loss": 2.0, "layers/stem": 0.5, "layers/projector.1": 0.25}]


def test_a_tracker_changes_no_random_numbers(server, tmp_path):
    random.seed(2)
    torch.manual_seed(2)
    before = random.getstate(), torch.get_rng_state().tolist()
    report(tmp_path, 0)
    assert (random.getstate(), torch.get_rng_state().tolist()) == before


def test_the_names_of_the_users_environment_come_first(server, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "first")
    assert report(tmp_path / "mine", 0) == ["wandb: run theirs-first-0 starts"]


def test_a_run_that_cannot_continue_starts_another_with_all_lines(server, tmp_path):
    report(tmp_path, 0, 1)
    server.runs.clear()
    (line,) = report(tmp_path, 0, 1, 2, reported=1, resumes=True)
    assert "-0 starts, because run m2t_accel-" in line
    assert "cannot continue (ValueError: no run" in line
    assert [step for (run,) in [server.runs.values()] for step, _ in run] == [0, 1, 2]


def test_lines_that_fail_are_sent_later_and_cause_one_warning(server, tmp_path):
    started, _ = begin(tmp_path)
    started.add(rows(0))
    started.trackers[0].submit(lambda: setattr(server, "away", True))
    started.add(rows(1, 2))
    started.trackers[0].submit(lambda: setattr(server, "away", False))
    started.add(rows(3))
    lines = started.close()
    assert len(lines) == 1
    assert lines[0].startswith("warning: --report_to wandb fails (ConnectionError: no route); the run continues")
    assert [step for (run,) in [server.runs.values()] for step, _ in run] == [0, 1, 2, 3]


def test_a_server_that_stays_away_is_named_and_the_next_start_sends_the_lines(server, tmp_path):
    started, _ = begin(tmp_path)
    server.away = True
    started.add(rows(0, 1))
    assert "may lack the lines after step -1" in started.close()[-1]
    server.away = False
    report(tmp_path, 0, 1, 2, resumes=True)
    assert [step for (run,) in [server.runs.values()] for step, _ in run] == [0, 1, 2]


def test_a_tracker_that_hangs_does_not_hold_the_run(server, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "FINISH_TIMEOUT", 0.05)
    server.slow = True
    assert "may lack the lines" in report(tmp_path, 0)[-1]


@pytest.mark.parametrize(("switch", "reason"), [("away", "ConnectionError: no route"), ("ask", "EOFError")])
def test_a_tracker_that_does_not_start_ends_a_new_run_and_no_other(server, tmp_path, switch, reason):
    setattr(server, switch, True)
    message = rf"--report_to wandb: does not start \({reason}.*\): type `wandb login`, or put WANDB_MODE=offline"
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        begin(tmp_path)
    (line,) = report(tmp_path, 0, resumes=True)
    assert line.startswith("warning: --report_to wandb: does not start")
    assert line.endswith("The run continues without it")


def test_tensorboard_has_each_step_once_after_a_resume_from_an_earlier_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, 0, 1, 2, 3, 4, name="tensorboard")
    started, lines = begin(tmp_path, reported=2, resumes=True, name="tensorboard")
    assert lines == ["tensorboard: run tensorboard continues after step 2"]
    started.add(rows(3, 4, 5, loss=2.0))
    Image.new("RGB", (4, 3)).save(tmp_path / "curves.png")
    started.add_curves(tmp_path / "curves.png")
    assert started.close() == []
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        *((step, 1.0) for step in (0, 1, 2)),
        *((step, 2.0) for step in (3, 4, 5)),
    ]
    assert [(image.step, image.width, image.height) for image in events.Images("curves")] == [(5, 4, 3)]
    (settings,) = tmp_path.glob("tensorboard/*/hparams.yml")
    assert "encoder: resnet10-quarter" in settings.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_stopped_run_and_its_resume_are_one_run_of_the_tracker(run_script, tmp_path, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "MLFLOW_ARTIFACT_URI": str(tmp_path)}
    answer = run_script("tests/tracked_run.py", name, tmp_path / "mine", environment=environment)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    assert found == {"runs": 1, "steps": list(range(11)), "batch_size": "64", "curves": True}

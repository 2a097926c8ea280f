"""Train with a tracker, stop, resume, and print what the tracker has: `python tests/tracked_run.py TRACKER FOLDER`."""

import json
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers import tiny

from m2t_accel.config.fields import Interrupted
from m2t_accel.config.recipes import build_config
from m2t_accel.pretrain import pretrain
from m2t_accel.step import TrainingStep


def train(name: str, folder: Path) -> None:
    """Train ten steps in two parts: a signal stops the run in its fourth step."""
    config = build_config(tiny(folder, report_to=name))
    begin, steps = TrainingStep.begin, []

    def begin_and_signal(self: TrainingStep, now: object, **options: object) -> None:
        steps.append(now)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        begin(self, now, **options)

    TrainingStep.begin = begin_and_signal
    try:
        pretrain(config)
    except Interrupted:
        pretrain(config)


def tensorboard(folder: Path) -> tuple[int, list[int], object, bool]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (settings,) = folder.glob("tensorboard/*/hparams.yml")
    (size,) = (line.split()[1] for line in settings.read_text().splitlines() if line.startswith("batch_size"))
    return 1, [event.step for event in events.Scalars("epoch")], size, events.Tags()["images"] == ["curves"]


def wandb(folder: Path) -> tuple[int, list[int], object, bool]:
    from wandb.proto.wandb_internal_pb2 import Record

    ids, steps, settings, images = set(), [], {}, False
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in records(path.read_bytes()):
            record = Record.FromString(content)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
            names = {item.key or item.nested_key[0] for item in record.history.item}
            steps += [record.history.step.num] if "epoch" in names else []
            images |= "curves" in names
    return len(ids), steps, settings["batch_size"], images


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in the format of LevelDB: blocks of 32 KiB, parts of 7 bytes of header and content."""
    position, content = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield content
            content = b""


def mlflow(folder: Path) -> tuple[int, list[int], object, bool]:
    from mlflow import MlflowClient

    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("m2t_accel").experiment_id])
    steps = [metric.step for metric in client.get_metric_history(runs[0].info.run_id, "epoch")]
    names = [file.path for file in client.list_artifacts(runs[0].info.run_id)]
    return len(runs), steps, runs[0].data.params["batch_size"], names == ["curves.png"]


def trackio(folder: Path) -> tuple[int, list[int], object, bool]:
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "m2t_accel.db") as database:
        lines = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
        ((settings,),) = database.execute("SELECT config FROM configs").fetchall()
    steps = [step for _, step, text in lines if "epoch" in json.loads(text)]
    images = any("curves" in json.loads(text) for _, _, text in lines)
    return len({run for run, _, _ in lines}), steps, json.loads(settings)["batch_size"], images


name, folder = sys.argv[1], Path(sys.argv[2])
os.chdir(folder.parent)  # MLflow writes the curves into the current folder
train(name, folder)
number, steps, batch_size, curves = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}[
    name
](folder)
print(json.dumps({"runs": number, "steps": steps, "batch_size": str(batch_size), "curves": curves}), flush=True)

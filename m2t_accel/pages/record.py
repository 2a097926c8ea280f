"""Read the folder of a run, whatever its state or version. This module imports no torch."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.files import JsonLines

FINISHED, RUNNING, STOPPED = "finished", "running", "stopped"
PICTURES = "pictures"  # folder of views.json and neighbours.json in the run's folder


@dataclass(frozen=True)
class RunRecord:
    """The files of a run. What the run has not written, or cannot be read, is empty."""

    name: str
    status: str  # FINISHED, RUNNING or STOPPED
    settings: Mapping[str, object]
    rows: list[dict[str, object]]  # lines of metrics.jsonl that have a step and an epoch
    hardware: str = ""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)  # training.json of a finished run
    results: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # result.json by name of its folder
    bad_images: list[dict[str, object]] = field(default_factory=list)
    views: list[dict[str, object]] = field(default_factory=list)
    neighbours: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Return the epochs and the values of a figure, without lines that lack it or hold no finite number."""
        points = [(row["epoch"], row[name]) for row in self.rows if is_number(row.get(name))]
        return [epoch for epoch, _ in points], [value for _, value in points]

    def last(self, name: str) -> float | None:
        """Return the newest value of a figure; None if there is none."""
        return next((row[name] for row in reversed(self.rows) if is_number(row.get(name))), None)

    @property
    def step(self) -> int:
        """Return the step of the newest line of metrics."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def total_steps(self) -> int | None:
        """Return the steps of the whole run; None if they are not known yet."""
        if is_number(self.settings.get("max_steps")):
            return int(self.settings["max_steps"])
        epochs = self.settings.get("epochs")
        if self.rows and self.rows[-1]["epoch"] > 0 and is_number(epochs):
            return round(epochs * self.rows[-1]["step"] / self.rows[-1]["epoch"])
        return None

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds that the remaining steps take at the speed of the whole run; None if not known."""
        first, total = next((row for row in self.rows if is_number(row.get("seconds"))), None), self.total_steps
        if first is None or total is None or not is_number(self.rows[-1].get("seconds")) or self.step <= first["step"]:
            return None
        speed = (self.rows[-1]["seconds"] - first["seconds"]) / (self.step - first["step"])
        return max(0.0, speed * (total - self.step))


def is_number(value: object) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(folder: Path, status: str | None = None) -> RunRecord:
    """Read the folder of a run.

    Args:
        status: the state of the run. Default: finished if there is a training.json, running if a process has locked
            the folder, else stopped. The process that trains must give it: the check would release its own lock.

    Raises:
        ConfigurationError: the folder is not that of a run.
    """
    training = read_json(folder / "training.json")
    header, settings = read_settings(folder / "config.yaml")
    settings = settings or training.get("config")
    # The folder of an evaluation has a config.yaml, too, but not these settings.
    if not isinstance(settings, dict) or not {"recipe", "weight_momentum"} <= settings.keys():
        raise ConfigurationError(
            f"{folder} is not the folder of a run: it has no config.yaml of scripts/pretrain.py; give the --output_dir "
            "of a run, such as runs/digits"
        )
    if status is None:
        status = FINISHED if training else RUNNING if is_locked(folder / ".lock") else STOPPED
    rows = [
        row
        for row in JsonLines(folder / "metrics.jsonl").read()
        if isinstance(row, dict) and is_number(row.get("step")) and is_number(row.get("epoch"))
    ]
    results = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/result.json"))}
    neighbours, views = (read_json(folder / PICTURES / f"{name}.json") for name in ("neighbours", "views"))
    return RunRecord(
        name=folder.resolve().name,
        status=status,
        settings=settings,
        rows=rows,
        training=training,
        **header | {name: training[name] for name in header if training.get(name)},
        results={name: result for name, result in results.items() if isinstance(result.get("figures"), dict)},
        bad_images=[row for row in JsonLines(folder / "bad_images.jsonl").read() if isinstance(row, dict)],
        views=views.get("pairs", []),
        neighbours=neighbours,
    )


def read_json(path: Path) -> dict[str, object]:
    """Return the content of a file that holds a JSON object; empty if it holds none or cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def read_settings(path: Path) -> tuple[dict[str, object], dict[str, object] | None]:
    """Return versions, hardware and command from the comments of a run's config.yaml, and its settings."""
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        text, settings = "", None
    found = re.match(r"# m2t_accel (.*?), torch (.*?), on (.*)\n# (.*)\n", text)
    ours, torch, hardware, command = found.groups() if found else ("", "", "", "")
    versions = {"m2t_accel": ours, "torch": torch} if found else {}
    header = {"versions": versions, "hardware": hardware, "command": command}
    return header, settings if isinstance(settings, dict) else None


def is_locked(path: Path) -> bool:
    """Return whether another process has locked the lock file of a run.

    Never call it in the process that trains: on POSIX, closing the file releases the lock of the whole process.
    """
    import fcntl  # late: Windows has none, and the scripts say so in one line

    try:
        with path.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return path.exists()
    except OSError:
        pass  # no lock file, or a disk without locks
    return False

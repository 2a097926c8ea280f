"""Collect the results of a study in one small file, which stays when the folders of its runs are gone."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from m2t_accel.config.data import ImageSettings
from m2t_accel.config.fields import ConfigurationError, command_without_paths, plain_text
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.files import write_text
from m2t_accel.pages.record import RunRecord, read_json, read_run
from m2t_accel.run.output_dir import missing_files, read_training
from m2t_accel.study.plan import Study, StudyRun, plain_settings

Results = dict[str, object]  # the content of results.json
FIGURES = ("knn_top1", "linear_top1")


def is_trained(run: StudyRun) -> bool:
    """Return whether the folder of a run holds the complete run."""
    training = read_training(run.folder)
    return training is not None and set(missing_files(run.folder, training)) <= {"metrics.jsonl"}


def probe_result(run: StudyRun, random_weights: bool = False) -> dict[str, object] | None:
    """Return the result of a run's linear probe; None if the folder has none with the settings of the study."""
    config = run.probe_config(random_weights)
    result = read_json(Path(config.output_dir) / "result.json")
    protocol = {**(result.get("protocol") or {}), "seed": result.get("seed")}
    asked = {name: value for name, value in plain_settings(config).items() if name in protocol and value is not None}
    return result if result and all(protocol[name] == value for name, value in asked.items()) else None


def read_results(file: Path, study: Study) -> Results:
    """Read the results of a study that were collected before, maybe on another machine.

    Raises:
        ConfigurationError: they cannot be read, or belong to runs that the study does not have.
    """
    if not file.exists():
        return {"runs": [], "random_weights": []}
    stored, advice = read_json(file), "move it to another folder, or give the settings that it was made with"
    runs = {run.name: run for run in study.runs}
    try:
        if None not in (study.linear_probe, stored["linear_probe"]) and study.linear_probe != stored["linear_probe"]:
            raise ConfigurationError(f"{file} holds the results of another linear_probe ({stored['linear_probe']})")
        for result in stored["runs"]:
            if result["name"] not in runs:
                raise ConfigurationError(f"{file} holds a run that the grid does not have ({result['name']})")
            changed = changes(runs[result["name"]], {**stored["settings"], **result["settings"]})
            if changed:
                raise ConfigurationError(f"{file} holds runs with other settings ({'; '.join(changed)})")
        stored["random_weights"] = list(stored["random_weights"])
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}: {advice}") from None
    except (KeyError, TypeError, AttributeError):
        raise ConfigurationError(f"{file} is not a file of results of this script: {advice}") from None
    return stored


def changes(run: StudyRun, stored: Mapping[str, object]) -> list[str]:
    """Return the settings of a run that differ from the stored ones, as text."""
    defaults = {item.name: item.default for item in dataclasses.fields(PretrainConfig)}  # of settings that are newer
    return [
        f"{name} was {plain_text(stored.get(name, defaults[name]))}, now {plain_text(value)}"
        for name, value in run.settings.items()
        if plain_text(stored.get(name, defaults[name])) != plain_text(value)
    ]


def is_complete(result: Mapping[str, object] | None, study: Study) -> bool:
    """Return whether a result of a run has everything that the study measures."""
    return result is not None and (study.linear_probe is None or result["linear_top1"] is not None)


def collect(study: Study, stored: Results) -> Results:
    """Return the results of the complete runs in their folders, and the stored results of the others."""
    kept = {result["name"]: result for result in stored["runs"]}
    first = study.runs[0].settings
    shared = [name for name in first if all(run.settings[name] == first[name] for run in study.runs)]
    runs = []
    for run in study.runs:
        found = run_result(run) if is_trained(run) else None
        result = found if is_complete(found, study) else kept.get(run.name) or found
        if result is not None:
            others = {name: value for name, value in run.settings.items() if name not in shared}
            runs.append({**result, "settings": {**run.varied, **others}})
    results: Results = {"title": study.title, "settings": {name: first[name] for name in shared}, "grid": study.grid}
    results |= {"linear_probe": study.linear_probe, "cells": [], "random_weights": [], "runs": runs}
    by_name = {run.name: run for run in study.runs}
    for cell in distinct([run.cell for run in study.runs]):
        of_cell = [result for result in runs if by_name[result["name"]].cell == cell]
        results["cells"].append({"settings": cell, **{figure: summary(of_cell, figure) for figure in FIGURES}})
    for settings in distinct([run.of_random_weights for run in study.runs]):
        group = [run for run in study.runs if run.of_random_weights == settings]
        result = random_weights_result(group, {result["name"]: result for result in runs})
        before = [each for each in stored["random_weights"] if each["settings"] == settings]
        if before and result["linear_top1"] is None:
            result = {**before[0], **{name: value for name, value in result.items() if value is not None}}
        results["random_weights"].append({"settings": settings, **result})
    return results


def distinct(items: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return the items, each once, in their order."""
    return [item for i, item in enumerate(items) if item not in items[:i]]


def run_result(run: StudyRun) -> dict[str, object]:
    """Return the result of a complete run: its figures, its curves, and everything they depend on."""
    record = read_run(run.folder)
    epochs, accuracies = record.series("knn_top1")
    probe = (probe_result(run) if run.probe is not None else None) or {}
    training = record.training
    return {
        "name": run.name,
        "settings": {},  # see `collect`
        "knn_top1": rounded(accuracies[-1] if accuracies else None),
        "linear_top1": rounded(probe.get("figures", {}).get("top1")),
        "curve": {"epoch": [rounded(epoch) for epoch in epochs], "knn_top1": [rounded(share) for share in accuracies]},
        "loss": epoch_means(record, "loss"),
        "seconds": training.get("seconds"),
        "linear_probe_seconds": probe.get("seconds"),
        **{name: training.get(name) for name in ("hardware", "versions")},
        "command": command_of(training),
        "linear_probe_command": command_of(probe),
        **{name: probe.get(name) for name in ("weights", "data")},
    }


def random_weights_result(group: Sequence[StudyRun], results: Mapping[str, Mapping]) -> dict[str, object]:
    """Return the figures of the random weights that these runs share: kNN before their first step, and the probe."""
    curves = [results[run.name]["curve"] for run in group if run.name in results and run.config.init_from is None]
    starts = [curve["knn_top1"][0] for curve in curves if curve["epoch"][:1] == [0]]
    probes = [probe_result(run, random_weights=True) for run in group if run.probe is not None]
    probe = next((each for each in probes if each is not None), {})
    return {
        "knn_top1": starts[0] if starts else None,
        "linear_top1": rounded(probe.get("figures", {}).get("top1")),
        "linear_probe_seconds": probe.get("seconds"),
        "linear_probe_command": command_of(probe),
        "weights": probe.get("weights"),
    }


def command_of(recorded: Mapping[str, object]) -> str | None:
    """Return the command that a file of a run records, without the paths of this machine: results are shared."""
    return command_without_paths(recorded["command"]) if recorded.get("command") else None


def epoch_means(record: RunRecord, figure: str) -> list[float]:
    """Return the mean of a figure in each epoch."""
    by_epoch: dict[int, list[float]] = {}
    for epoch, value in zip(*record.series(figure), strict=True):
        by_epoch.setdefault(math.ceil(epoch), []).append(value)
    return [rounded(statistics.mean(by_epoch[epoch])) for epoch in sorted(by_epoch)]


def different_images(results: Results) -> str | None:
    """Return a warning if the linear probes have read different images, though the study asks for the same ones."""
    if results["grid"].keys() & {item.name for item in dataclasses.fields(ImageSettings)}:
        return None
    found = distinct([result["data"] for result in results["runs"] if result["data"] is not None])
    if len(found) < 2:
        return None
    names = [next(result["name"] for result in results["runs"] if result["data"] == data) for data in found]
    return f"Warning: the images of {' and '.join(names)} differ, so their figures cannot be compared."


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def summary(results: Sequence[Mapping[str, object]], figure: str) -> dict[str, object]:
    """Return mean, sample standard deviation and range of a figure over the seeds that have it."""
    values = [result[figure] for result in results if result[figure] is not None]
    if not values:
        return {"seeds": 0}
    deviation = rounded(statistics.stdev(values)) if len(values) > 1 else None
    found = {"mean": rounded(statistics.mean(values)), "deviation": deviation}
    return found | {"smallest": min(values), "largest": max(values), "seeds": len(values)}


def write_results(results: Results, file: Path) -> None:
    """Write the results as JSON, with each list of numbers in one line.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps(results, indent=1, ensure_ascii=False)
    # A line break in a string is escaped, so the others are those of the indentation.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r",\n *", ", ", found[0]), text)
    write_text(file, re.sub(r"(?<=\[)\n *(?=[^\[{ ])|(?<=[^\]} ])\n *(?=\])", "", text) + "\n")

"""Run scripts/pretrain.py and record the samples of each step: `… tests/pretrain_recorded.py FOLDER [--float64] …`.

Each process appends lines [step, virtual device, samples] to its own file in FOLDER, before the weights change.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch

from m2t_accel.run.guard import Guard

folder = Path(sys.argv.pop(1))
if sys.argv[1] == "--float64":
    sys.argv.pop(1)
    torch.set_default_dtype(torch.float64)
folder.mkdir(parents=True, exist_ok=True)
record = os.open(folder / f"{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
agree = Guard.agree


def record_and_agree(self: Guard, step, now, results, samples, lost):
    for turn, numbers in enumerate(samples):
        device = self.accelerator.process_index + turn * self.accelerator.num_processes
        os.write(record, (json.dumps([step, device, numbers.tolist()]) + "\n").encode())
    return agree(self, step, now, results, samples, lost)


Guard.agree = record_and_agree
script = str(Path(__file__).parents[1] / "scripts" / "pretrain.py")
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")

"""scripts/pretrain.py, with a record of the samples of each step: `… tests/pretrain_recorded.py FOLDER [--float64] …`.

Each process appends lines [step, virtual device, samples] to a file of its own in FOLDER, before the step is taken.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch

from m2t_accel.pretrain import Run

folder = Path(sys.argv.pop(1))
if sys.argv[1] == "--float64":
    sys.argv.pop(1)
    torch.set_default_dtype(torch.float64)
folder.mkdir(parents=True, exist_ok=True)
record = os.open(folder / f"{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
forward_and_backward = Run.forward_and_backward
turns: dict[int, int] = {}


def recorded(self: Run, batch):
    turn = turns.get(self.step, 0)
    turns[self.step] = turn + 1
    device = self.accelerator.process_index + turn * self.accelerator.num_processes
    os.write(record, (json.dumps([self.step, device, batch.samples.tolist()]) + "\n").encode())
    return forward_and_backward(self, batch)


Run.forward_and_backward = recorded
script = str(Path(__file__).parents[1] / "scripts" / "pretrain.py")
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")

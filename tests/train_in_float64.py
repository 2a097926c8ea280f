"""Train in float64 and save the teacher: `accelerate launch … tests/train_in_float64.py CONFIG.json …`.

One launch trains all configurations one after the other, because a start takes seconds.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from m2t_accel.config.recipes import build_config
from m2t_accel.distributed.processes import destroy_process_group
from m2t_accel.pretrain import pretrain

torch.set_default_dtype(torch.float64)
for path in sys.argv[1:]:
    config = build_config(json.loads(Path(path).read_text()))
    teacher = pretrain(config)
    state = PartialState()
    file = Path(config.output_dir) / f"teacher-{state.process_index}-of-{state.num_processes}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in teacher.state_dict().items()}, file)
    state.wait_for_everyone()
destroy_process_group()

"""Train on two processes in float64 and save the teachers: `python tests/train_in_float64.py CONFIG.json …`.

All configurations are trained one after the other. The second process is a fork, because a launch imports torch three
times, which takes longer than the training.
"""

import json
import os
import socket
import sys
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from m2t_accel.config.recipes import build_config
from m2t_accel.distributed.processes import destroy_process_group
from m2t_accel.pretrain import pretrain
from m2t_accel.run import completion

with socket.create_server(("127.0.0.1", 0)) as server:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: a fork beside threads; those of libraries wait
    second = os.fork()
os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), "0" if second else "1")
torch.set_default_dtype(torch.float64)
completion.draw_curves = lambda *arguments, **options: None
for path in sys.argv[1:]:
    config = build_config(json.loads(Path(path).read_text()))
    teacher = pretrain(config)
    state = PartialState()
    file = Path(config.output_dir) / f"teacher-{state.process_index}-of-{state.num_processes}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in teacher.state_dict().items()}, file)
    state.wait_for_everyone()
destroy_process_group()
if second:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))

"""Measure the seconds of an optimizer step of ResNet-50, and the bytes that it sends over the loopback device.

`accelerate launch --config_file accelerate_configs/cpu2.yaml tests/step_time.py`, or with cpu.yaml.
"""

import os
import statistics
import tempfile
import time
from datetime import timedelta

import psutil

from m2t_accel.config.recipes import build_config
from m2t_accel.data.loader import create_loader
from m2t_accel.data.photometry import photometry
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.sources import load_images
from m2t_accel.data.views import TwoViews
from m2t_accel.distributed.interruption import StopSignals
from m2t_accel.distributed.launch import start_accelerator
from m2t_accel.distributed.processes import destroy_process_group
from m2t_accel.momentum_norm import momentum_layers
from m2t_accel.pretrain import Run, create_step
from m2t_accel.run.folder import RunFolder, Start

IMAGES_PER_PROCESS, STEPS = 4, 6

num_processes = int(os.environ.get("WORLD_SIZE", "1"))
with tempfile.TemporaryDirectory() as folder:
    config = build_config(
        {
            "recipe": "8x2080Ti-b256-100ep",
            "dataset": "digits",
            "batch_size": IMAGES_PER_PROCESS * num_processes,
            "device_batch_size": IMAGES_PER_PROCESS,
            "num_workers": 0,
            "evaluate_every": 0,
            "output_dir": folder,
        }
    )
    accelerator = start_accelerator(config, timeout=timedelta(minutes=10))
    data = load_images(config)
    signals = StopSignals()
    training = create_step(config, accelerator)
    run = Run(config, data, RunFolder(folder), accelerator, training, Start(), signals)
    batches = DeviceBatches(data.train, config, num_processes, accelerator.process_index)
    batch = next(iter(create_loader(TwoViews(data.train, config), batches, config)))

    def step() -> None:
        now = config.schedule(0, run.steps_per_epoch)
        training.begin(now)
        views = photometry(batch.crops, batch.photometry, config)
        result = training.forward_backward(*views.chunk(2))
        run.guard.agree(0, now, [result], [batch.samples])
        training.update(now)

    step()
    seconds, sent = [], []
    for _ in range(STEPS):
        accelerator.wait_for_everyone()
        before, start = psutil.net_io_counters(pernic=True)["lo"].bytes_sent, time.perf_counter()
        step()
        accelerator.wait_for_everyone()
        seconds.append(time.perf_counter() - start)
        sent.append(psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before)
    gradients = sum(p.numel() * p.element_size() for p in training.student.parameters())
    statistics_bytes = sum(p.collected.nbytes for p in momentum_layers(training.teacher))
    run.report.bar = None
    run.close()
    run.folder.close()
    accelerator.print(f"median {statistics.median(seconds):.3f} s per step")
    accelerator.print(
        f"{statistics.median(sent) / 1e6:.1f} MB sent by all processes; each has {gradients / 1e6:.1f} MB "
        f"of gradients and {statistics_bytes / 1e6:.2f} MB of statistics"
    )
    destroy_process_group()

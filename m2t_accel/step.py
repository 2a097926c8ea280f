"""One optimizer step of Momentum² Teacher: the method, from two views to the new weights of student and teacher.

Source: arXiv 2101.07525, section 3. Step k of K, counted from 0, with the values that `schedule` gives for k:

1. `begin` sets the learning rate, and the share α of the batch in the teacher's BatchNorm statistics.
2. `forward_backward` adds the gradient of one sub-batch. A step has one or more sub-batches; their gradients and their
   BatchNorm statistics are averaged, so 1 GPU with 8 sub-batches computes the step of 8 GPUs with one each.
3. `update` moves the student by the optimizer, the teacher's statistics by α, and the teacher's weights by m. If
   float16 has overflowed, it moves nothing but the gradient scale, which it lowers.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from m2t_accel.distributed.interruption import HostCopy
from m2t_accel.distributed.processes import order_gradient_buckets
from m2t_accel.health import StepHealth
from m2t_accel.model import Student, Teacher, embedding_std, momentum_teacher_loss
from m2t_accel.optim import set_learning_rate
from m2t_accel.schedules import Schedule


class SubBatchResult(NamedTuple):
    """Loss and spread of one sub-batch, both scalars on the device."""

    loss: Tensor
    loss_on_host: HostCopy
    embedding_std: Tensor  # of the teacher's embeddings of view 2


class TrainingStep:
    """Student, teacher and optimizer on their devices, and the step that trains them.

    Args:
        student: the network to train, in float32, on any device.
        teacher: a `Teacher` made of this student.
        optimizer: an optimizer of the student's parameters.
        accelerator: places the networks, and accumulates gradients over the sub-batches of this process.

    Raises:
        ValueError: the accelerator scales gradients, and the optimizer is fused, which hides skipped steps.
    """

    def __init__(self, student: Student, teacher: Teacher, optimizer: Optimizer, accelerator: Accelerator) -> None:
        if accelerator.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError("a fused optimizer does not report the steps that a gradient scaler skips: fused=None")
        self.accelerator = accelerator
        # Of views in another dtype autocast makes copies, and the originals stay until the end of the backward, too.
        forward_dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self.view_dtype = forward_dtypes.get(accelerator.mixed_precision, next(student.parameters()).dtype)
        student.to(memory_format=torch.channels_last)
        teacher.to(memory_format=torch.channels_last)
        with warnings.catch_warnings():
            # The oldest torch that pyproject.toml allows does not know the new name of `broadcast_buffers`.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.student_forward, self.optimizer = accelerator.prepare(student, optimizer)
        order_gradient_buckets(self.student_forward)
        # The teacher has no gradient, so there is nothing to synchronise.
        self.teacher_forward = accelerator.prepare_model(teacher, evaluation_mode=True)
        # keep_torch_compile=False: otherwise a compiled student loses its DistributedDataParallel, and `no_sync`.
        self.student: Student = accelerator.unwrap_model(self.student_forward, keep_torch_compile=False)
        self.teacher: Teacher = accelerator.unwrap_model(self.teacher_forward, keep_torch_compile=False)
        # DistributedDataParallel has just given process 0's weights to every student.
        self.teacher.follow(self.student, weight_momentum=0.0)
        self.student_forward.train()
        self.teacher_forward.train()
        # An overflow of float16 would stay in the running statistics of the student. Statistics and counts of batches
        # are two lists, because torch copies a list of two dtypes tensor by tensor.
        buffers = list(self.student.buffers()) if accelerator.scaler is not None else []
        statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
        counts = [buffer for buffer in buffers if not buffer.is_floating_point()]
        self.kept = [([buffer.clone() for buffer in each], each) for each in (statistics, counts) if each]
        self.health: StepHealth | None = None  # of the last step, if it was measured

    def begin(self, now: Schedule, measures_health: bool = False) -> None:
        """Set the learning rate and the statistics momentum of this step, and whether its health is measured."""
        self.health = StepHealth(self.teacher) if measures_health else None
        for kept, buffers in self.kept:
            torch._foreach_copy_(kept, buffers)
        set_learning_rate(self.optimizer, now.learning_rate)
        self.teacher.set_statistics_momentum(now.statistics_momentum)

    def forward_backward(self, view_1: Tensor, view_2: Tensor) -> SubBatchResult:
        """Add the gradient of one sub-batch to the student's; views (N, 3, H, W), normalised, of `view_dtype`.

        The last sub-batch of a step synchronises the gradients over the processes.
        """
        with self.accelerator.accumulate(self.student_forward):
            q1, q2 = self.student_forward(view_1, view_2)
            with torch.no_grad():
                k1, k2 = self.teacher_forward(view_1, view_2)
            # The views cross here: the student's prediction of a view meets the teacher's target of the other view.
            loss = momentum_teacher_loss(predictions=(q1, q2), targets=(k2, k1))
            self.teacher.collect_statistics()
            # Copied before the backward, so that reading the loss does not wait for the end of the backward.
            loss_on_host = HostCopy(loss)
            self.accelerator.backward(loss)
        if self.health is not None:
            self.health.add_sub_batch(view_1, view_2, k2)
        return SubBatchResult(loss.detach(), loss_on_host, embedding_std(k2))

    def update(self, now: Schedule) -> bool:
        """Move student, statistics and teacher, after the last sub-batch. A collective call.

        Returns:
            Whether they have moved: not if a gradient overflows float16. The gradients are those of all processes, so
            all skip the same steps.

        Deviation: the published code moves the teacher's weights at the start of the next step, by the same momentum.
        """
        self.optimizer.step()
        if self.optimizer.step_was_skipped:
            self.optimizer.zero_grad()
            self.teacher.discard_statistics()
            for kept, buffers in self.kept:
                torch._foreach_copy_(buffers, kept)
            self.health = None
            return False
        commit = self.teacher.commit_statistics()
        self.teacher.follow(self.student, now.weight_momentum)
        if self.health is not None:
            self.health.measure(self.student, self.teacher, self.optimizer, commit)
        self.optimizer.zero_grad()
        return True

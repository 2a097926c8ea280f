"""Tensors that say they are on a CUDA GPU, on machines without one: torch computes shapes, dtypes, devices and strides.

What they cannot show: values, time, and CUDA's own backward passes (the autograd engine asks for a real device).
"""

import contextlib
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = Path(__file__).parents[1] / "m2t_accel"
STATISTICS = torch.ops.aten.batch_norm_update_stats.default


def fake_statistics(mode, function, input, mean, var, momentum):
    """Shapes of batch_norm_update_stats, for which torch has none; it raises where CUDA would."""
    assert input.device == mean.device == var.device, f"{input.device}, {mean.device}, {var.device}"
    return tuple(input.new_empty(input.shape[1], dtype=mean.dtype) for _ in range(2))


@contextlib.contextmanager
def fake_cuda(mode):
    """Let `device="cuda"` create fake tensors of a FakeTensorMode. Convolutions choose the layouts of cuDNN."""
    known = mock.patch.dict(fake_impls.op_implementations_dict, {STATISTICS: fake_statistics})
    cudnn = mock.patch.object(torch._C, "_select_conv_backend", return_value=torch._C._ConvBackend.Cudnn)
    with known, cudnn, mode:
        yield


def is_supported():
    try:
        with fake_cuda(FakeTensorMode()):
            return torch.zeros(1, device="cuda").device.type == "cuda"
    except Exception:  # private parts of torch, which another version may not have
        return False


def put_on_cuda(module, mode):
    """Replace the tensors of a module by fake ones on a GPU, with the same strides."""

    def fake(tensor):
        if tensor is None:
            return None
        plain = tensor.detach()
        with mode:
            moved = mode.from_tensor(plain).to("cuda")
            return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items()})
    return module


def devices(values):
    return {value.device.type for value in values if isinstance(value, torch.Tensor)}


class Transfers(TorchDispatchMode):
    """Records the lines of the package that copy between main memory and the GPU, and so wait for it.

    What else waits (`.item()`, a branch on a value, a mask as an index) raises in fake tensors.
    """

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten._fused_sgd_:  # has no kernel for fake tensors
            assert devices(tree_leaves((args, kwargs))) == {"cuda"}
            return None
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            sources = devices(args[1:2] if function.overloadpacket is torch.ops.aten.copy_ else args[:1])
            if sources != devices([out]):
                frames = [f for f in traceback.extract_stack() if f.filename.startswith(str(PACKAGE))]
                self.lines.append(f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "outside")
        return out

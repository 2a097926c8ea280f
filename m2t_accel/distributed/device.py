"""The GPU of a process: what it can compute, how torch computes on it, and a lack of memory in one line."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import psutil
import torch

from m2t_accel.config.data import ImageSettings, TrainingSettings
from m2t_accel.config.evaluation import LinearProbeConfig
from m2t_accel.config.fields import ConfigurationError

Result = TypeVar("Result")

GIB = 2**30

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h

# The last wheels of torch with kernels for GPUs older than Turing (compute capability 7.5).
# Source: the tables of architectures in github.com/pytorch/pytorch, RELEASE.md and issue 190385.
OLD_GPU_WHEELS = 'pip install "torch<2.15" torchvision --index-url https://download.pytorch.org/whl/cu126'
OLDEST_CAPABILITY = 50


def check_gpu(index: int, precision: str) -> None:
    """Check that torch has kernels for a GPU, and that the GPU computes in the precision.

    Args:
        index: number of the GPU on this machine.
        precision: no, bf16 or fp16.

    Raises:
        ConfigurationError: torch has no kernels for the GPU, or would emulate bf16; the message says what to type.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the same, in many lines
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"
        kernels = torch.cuda.get_arch_list() if torch.version.cuda is not None else []
    if kernels and not any(runs_on(kernel, 10 * major + minor) for kernel in kernels):
        oldest, newest = (f(int(re.sub(r"\D", "", kernel)) for kernel in kernels) for f in (min, max))
        advice = "no wheel of torch supports it any more; use another GPU, or accelerate_configs/cpu.yaml"
        if 10 * major + minor > newest:
            advice = "type `pip install --upgrade torch torchvision`"
        elif 10 * major + minor >= OLDEST_CAPABILITY:
            advice = f"type `pip uninstall -y torch torchvision && {OLD_GPU_WHEELS}`"
        raise ConfigurationError(
            f"torch {torch.__version__} has no kernels for {name}, only for {oldest / 10} to {newest / 10}: {advice}"
        )
    if precision == "bf16" and torch.version.cuda is not None and major < 8:
        raise ConfigurationError(
            f"--mixed_precision bf16: {name} has no bf16 and would emulate it slowly: type --mixed_precision fp16 "
            "before the name of the script"
        )


def runs_on(kernel: str, capability: int) -> bool:
    """Return whether a GPU of this capability, such as 86, runs kernels of an entry of `torch.cuda.get_arch_list`.

    Machine code (sm_80) runs on GPUs of the same major version and an equal or greater minor version. The compiler of
    the driver translates PTX (compute_80) for every newer GPU.
    """
    kind, _, version = kernel.partition("_")
    built_for = int(re.sub(r"\D", "", version))
    return built_for <= capability and (kind == "compute" or built_for // 10 == capability // 10)


def set_up_computation(deterministic: bool) -> None:
    """Set how torch computes on GPUs; call it before the first use of a GPU.

    Float32 is float32: cuDNN would by default round the inputs of convolutions to TF32, which has 10 bits of mantissa.

    Args:
        deterministic: use the same kernels in each run, and only those that always add in the same order. False: cuDNN
            measures which kernels are the fastest for each shape.
    """
    with warnings.catch_warnings():
        # torch's compiler reads this older name, and raises if only the newer one (cudnn.conv.fp32_precision) is set.
        warnings.filterwarnings("ignore", "Please use the new API settings")
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()


def keep_freed_memory(keep: bool) -> None:
    """Let glibc keep all freed memory for the next tensors, or let it return blocks of 32 MiB and more, as by default.

    Returning costs a page fault for each 4 kB of the next tensor: ResNet-50 with 32 images of 224 pixels then takes 1.6
    times as long on a CPU. With another C library this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0 if keep else 65536)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # glibc raises it to this by itself, but not after a call of mallopt
        mallopt(M_TRIM_THRESHOLD, -1 if keep else 64 * 2**20)


@contextlib.contextmanager
def kernel_search(allowed: bool) -> Iterator[None]:
    """Let cuDNN measure kernels only if `allowed`: for a shape that is used once, the search takes longer."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before and allowed
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def device_errors_in_one_line(function: Callable[..., Result]) -> Callable[..., Result]:
    """Turn a lack of memory in a function whose first argument is a configuration into one line.

    The same for an operator that cannot do --deterministic.

    Raises:
        ConfigurationError: memory is not enough; the message says what to try.
    """

    @functools.wraps(function)
    def wrapped(config: ImageSettings, *arguments: object, **named: object) -> Result:
        try:
            return function(config, *arguments, **named)
        except (RuntimeError, MemoryError) as error:
            message = describe_device_error(error, config)
            if message is None:
                raise
            raise ConfigurationError(message) from error

    return wrapped


def describe_device_error(error: RuntimeError | MemoryError, config: ImageSettings) -> str | None:
    """Return the message for a lack of memory or an operator without a deterministic kernel; None for other errors."""
    text = str(error)
    operator = re.search(r"(\S+) does not have a deterministic implementation", text)
    if operator is not None:
        return f"--deterministic: torch has no deterministic {operator[1]} for this device: leave the flag out"
    on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in text
    if not on_host and not re.search("out of memory|ALLOC_FAILED", text) and not lacks_workspace(text):
        return None
    advice = []
    size, smaller = getattr(config, "device_batch_size", None), smaller_device_batch(config)
    if smaller is not None:
        advice.append(
            f"--device_batch_size {smaller} in another --output_dir (--batch_size stays {config.batch_size}; each "
            f"BatchNorm then sees {smaller} images, so the result differs)"
        )
    if not on_host and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no":
        advice.append("--mixed_precision bf16 (fp16 on GPUs older than Ampere) before the name of the script")
    if on_host:
        advice.append("a smaller --num_workers")
    place = describe_main_memory() if on_host else describe_gpu_memory()
    batch = "" if size is None else f" at --device_batch_size {size}"
    return f"out of memory{batch} on {place}: try {', or '.join([*advice, 'end other programs that use this memory'])}"


def lacks_workspace(text: str) -> bool:
    """Return whether cuDNN found no algorithm for a convolution, on a GPU that is nearly full.

    It says the same of an operation that it does not support, so the text alone does not tell.
    """
    if not torch.cuda.is_available() or not re.search("unable to find an engine|valid cuDNN algorithm", text):
        return False
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # the GPU does not respond after its error
        return False
    return free < total / 20


def smaller_device_batch(config: ImageSettings) -> int | None:
    """Return the next `device_batch_size` to try: at most half, and allowed with this batch and number of processes.

    None if there is none, or if it would not help: a linear probe keeps no activations for a backward.
    """
    if not isinstance(config, TrainingSettings) or isinstance(config, LinearProbeConfig):
        return None
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = range(config.device_batch_size // 2, 1, -1)
    return next((size for size in sizes if config.batch_size % (size * num_processes) == 0), None)


def describe_gpu_memory() -> str:
    """Return the name of this process's GPU, its memory, and who uses it."""
    if not torch.cuda.is_available():
        return "this device"
    name = torch.cuda.get_device_name()
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # the GPU does not respond after its error
        return name
    own = torch.cuda.memory_reserved()
    others = max(0, total - free - own)  # also counts what CUDA itself takes in this process
    return (
        f"{name} ({total / GIB:.1f} GiB: {own / GIB:.1f} taken by tensors of this process, {others / GIB:.1f} by CUDA "
        "and other programs)"
    )


def describe_main_memory() -> str:
    """Return the size of this machine's main memory, and how much is free."""
    memory = psutil.virtual_memory()
    return f"this machine's main memory ({memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} free)"

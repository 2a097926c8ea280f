"""Self-supervised pretraining of image encoders by Momentum² Teacher (arXiv 2101.07525)."""

import importlib
import os
import sys
import types

__version__ = "0.1.0"

# OpenMP reads this when torch is imported. By default, a thread that waits for the others keeps its core busy, and a
# core that other programs also use then slows a step many times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Public names and their modules. They are imported on first use: `import m2t_accel` must not wait for torch.
_PUBLIC = {
    "PretrainConfig": "config.pretrain",
    "build_config": "config.recipes",
    "build_knn": "config.evaluation",
    "build_linear_probe": "config.evaluation",
    "pretrain": "pretrain",
    "load_encoder": "hub.encoders",
    "MomentumBatchNorm": "momentum_norm",
    "convert_batch_norm": "momentum_norm",
    "momentum_layers": "momentum_norm",
    "set_statistics_momentum": "momentum_norm",
    "commit_statistics": "momentum_norm",
    "evaluate_knn": "evaluation.knn",
    "evaluate_linear": "evaluation.linear",
}
__all__ = sorted(_PUBLIC)


class _Package(types.ModuleType):
    """The type of this package: `m2t_accel.pretrain` stays the function after the module of that name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        is_module = name == "pretrain" and isinstance(value, types.ModuleType)
        super().__setattr__(name, value.pretrain if is_module else value)

    def __getattr__(self, name: str) -> object:
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_PUBLIC})


sys.modules[__name__].__class__ = _Package

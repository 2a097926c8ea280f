"""Self-supervised pretraining of image encoders by Momentum² Teacher (arXiv 2101.07525)."""

import importlib
import os
import sys
import types

__version__ = "0.1.0"

# OpenMP reads this when torch is imported. A thread that waits for the others tries so often before it sleeps. The
# default is 300 times as much, and a step then takes many times as long if other programs use the same cores; a thread
# that sleeps at once (OMP_WAIT_POLICY=PASSIVE) makes a step 1.5 times as long on idle cores. See docs/recipes.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

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

"""bigtrain: one YAML file trains a transformer, from a laptop's CPU to a cluster of GPUs.

    import bigtrain

    run = bigtrain.train("my.yaml", {"optimizer.lr": 3e-4}, nproc=2)
    model = bigtrain.load("my-run@1000")

api/README.md describes each public name. `import bigtrain` is cheap: the module of a name, and the libraries that this
module needs (torch, ray, deepspeed), are imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from bigtrain.api.cluster import ClusterRun, submit
    from bigtrain.api.config import read_config
    from bigtrain.api.data import DataSet, open_data
    from bigtrain.api.loop import build
    from bigtrain.api.models import LoadedModel, load
    from bigtrain.api.runs import Run, RunFailedError, train
    from bigtrain.run import RunConfig

__version__ = "0.1.0"

__all__ = [
    "ClusterRun",
    "DataSet",
    "LoadedModel",
    "Run",
    "RunConfig",
    "RunFailedError",
    "build",
    "load",
    "open_data",
    "read_config",
    "submit",
    "train",
]

_FILES: Final = {
    "api.cluster": ("ClusterRun", "submit"),
    "api.config": ("read_config",),
    "api.data": ("DataSet", "open_data"),
    "api.loop": ("build",),
    "api.models": ("LoadedModel", "load"),
    "api.runs": ("Run", "RunFailedError", "train"),
    "run": ("RunConfig",),
}
_HOMES: Final = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

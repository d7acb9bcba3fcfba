"""ovref builds reference collections for training-free open-vocabulary segmentation.

    import ovref
    summary = ovref.build("own_captions", {"corpus.path": "captions.txt", "output": "runs/first"})

Names are imported on first use.
"""

import importlib
from typing import Any

_MODULES = {
    "OwnArrays": "ovref.exchange.own_arrays",
    "build": "ovref_pipelines.api",
    "collection_from_arrays": "ovref.exchange.own_arrays",
    "evaluate": "ovref_pipelines.api",
    "publish": "ovref_pipelines.api",
}
"""Name -> module, not imported yet: `ovref_pipelines` depends on this package."""

__all__ = ["OwnArrays", "build", "collection_from_arrays", "evaluate", "publish"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)

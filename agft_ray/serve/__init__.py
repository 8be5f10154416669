"""Ray Serve: applications to run as they are, and a tuner for your own deployments.

`build_app` is for `serve run` (`import_path: agft_ray.serve:build_app`); `attach_tuner` gives a
replica of any deployment its tuner. Both need Ray and are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agft_ray.serve.application import build_app
    from agft_ray.serve.colocation import TunerLink, attach_tuner

__all__ = ["TunerLink", "attach_tuner", "build_app"]

_HOMES = {"build_app": "application", "attach_tuner": "colocation", "TunerLink": "colocation"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

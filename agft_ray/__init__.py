"""Energy-aware LLM serving on Ray: an SM-clock tuner in every Serve replica.

The control loop is `agft_ray.tuner`; docs/structure.md has a line for every package. Names below
are imported when first used, so `import agft_ray` costs nothing and needs neither Ray nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agft_ray.gpu.config import NvmlGpuConfig, SimulatedGpuConfig, ZeusdGpuConfig
    from agft_ray.gpu.registry import claim_simulated_gpu
    from agft_ray.policy.base import Policy
    from agft_ray.serve import (
        TunerLink,
        attach_tuner,
        build_app,
        build_openai_app,
        build_simulated_app,
    )
    from agft_ray.settings import TunerConfig
    from agft_ray.telemetry.counters import EngineStats
    from agft_ray.types import Context, Decision, Outcome, Window

__version__ = "0.5.0"

__all__ = [
    "Context",
    "Decision",
    "EngineStats",
    "NvmlGpuConfig",
    "Outcome",
    "Policy",
    "SimulatedGpuConfig",
    "TunerConfig",
    "TunerLink",
    "Window",
    "ZeusdGpuConfig",
    "attach_tuner",
    "build_app",
    "build_openai_app",
    "build_simulated_app",
    "claim_simulated_gpu",
]

_HOMES = {
    "Context": "types",
    "Decision": "types",
    "EngineStats": "telemetry.counters",
    "NvmlGpuConfig": "gpu.config",
    "Outcome": "types",
    "Policy": "policy.base",
    "SimulatedGpuConfig": "gpu.config",
    "TunerConfig": "settings",
    "TunerLink": "serve",
    "Window": "types",
    "ZeusdGpuConfig": "gpu.config",
    "attach_tuner": "serve",
    "build_app": "serve",
    "build_openai_app": "serve",
    "build_simulated_app": "serve",
    "claim_simulated_gpu": "gpu.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

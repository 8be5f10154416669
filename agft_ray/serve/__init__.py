"""Ray Serve: applications to run as they are, and a tuner for your own deployments.

For `serve run` (`import_path`): `build_app` is the simulated application; `build_openai_app`,
`build_dp_openai_app` and `build_pd_openai_app` are those of `ray.serve.llm`, with a tuner beside
each replica. `attach_tuner` gives a replica of any deployment its tuner. All need Ray, the second
kind vLLM too; they are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agft_ray.serve.attach import attach_tuner
    from agft_ray.serve.link import TunerLink
    from agft_ray.serve.llm.servers import (
        build_dp_openai_app,
        build_openai_app,
        build_pd_openai_app,
    )
    from agft_ray.serve.simulated.application import build_app, build_simulated_app
    from agft_ray.serve.vllm.statistics import VllmStats

_HOMES = {
    "TunerLink": "link",
    "VllmStats": "vllm.statistics",
    "attach_tuner": "attach",
    "build_app": "simulated.application",
    "build_dp_openai_app": "llm.servers",
    "build_openai_app": "llm.servers",
    "build_pd_openai_app": "llm.servers",
    "build_simulated_app": "simulated.application",
}

__all__ = [
    "TunerLink",
    "VllmStats",
    "attach_tuner",
    "build_app",
    "build_dp_openai_app",
    "build_openai_app",
    "build_pd_openai_app",
    "build_simulated_app",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

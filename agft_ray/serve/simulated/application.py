"""`build_app`: what `serve run config.yaml` builds, from validated arguments."""

# No `from __future__ import annotations` here: Ray Serve recognises a typed builder by the class
# in its annotation, which must not be a string.

from typing import Any

from ray import serve

from agft_ray.config import parse
from agft_ray.serve.simulated.config import AppConfig
from agft_ray.serve.simulated.server import SimulatedLLM


def build_app(args: dict[str, Any]) -> serve.Application:
    """A simulated LLM served over the OpenAI API, each replica with its own tuner.

    `args` has the fields of `AppConfig`. Raises `ConfigError` naming every problem at once.
    """
    config = parse(AppConfig, args, source="args")
    return SimulatedLLM.options(  # type: ignore[attr-defined]
        num_replicas=config.num_replicas, user_config=config.tuner.model_dump()
    ).bind(config)


build_simulated_app = build_app
"""The same, by a name that tells it from `build_openai_app`."""

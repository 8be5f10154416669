"""A tuner beside a Serve replica: started with it, fed by it, never waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray import serve
from ray.serve.context import ReplicaContext

from agft_ray.actors.frequency_tuner import start_tuner
from agft_ray.actors.messages import EngineIdentity, TunerSpec
from agft_ray.config import parse
from agft_ray.errors import (
    ConfigError,
)
from agft_ray.gpu.config import NvmlGpuConfig
from agft_ray.gpu.registry import GpuSpec
from agft_ray.serve.link import TunerLink
from agft_ray.settings import TunerConfig
from agft_ray.types import EngineSample


def attach_tuner(
    stats: Callable[[float], EngineSample],
    *,
    gpu: GpuSpec | NvmlGpuConfig,
    engine_model: str,
    config: TunerConfig | dict[str, Any] | None = None,
    tensor_parallel: int = 1,
    role: str = "mixed",
    quantization: str = "none",
    figures: Callable[[], dict[str, Any]] = dict,
    observe_only: str = "",
    bundles: Sequence[int] | None = None,
) -> TunerLink:
    """Give the Serve replica whose constructor calls this a tuner of its own.

    Args:
        stats: reads the engine's statistics, given the time to stamp them with; called up to ten
            times a second on the replica's event loop, so it must be quick (`EngineStats.sample`).
            Raises `StaleMetricsError`, saying why, while it does not know them.
        gpu: the GPUs to tune: a `NvmlGpuConfig` or `ZeusdGpuConfig` for the NVIDIA GPUs that Ray
            has given the replica (or those it names), or what `claim_simulated_gpu` returned.
        engine_model: what the engine serves; experience is shared between equal names only.
        config: the tuner's settings; a dict is validated. A `user_config` of the deployment takes
            their place from the start, if it is one for tuners.
        tensor_parallel, role, quantization: further marks of the engine in the prior key.
        figures: further facts to show in the fleet's status.
        observe_only: why the tuner may not set clocks whatever its settings say, or "": for
            statistics that are not complete enough to judge a clock by.
        bundles: which of its placement group's bundles are the replica's, the one it runs in
            first; all of them, unless Serve's gang scheduling has replicas share the group.

    Returns at once; the tuner starts in the background. Keep the link for as long as the replica
    lives, call `link.reconfigure(user_config)` from the deployment's `reconfigure`,
    `link.check_health()` from its `check_health` and `await link.close()` from its `__del__`.
    An engine that tells `link.switch` of arrivals and steps may have clocks of its own for prompts,
    further tokens and an empty engine; without, plans keep the clock of prompts.
    Before the engine starts `await link.probed()`, where the replica's GPUs are in a placement
    group, and `await link.cleared()`, so that it does not load at clocks that a dead process left.

    Raises `ConfigError` for invalid settings, and for `mode: control` on a share of a GPU.
    """
    context = serve.get_replica_context()
    if not isinstance(config, TunerConfig):
        config = parse(TunerConfig, config or {}, source="config")
    settings = _user_config(context) or config

    def start(own: GpuSpec, elsewhere: tuple[tuple[str, GpuSpec], ...], problem: str = "") -> Any:
        return start_tuner(
            TunerSpec(
                application=context.app_name,
                deployment=context.deployment,
                replica=context.replica_id.unique_id,
                gpu=own,
                engine=EngineIdentity(engine_model, tensor_parallel, role, quantization),
                elsewhere=elsewhere,
                problem=problem,
            )
        )

    return TunerLink(gpu, start, settings, stats, figures, observe_only, bundles)


def _user_config(context: ReplicaContext) -> TunerConfig | None:
    """What Serve will call `reconfigure` with once the replica has started, which may be minutes
    from now; None if there is nothing, or it is not for a tuner (or wrong: `reconfigure` says so).
    """
    deployment_config = getattr(context, "_deployment_config", None)  # no public way
    user_config = getattr(deployment_config, "user_config", None)
    if user_config is None:
        return None
    try:
        return parse(TunerConfig, user_config, source="user_config")
    except ConfigError:
        return None

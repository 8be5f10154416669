"""A tuner beside a Serve replica: started with it, fed by it, never waited for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.exceptions import RayError

from agft_ray.actors.frequency_tuner import (
    EngineIdentity,
    EnginePush,
    TunerReply,
    TunerSpec,
    start_tuner,
)
from agft_ray.config import parse
from agft_ray.errors import ConfigError
from agft_ray.gpu.registry import GpuSpec, open_gpu
from agft_ray.settings import PUSH_INTERVAL_S, TunerConfig, check_pushes
from agft_ray.types import EngineSample

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
RETRY_S = 1.0


class TunerLink:
    """A replica's end of its tuner.

    Serving does not depend on it: pushes run in a task of their own, at most one under way, and
    whatever fails in the tuner is logged here and goes no further. The settings wanted are held
    here and handed over until the tuner has them, again if it was restarted.
    """

    def __init__(
        self,
        spec: TunerSpec,
        stats: Callable[[float], EngineSample],
        figures: Callable[[], dict[str, Any]],
    ) -> None:
        gpu, self.clock = open_gpu(spec.gpu)
        self.replica = spec.replica
        self.role = "tuned"
        """'tuned' or 'holdout', as last heard from the tuner."""
        self._supported_sm_clocks_mhz = gpu.arms
        self._stats, self._figures = stats, figures
        self._config, self._config_version = spec.config, 0
        self._confirmed_version = 0
        self._check(spec.config)
        self._wake = asyncio.Event()
        self._tuner = start_tuner(spec)
        self._task = asyncio.get_running_loop().create_task(self._push_forever())

    def wake(self) -> None:
        """Push at once: the engine has just got work."""
        self._wake.set()

    def reconfigure(self, user_config: object) -> None:
        """Check a `user_config` and have the tuner take it; never waits for the tuner.

        Raises `ConfigError`, and keeps the settings as they are, if anything in it is wrong.
        """
        config = parse(TunerConfig, user_config or {}, source="user_config")
        self._check(config)
        self._config, self._config_version = config, self._config_version + 1
        self._wake.set()

    async def close(self) -> None:
        """Have the clocks reset, waiting for it a little."""
        self._task.cancel()
        try:
            await asyncio.wait_for(self._tuner.release.remote(), CLOSE_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            log.warning("the tuner of replica %s did not confirm: %s", self.replica, error)

    def _check(self, config: TunerConfig) -> None:
        try:
            check_pushes(config, speed=self.clock.speed)
            config.arms(self._supported_sm_clocks_mhz)
        except ValueError as error:
            raise ConfigError("user_config", [str(error)]) from None

    async def _push_forever(self) -> None:
        due_s = time.monotonic()
        while True:
            try:
                await self._push()
            except Exception as error:
                log.warning("the tuner of replica %s is away: %r", self.replica, error)
                await asyncio.sleep(RETRY_S)
            due_s = max(due_s + PUSH_INTERVAL_S, time.monotonic())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), due_s - time.monotonic())
            self._wake.clear()

    async def _push(self) -> None:
        version = self._config_version
        config = self._config if version != self._confirmed_version else None
        push = EnginePush(
            self._stats(self.clock.now_s()), _rank(), self._figures(), config, version
        )
        reply: TunerReply = await self._tuner.observe.remote(push)
        self.role, self._confirmed_version = reply.role, reply.config_version


def attach_tuner(
    stats: Callable[[float], EngineSample],
    *,
    gpu: GpuSpec,
    engine_model: str,
    config: TunerConfig | dict[str, Any] | None = None,
    tensor_parallel: int = 1,
    role: str = "mixed",
    quantisation: str = "none",
    figures: Callable[[], dict[str, Any]] = dict,
) -> TunerLink:
    """Give the Serve replica whose constructor calls this a tuner of its own.

    Args:
        stats: reads the engine's statistics, given the time to stamp them with; called ten times
            a second on the replica's event loop, so it must be quick (see `EngineStats.sample`).
        gpu: the GPU to tune.
        engine_model: what the engine serves; experience is shared between equal names only.
        config: the tuner's settings; a dict is validated.
        tensor_parallel, role, quantisation: further marks of the engine in the prior key.
        figures: further facts to show in the fleet's status.

    Returns at once; the tuner starts in the background. Keep the link for as long as the replica
    lives, call `link.reconfigure(user_config)` from the deployment's `reconfigure` and
    `await link.close()` from its `__del__`.

    Raises `ConfigError` for invalid settings.
    """
    context = serve.get_replica_context()
    if not isinstance(config, TunerConfig):
        config = parse(TunerConfig, config or {}, source="config")
    spec = TunerSpec(
        application=context.app_name,
        deployment=context.deployment,
        replica=context.replica_id.unique_id,
        gpu=gpu,
        engine=EngineIdentity(engine_model, tensor_parallel, role, quantisation),
        config=config,
    )
    return TunerLink(spec, stats, figures)


def _rank() -> int | None:
    # Ranks move when replicas are replaced, so it is read anew each time.
    rank = serve.get_replica_context().rank
    return None if rank is None else int(rank.rank)

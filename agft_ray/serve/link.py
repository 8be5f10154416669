"""A Serve replica's end of its tuner: has it started, feeds it, and never waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError

from agft_ray.actors.messages import EnginePush, TunerReply
from agft_ray.actors.phase_socket import phase_path
from agft_ray.clock import Clock, WallClock
from agft_ray.config import parse
from agft_ray.errors import (
    ConfigError,
    GpuError,
    GpuLostError,
    GpuTransientError,
    StaleMetricsError,
)
from agft_ray.gpu.config import NvmlGpuConfig
from agft_ray.gpu.registry import GpuSpec
from agft_ray.serve.live_switch import LiveSwitch
from agft_ray.serve.placement import NodeGpus, own_gpu_amounts, own_node_id, probe_gpus
from agft_ray.settings import TunerConfig, check_pushes
from agft_ray.types import EngineSample

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
CLEAR_TIMEOUT_S = 10.0
CLEAR_POLL_S = 0.1
NO_GPU = "the replica has no GPU; give it one with num_gpus, or name some in gpu.uuids"
PUSH_RETRY_S = 0.2
"""Pause after a push that failed: a tuner that Ray has restarted waits for its settings, and what
its predecessor has left locked with it, where the guard was killed as well."""
OFF_PUSH_INTERVAL_S = 1.0
"""While the tuner is to do nothing."""
RETRY_S = 1.0
MAX_RETRY_S = 30.0


class TunerLink:
    """A replica's end of its tuner.

    Serving does not depend on it: pushes run in a task of their own, at most one under way, and
    whatever fails in the tuner is logged here and goes no further. The settings wanted are held
    here and handed over until the tuner has them, again if it was restarted.
    """

    def __init__(
        self,
        gpu: GpuSpec | NvmlGpuConfig,
        start: Callable[..., Any],
        config: TunerConfig,
        stats: Callable[[float], EngineSample],
        figures: Callable[[], dict[str, Any]],
        observe_only: str = "",
        bundles: Sequence[int] | None = None,
    ) -> None:
        self.replica = serve.get_replica_context().replica_id.unique_id
        self.role = "tuned"
        """'tuned' or 'holdout', as last heard from the tuner."""
        self.switch = LiveSwitch()
        """To be told of arrivals and steps, for plans of several clocks."""
        self.clock: Clock = gpu.clock if isinstance(gpu, GpuSpec) else WallClock()
        self._gpu, self._start = gpu, start
        self._arms = gpu.known_arms if isinstance(gpu, GpuSpec) else None
        self._stats, self._figures = stats, figures
        self._observe_only, self._bundles = observe_only, bundles
        self._config, self._config_version = config, 0
        self._confirmed_version = -1
        self._is_configured = False
        self._refusal = self._config_error = self._gpu_lost = ""
        self._gpu_has_worked = False
        # Asked once, here: `reconfigure` must not depend on Ray's control service.
        self._amounts = () if isinstance(gpu, GpuSpec) else own_gpu_amounts(bundles)
        self._check(config)
        self._wake = asyncio.Event()
        self._probed = asyncio.Event()
        self._tuner: Any = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def config_error(self) -> str:
        """Why the newest settings are not in force as they were given, or ""."""
        if self._refusal or self._config_error:
            return self._refusal or self._config_error
        return self._observe_only if self._config.mode == "control" else ""

    async def probed(self) -> None:
        """Wait until it is known which GPUs the replica has, or that this cannot be found out.

        To be awaited before an engine takes the GPUs of the replica's placement group: Ray tells
        which they are only while they are free.
        """
        await self._probed.wait()

    async def cleared(self, timeout_s: float = CLEAR_TIMEOUT_S) -> None:
        """Wait until the tuner has reset the clocks, so that an engine loads at default clocks.

        Returns at once where it is not to set those of real GPUs, soon where it finds that it
        cannot (its status then says why), and in any case after `timeout_s`. Never raises.
        """
        sets_clocks = self._config.mode == "control" and not self._observe_only
        if self._tuner is None or isinstance(self._gpu, GpuSpec) or not sets_clocks:
            return
        try:
            async with asyncio.timeout(timeout_s):
                while _is_reset_due(await self._tuner.status.remote()):
                    await asyncio.sleep(CLEAR_POLL_S)
        except Exception as error:
            log.warning("replica %s does not wait for its tuner: %r", self.replica, error)

    def check_health(self) -> None:
        """Raise `GpuLostError` if a GPU that the tuner had opened is lost, and the engine with it.

        To be called from the deployment's `check_health`. Nothing else that happens to a tuner is
        a reason to replace a replica: its clocks are default then, and it serves.
        """
        if self._gpu_lost and self._gpu_has_worked:
            raise GpuLostError(self._gpu_lost)

    def wake(self) -> None:
        """Push at once: the engine has just got work."""
        self._wake.set()

    def reconfigure(self, user_config: object) -> None:
        """Check a `user_config` and have the tuner take it; never waits for the tuner.

        Settings with anything wrong in them are refused whole. The first time, when the replica
        starts, that raises `ConfigError`, and so the deployment fails. Later the replica keeps the
        settings it has and says so in its log and status (`config_error`): Serve would replace it
        if this raised, and a mistake in a tuner's settings must not cost a replica.
        """
        try:
            config = parse(TunerConfig, user_config or {}, source="user_config")
            self._check(config)
        except ConfigError as error:
            if not self._is_configured:
                raise
            self._refusal = str(error)
            log.error("keeping the settings of replica %s: %s", self.replica, error)
        else:
            self._is_configured, self._refusal = True, ""
            self._config, self._config_version = config, self._config_version + 1
            self._wake.set()

    async def close(self) -> None:
        """Have the clocks reset, waiting for it a little."""
        self._task.cancel()
        # Not kept: Ray ends the actor once nobody has a handle.
        tuner, self._tuner = self._tuner, None
        if tuner is None:
            return
        try:
            await asyncio.wait_for(tuner.release.remote(), CLOSE_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            log.warning("the tuner of replica %s did not confirm: %s", self.replica, error)

    def _check(self, config: TunerConfig) -> None:
        """What can be told without asking a GPU; the rest the tuner finds (`config_error`)."""
        try:
            check_pushes(config, speed=self.clock.speed)
            if self._arms is not None:
                config.arms(self._arms)
            if config.mode == "control":
                _refuse_shared_gpus(self._amounts)
        except ValueError as error:
            raise ConfigError("user_config", [str(error)]) from None

    async def _run(self) -> None:
        try:
            await self._start_tuner()
        finally:
            self._probed.set()
        await self._push_forever()

    async def _start_tuner(self) -> None:
        """Have a tuner; whatever keeps us from it is tried again for as long as the replica lives,
        less and less often."""
        retry_s = RETRY_S
        while True:
            try:
                self._tuner = await self._started()
                return
            except Exception as error:
                log.warning("replica %s has no tuner yet: %r", self.replica, error)
            # An engine that waits for the probe is not kept from starting.
            self._probed.set()
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, MAX_RETRY_S)

    async def _started(self) -> Any:
        """A tuner on the GPUs named, or on those that Ray has given the replica; where it is
        certain that they cannot be told, one that says why."""
        gpu, problem = self._gpu, NO_GPU
        if isinstance(gpu, GpuSpec):
            return self._start_on(gpu, ())
        nodes: tuple[NodeGpus, ...] = ()
        try:
            nodes = await self._nodes(gpu)
        except GpuTransientError:
            raise
        except GpuError as error:
            problem = str(error)
        if not nodes:
            log.error("replica %s is not tuned: %s", self.replica, problem)
            return self._start(GpuSpec(gpu, ()), (), problem)
        specs = [(node.node_id, GpuSpec(gpu, node.uuids)) for node in nodes]
        here = [spec for node_id, spec in specs if node_id == own_node_id()]
        own = here[0] if here else GpuSpec(gpu, ())
        return self._start_on(own, tuple(s for s in specs if s[1] is not own))

    def _start_on(self, own: GpuSpec, elsewhere: tuple[tuple[str, GpuSpec], ...]) -> Any:
        self.switch.connect(phase_path(own.lease_directory, self.replica))
        return self._start(own, elsewhere)

    async def _nodes(self, gpu: NvmlGpuConfig) -> tuple[NodeGpus, ...]:
        if gpu.uuids is not None:
            return (NodeGpus(own_node_id(), gpu.uuids, 1.0),)
        return await asyncio.to_thread(probe_gpus, self._bundles)

    async def _push_forever(self) -> None:
        due_s, is_away = time.monotonic(), False
        while True:
            try:
                await self._push()
                is_away = False
            except Exception as error:
                if not is_away:
                    log.warning("the tuner of replica %s is away: %r", self.replica, error)
                is_away = True
                self._confirmed_version = -1  # what comes back is a new one
                await asyncio.sleep(PUSH_RETRY_S)
            due_s = max(due_s + self._push_interval_s(), time.monotonic())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), due_s - time.monotonic())
            self._wake.clear()

    def _push_interval_s(self) -> float:
        if self._config.mode == "off":
            return OFF_PUSH_INTERVAL_S
        return self._config.push_interval_s(self.clock.speed)

    async def _push(self) -> None:
        version = self._config_version
        config = None
        if version != self._confirmed_version:
            config = _within(self._config, self._observe_only)
        figures = {"replica_pid": os.getpid(), "config_error": self.config_error}
        sample: EngineSample | None = None
        try:
            sample = self._stats(self.clock.now_s())
        except StaleMetricsError as error:
            figures["reason"] = str(error)
        push = EnginePush(sample, _rank(), figures | self._figures(), config, version)
        self.switch.repeat()
        reply: TunerReply = await self._tuner.observe.remote(push)
        self.role, self._confirmed_version = reply.role, reply.config_version
        self._config_error, self._gpu_lost = reply.config_error, reply.gpu_lost
        self._gpu_has_worked = self._gpu_has_worked or reply.gpu_works


def _is_reset_due(status: Mapping[str, Any]) -> bool:
    """Whether the tuner has yet to reset the clocks, and has not said that it cannot."""
    return bool(status.get("reset_due", True) and not status["reason"])


def _within(config: TunerConfig, observe_only: str) -> TunerConfig:
    """The settings, without control if there is a reason to observe only."""
    if observe_only and config.mode == "control":
        return config.model_copy(update={"mode": "observe"})
    return config


def _refuse_shared_gpus(amounts: Sequence[float]) -> None:
    """By what Ray has given the replica; who else is on a GPU all the same, the lease tells."""
    for amount in amounts:
        if amount != int(amount):
            raise ValueError(
                f"mode: control needs whole GPUs, and this replica has {amount:g} of one: replicas "
                "that share a GPU share its clocks; use num_gpus: 1, or mode: observe"
            )


def _rank() -> int | None:
    # Ranks move when replicas are replaced, so it is read anew each time.
    rank = serve.get_replica_context().rank
    return None if rank is None else int(rank.rank)

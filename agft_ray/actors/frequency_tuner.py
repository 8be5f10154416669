"""The frequency-tuner actor: the loop in a thread of a process on the replica's own node."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from agft_ray.actors.experience_aggregator import get_aggregator
from agft_ray.actors.metrics_scraper import get_scraper, report_interval_s
from agft_ray.actors.tuner_metrics import TunerMetrics
from agft_ray.errors import AgftError
from agft_ray.gpu.guard import Guard
from agft_ray.gpu.registry import GpuSpec, open_gpu
from agft_ray.policy.reward import REWARD_SCHEMA
from agft_ray.priors.store import ReplicaReport
from agft_ray.settings import TunerConfig
from agft_ray.telemetry.engine_inbox import EngineInbox
from agft_ray.telemetry.features import FEATURE_SCHEMA
from agft_ray.telemetry.ray_metrics import ServeMetrics, to_sample
from agft_ray.tuner import Tuner, WindowRecord
from agft_ray.types import EngineSample, Experience, PriorKey

log = logging.getLogger(__name__)

GOSSIP_INTERVAL_S = 1.0
"""Wall time between reports to the aggregator, and between reads of Ray's metrics."""
GOSSIP_TIMEOUT_S = 5.0
MAX_METRICS_AGE_INTERVALS = 3.0
"""Ray's metrics older than this many report intervals count as missing."""


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """What distinguishes engines whose experience must not be mixed."""

    model: str
    tensor_parallel: int = 1
    role: str = "mixed"
    quantisation: str = "none"


@dataclass(frozen=True, slots=True)
class TunerSpec:
    """All a tuner actor needs; it is handed over again when Ray restarts the actor."""

    application: str
    deployment: str
    replica: str
    gpu: GpuSpec
    engine: EngineIdentity
    config: TunerConfig


@dataclass(frozen=True, slots=True)
class EnginePush:
    """What a replica tells its tuner ten times a second.

    `figures` are further facts for the status page; `config` comes along until the tuner has
    answered with its version.
    """

    sample: EngineSample
    rank: int | None
    figures: dict[str, Any]
    config: TunerConfig | None
    config_version: int


@dataclass(frozen=True, slots=True)
class TunerReply:
    """The replica's role ('tuned' or 'holdout') and the version of the settings in force."""

    role: str
    config_version: int


class FrequencyTuner:
    """Thin Ray shell round `Tuner`.

    A thread of its own drives the loop and is the only one that sets the GPU's clocks; what talks
    to others (the replica, the aggregator, the node's metrics scraper) runs on the actor's event
    loop and cannot delay it. The guard process is started first: whatever ends this process, the
    clocks are reset.
    """

    def __init__(self, spec: TunerSpec) -> None:
        self._spec = spec
        self._guard = Guard.start(spec.gpu.reset_paths)
        gpu, self._clock = open_gpu(spec.gpu)
        self._inbox = EngineInbox()
        max_age_s = MAX_METRICS_AGE_INTERVALS * report_interval_s() * self._clock.speed
        self._serve_metrics = ServeMetrics(max_age_s=max_age_s)
        self._tuner = Tuner(
            spec.config,
            gpu=gpu,
            engine=self._inbox,
            serve=self._serve_metrics,
            clock=self._clock,
            on_record=self._on_record,
        )
        self._metrics = TunerMetrics(spec.application, spec.deployment, spec.replica, gpu.uuid)
        self._rank: int | None = None
        self._figures: dict[str, Any] = {}
        self._windows = 0
        self._loop_cpu_s = 0.0
        self._last: WindowRecord | None = None
        self._learned: tuple[PriorKey, Experience | None] = (self._prior_key(), None)
        """Experience, and the key it belongs to; made together, in the loop's thread."""
        self._policy_status = self._tuner.policy.status()
        self._experience_due = True
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._config_version = 0
        self._scraper: Any = None
        self._aggregator: Any = None
        self._gossip: list[asyncio.Task[None]] = []
        self._released = False
        threading.Thread(target=self._drive, name="tuner-loop", daemon=True).start()

    # -- called by the replica -----------------------------------------------------------------

    async def observe(self, push: EnginePush) -> TunerReply:
        """Take what the replica has to say; answers at once."""
        self._inbox.push(push.sample)
        self._rank, self._figures = push.rank, push.figures
        if push.config is not None:
            self._tuner.reconfigure(push.config)
            self._config_version = push.config_version
            self._wake.set()
        if self._tuner.waits_for_work and not push.sample.is_idle:
            self._wake.set()
        if not self._gossip:
            talks = (self._keep_guard, self._read_ray_metrics, self._report)
            self._gossip = [asyncio.create_task(self._repeat(talk)) for talk in talks]
        return TunerReply(self._role(), self._config_version)

    async def release(self) -> None:
        """Reset the clocks, end the loop and the guard."""
        self._released = True
        self._tuner.stop()
        self._wake.set()
        await asyncio.to_thread(self._ended.wait, GOSSIP_TIMEOUT_S)

    async def status(self) -> dict[str, Any]:
        return self._status()

    # -- the loop's thread, and gossip -------------------------------------------------------------

    def _drive(self) -> None:
        """Resume the loop at the times it asks for, or at once when woken."""
        try:
            for wake_s in self._tuner.run():
                self._loop_cpu_s = time.thread_time()
                delay_s = (wake_s - self._clock.now_s()) / self._clock.speed
                if delay_s > 0:
                    self._wake.wait(delay_s)
                self._wake.clear()
        except AgftError:
            log.exception("the tuner of replica %s has ended", self._spec.replica)
        finally:
            self._ended.set()
            if self._tuner.state == "stopped":
                self._guard.release()

    async def _repeat(self, talk: Callable[[], Awaitable[None]]) -> None:
        """Do something every second, whatever becomes of it, until the replica lets go."""
        while not self._released:
            try:
                await asyncio.wait_for(talk(), GOSSIP_TIMEOUT_S)
            except Exception as error:
                self._scraper = self._aggregator = None
                log.warning("%s: %r", talk.__name__.strip("_"), error)
            await asyncio.sleep(GOSSIP_INTERVAL_S)

    async def _keep_guard(self) -> None:
        """Clocks are not to be set without a guard: replace one that was killed."""
        if not self._guard.is_alive and not self._ended.is_set():
            log.warning("the clock guard is gone, starting another")
            self._guard = await asyncio.to_thread(Guard.start, self._spec.gpu.reset_paths)

    async def _read_ray_metrics(self) -> None:
        self._scraper = self._scraper or get_scraper()
        taken_s, series = await self._scraper.read.remote(self._spec.replica)
        if series is not None:
            t_s = self._clock.now_s() - (time.monotonic() - taken_s) * self._clock.speed
            self._serve_metrics.push(to_sample(series, t_s=t_s, speed=self._clock.speed))

    async def _report(self) -> None:
        spec, config = self._spec, self._tuner.config
        key, experience = self._learned
        report = ReplicaReport(
            replica=spec.replica,
            deployment=f"{spec.application}#{spec.deployment}",
            rank=self._rank,
            key=key,
            experience=experience if config.share_experience else None,
            status=self._status(),
        )
        self._experience_due = True
        self._aggregator = self._aggregator or get_aggregator()
        reply = await self._aggregator.report.remote(report)
        self._tuner.holdout = reply.order < config.holdout_replicas
        if reply.prior is not None and config.share_experience and key == self._prior_key():
            self._tuner.offer_prior(reply.prior)

    def _prior_key(self) -> PriorKey:
        engine, config = self._spec.engine, self._tuner.config
        return PriorKey(
            gpu_model=self._tuner.gpu.model,
            engine_model=engine.model,
            tensor_parallel=engine.tensor_parallel,
            role=engine.role,
            quantisation=engine.quantisation,
            objective=f"{config.objective} ttft<={config.slo.ttft_s} tpot<={config.slo.tpot_s}",
            window_s=config.window_s,
            feature_schema=FEATURE_SCHEMA,
            reward_schema=REWARD_SCHEMA,
            policy=self._tuner.policy.name,
        )

    def _on_record(self, record: WindowRecord) -> None:
        self._windows += 1
        self._last = record
        if self._experience_due:
            policy = self._tuner.policy
            self._learned = self._prior_key(), policy.experience()
            self._policy_status, self._experience_due = policy.status(), False
        self._metrics.export(record, state=self._tuner.state)

    def _role(self) -> str:
        return "holdout" if self._tuner.holdout else "tuned"

    def _status(self) -> dict[str, Any]:
        """Figures for people. Energy and counters are read together, at `t_s`."""
        gpu, tuner, last = self._tuner.gpu.read(), self._tuner, self._last
        serve = self._serve_metrics.window(self._clock.now_s())
        status: dict[str, Any] = {
            "rank": self._rank,
            "role": self._role(),
            "mode": tuner.mode.value,
            "state": tuner.state,
            "policy": tuner.policy.name,
            "policy_status": self._policy_status,
            "tuner_pid": os.getpid(),
            "guard_pid": self._guard.pid,
            "gpu_uuid": tuner.gpu.uuid,
            "gpu_model": tuner.gpu.model,
            "t_s": gpu.t_s,
            "energy_j": gpu.energy_j,
            "energy_t_s": gpu.energy_t_s,
            "power_w": gpu.power_w,
            "sm_clock_mhz": gpu.sm_clock_mhz,
            "locked_sm_clock_mhz": gpu.locked,
            "clock_changes": tuner.clock_changes,
            "windows": self._windows,
            "loop_cpu_s": self._loop_cpu_s,
            "last_reward": last.reward if last else None,
            "last_decision": last.decision.reason if last else None,
            "last_note": last.note if last else "",
            "serve_request_rate_per_s": serve.request_rate_per_s if serve else None,
            "serve_metrics_age_s": serve.age_s if serve else None,
        }
        samples = self._inbox.since(float("-inf"))
        if samples:
            engine = samples[-1]
            status |= {
                "running": engine.running,
                "waiting": engine.waiting,
                "prompt_tokens": engine.prompt_tokens,
                "generation_tokens": engine.generation_tokens,
                "requests": engine.e2e_count,
                "engine_t_s": engine.t_s,
            }
        return status | self._figures


def start_tuner(spec: TunerSpec) -> Any:
    """Start a tuner on this very node; returns its handle without waiting for it.

    The actor is the caller's child: Ray ends it when the caller's process ends.
    """
    node_id = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(FrequencyTuner)
        .options(
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=16,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(spec)
    )

"""The frequency-tuner actor: the loop in a process on the replica's own node."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import ray

from agft_ray.actors.background import background_actor
from agft_ray.actors.experience_aggregator import get_aggregator
from agft_ray.actors.memory import Learned, Memory
from agft_ray.actors.messages import EnginePush, TunerReply, TunerSpec
from agft_ray.actors.metrics_scraper import get_scraper, report_interval_s
from agft_ray.actors.tuner_loop import TunerLoop
from agft_ray.actors.tuner_metrics import TunerMetrics
from agft_ray.actors.tuner_status import with_engine, with_gpu, with_serve, with_tuner
from agft_ray.errors import GpuError
from agft_ray.policy.experience import Experience, Prior, PriorKey
from agft_ray.policy.registry import build_policy
from agft_ray.policy.reward import REWARD_SCHEMA
from agft_ray.priors.store import ReplicaReport
from agft_ray.settings import TunerConfig
from agft_ray.telemetry.features import FEATURE_SCHEMA
from agft_ray.telemetry.inbox import EngineInbox
from agft_ray.telemetry.ray_metrics import ServeMetrics, to_sample
from agft_ray.telemetry.status import TunerState, TunerStatus
from agft_ray.tuner import Tuner, WindowRecord
from agft_ray.types import GpuSample, Mode

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
"""Wall time between reports to the aggregator."""
KEEP_INTERVAL_S = 10.0
"""Wall time between writings of what was learned; what is lost is at most twice as old."""
READS_PER_REPORT = 4
"""How often the node's scraper, which reads Ray's metrics when they are reported, is asked."""
TALK_TIMEOUT_S = 5.0
MAX_METRICS_AGE_INTERVALS = 3.0
"""Ray's metrics older than this many report intervals count as missing."""


class FrequencyTuner:
    """Thin Ray shell round `Tuner`.

    A thread of its own (see `TunerLoop`) opens the GPU and drives the loop, and is the only one
    that sets clocks; what talks to others (the replica, the aggregator, the node's metrics scraper)
    runs on the actor's event loop and cannot delay it. The clocks are set under a lease and watched
    by a guard process (see `LeasedGpu`): whatever ends or stops this process, they are reset.
    """

    def __init__(self, spec: TunerSpec) -> None:
        self._spec = spec
        self._inbox = EngineInbox()
        self._clock = spec.gpu.clock
        max_age_s = MAX_METRICS_AGE_INTERVALS * report_interval_s() * self._clock.speed
        self._serve_metrics = ServeMetrics(max_age_s=max_age_s)
        self._rank: int | None = None
        self._figures: dict[str, Any] = {}
        self._windows = 0
        self._last: WindowRecord | None = None
        self._learned: tuple[PriorKey, Experience | None] | None = None
        """Experience, and the key it belongs to; made together, in the loop's thread."""
        self._policy_status: dict[str, Any] = {}
        self._experience_due = True
        self._prior: Prior | None = None
        """The newest that the fleet has sent."""
        self._metrics: TunerMetrics | None = None
        self._scraper: Any = None
        self._aggregator: Any = None
        self._talks: list[asyncio.Task[None]] = []
        self._memory = Memory(spec.gpu.lease_directory, spec.replica) if spec.gpu.devices else None
        self._restored_windows = 0
        self._to_keep: Learned | None = None
        """What the policy has learned, on its way to the file."""
        self._loop = TunerLoop(
            spec,
            engine=self._inbox,
            serve=self._serve_metrics,
            on_made=self._recall,
            on_record=self._on_record,
        )

    # -- called by the replica -----------------------------------------------------------------

    async def observe(self, push: EnginePush) -> TunerReply:
        """Take what the replica has to say; answers at once."""
        loop = self._loop
        loop.hear()
        if push.sample is not None:
            self._inbox.push(push.sample)
        self._rank, self._figures = push.rank, push.figures
        if push.config is not None and push.config_version != loop.config_version:
            loop.take(push.config, push.config_version)
        is_busy = push.sample is not None and not push.sample.is_idle
        if loop.tuner and loop.tuner.waits_for_work and is_busy:
            loop.wake()
        if not self._talks:
            read_interval_s = max(REPORT_INTERVAL_S, report_interval_s() / READS_PER_REPORT)
            talks = (
                self._repeat(self._read_ray_metrics, read_interval_s),
                self._repeat(self._report, REPORT_INTERVAL_S),
                self._repeat(self._keep, KEEP_INTERVAL_S),
            )
            self._talks = [asyncio.create_task(talk) for talk in talks]
        return TunerReply(
            self._role(),
            loop.config_version,
            loop.config_error,
            gpu_works=loop.tuner is not None,
            gpu_lost=loop.gpu_lost,
        )

    async def release(self) -> None:
        """Reset the clocks, end the loop and the guard."""
        self._loop.release()
        await asyncio.to_thread(self._loop.wait_ended, TALK_TIMEOUT_S)
        if self._memory is not None:
            await asyncio.to_thread(self._memory.forget)

    async def status(self) -> dict[str, Any]:
        """Figures for people; see `telemetry` and docs/vllm.md."""
        return await self._status()

    # -- what it tells and asks, again and again ----------------------------------------------

    async def _repeat(self, talk: Callable[[], Awaitable[None]], interval_s: float) -> None:
        """Do something again and again, whatever becomes of it, until the replica lets go."""
        while not self._loop.released:
            try:
                await asyncio.wait_for(talk(), TALK_TIMEOUT_S)
            except Exception as error:
                self._scraper = self._aggregator = None
                log.warning("%s: %r", talk.__name__.strip("_"), error)
            await asyncio.sleep(interval_s)

    async def _read_ray_metrics(self) -> None:
        self._scraper = self._scraper or get_scraper()
        taken_s, series = await self._scraper.read.remote(self._spec.replica)
        if series is not None:
            t_s = self._clock.now_s() - (time.monotonic() - taken_s) * self._clock.speed
            self._serve_metrics.push(to_sample(series, t_s=t_s, speed=self._clock.speed))

    async def _keep(self) -> None:
        """Write down what was learned, for a tuner that takes this one's place."""
        if self._memory is not None and self._to_keep is not None:
            learned, self._to_keep = self._to_keep, None
            await asyncio.to_thread(self._memory.save, learned)

    def _recall(self, tuner: Tuner) -> None:
        """In the loop's thread: go on where an earlier tuner of this replica was."""
        learned = None if self._memory is None else self._memory.load(self._key_of(tuner))
        if learned is None:
            return
        policy = build_policy(tuner.config.policy)
        try:
            policy.restore(learned.policy)
        except Exception as error:  # a policy that cannot read it begins anew
            log.warning("what was learned before is not taken up: %r", error)
            return
        tuner.policy = policy
        self._windows = self._restored_windows = learned.windows
        log.info("taking up what %d windows have taught", learned.windows)

    async def _report(self) -> None:
        spec, tuner = self._spec, self._loop.tuner
        if tuner is None:
            key, experience = self._prior_key("", "", "", self._loop.config), None
        else:
            key, experience = self._learned or (self._key_of(tuner), None)
        config = self._loop.config
        report = ReplicaReport(
            replica=spec.replica,
            deployment=f"{spec.application}#{spec.deployment}",
            rank=self._rank,
            key=key,
            experience=experience if config.share_experience else None,
            status=await self._status(),
            prior_version=-1 if self._prior is None else self._prior.version,
        )
        self._experience_due = True
        self._aggregator = self._aggregator or get_aggregator()
        reply = await self._aggregator.report.remote(report)
        self._prior = reply.prior_after(self._prior)
        if tuner is None:
            return
        tuner.holdout = reply.order < config.holdout_replicas
        prior = self._prior
        if prior is not None and config.share_experience and prior.key == self._key_of(tuner):
            tuner.offer_prior(prior)

    def _key_of(self, tuner: Tuner) -> PriorKey:
        gpu, meaning = tuner.gpu, tuner.reward.learned_by(tuner.policy)
        return self._prior_key(gpu.model, gpu.actuator.value, meaning, tuner.config)

    def _prior_key(
        self, gpu_model: str, actuator: str, objective: str, config: TunerConfig
    ) -> PriorKey:
        engine = self._spec.engine
        return PriorKey(
            gpu_model=gpu_model,
            actuator=actuator,
            engine_model=engine.model,
            tensor_parallel=engine.tensor_parallel,
            role=engine.role,
            quantization=engine.quantization,
            objective=objective,
            window_s=config.window_s,
            feature_schema=FEATURE_SCHEMA,
            reward_schema=REWARD_SCHEMA,
            policy=config.policy.name,
        )

    def _on_record(self, tuner: Tuner, record: WindowRecord) -> None:
        """In the loop's thread."""
        self._windows += 1
        self._last = record
        if self._experience_due:
            policy = tuner.policy
            self._learned = self._key_of(tuner), policy.experience()
            self._policy_status, self._experience_due = policy.status(), False
        if self._to_keep is None and self._memory is not None:
            self._to_keep = Learned(self._key_of(tuner), self._windows, tuner.policy.snapshot())
        if self._metrics is None:
            spec = self._spec
            labels = spec.application, spec.deployment, spec.replica
            self._metrics = TunerMetrics(*labels, tuner.gpu)
        self._metrics.export(record)

    def _role(self) -> str:
        tuner = self._loop.tuner
        return "holdout" if tuner is not None and tuner.holdout else "tuned"

    async def _status(self) -> dict[str, Any]:
        """Figures for people. Energy and counters are read together, at `t_s`."""
        loop = self._loop
        status = TunerStatus(
            rank=self._rank,
            role=self._role(),
            mode=loop.config.mode,
            state=str(TunerState.UNAVAILABLE if loop.unavailable else TunerState.STARTING),
            reason=loop.gpu_lost or loop.unavailable,
            tuner_pid=os.getpid(),
            guard_pid=loop.guard_pid,
            windows=self._windows,
            restored_windows=self._restored_windows,
            loop_cpu_s=loop.cpu_s,
        )
        if loop.tuner is not None:
            status = await self._status_with(status, loop.tuner)
        samples = self._inbox.since(float("-inf"))
        if samples:
            status = with_engine(status, samples[-1])
        return status.as_dict() | self._figures

    async def _status_with(self, status: TunerStatus, tuner: Tuner) -> TunerStatus:
        if self._metrics is not None:
            self._metrics.show(tuner)
        status = replace(
            with_tuner(status, tuner, self._last),
            policy_status=self._policy_status,
            phase_delays=list(self._loop.delays.counts),
        )
        status = with_serve(status, self._serve_metrics.window(self._clock.now_s()))
        try:
            return with_gpu(status, await self._reading(tuner), tuner.gpu)
        except GpuError as error:
            return replace(status, reason=str(error))

    async def _reading(self, tuner: Tuner) -> GpuSample:
        """The loop's newest, whose reads also show the guards that it lives; one of our own, in a
        thread that may hang, only where the loop takes none."""
        if tuner.reading is not None and tuner.mode is not Mode.OFF:
            return tuner.reading
        return await asyncio.to_thread(tuner.gpu.read)


def start_tuner(spec: TunerSpec) -> Any:
    """Start a tuner on this very node; returns its handle without waiting for it.

    The actor is the caller's child: Ray ends it when the caller's process ends.
    """
    node_id = ray.get_runtime_context().get_node_id()
    options = {"max_restarts": -1, "max_concurrency": 16}
    return background_actor(FrequencyTuner, node_id=node_id, **options).remote(spec)

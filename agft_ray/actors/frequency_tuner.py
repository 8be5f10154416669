"""The frequency-tuner actor: the loop in a thread of a process on the replica's own node."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from agft_ray.actors.experience_aggregator import get_aggregator
from agft_ray.actors.gpu_actuator import RemoteGpu
from agft_ray.actors.messages import EnginePush, TunerReply, TunerSpec
from agft_ray.actors.metrics_scraper import get_scraper, report_interval_s
from agft_ray.actors.tuner_metrics import TunerMetrics
from agft_ray.actors.tuner_status import engine_figures, gpu_figures, tuner_figures
from agft_ray.errors import GpuError, GpuLostError, GpuTransientError
from agft_ray.gpu.base import Gpu
from agft_ray.gpu.group import GpuGroup
from agft_ray.gpu.leased import LeasedGpu
from agft_ray.gpu.registry import open_gpu
from agft_ray.policy.reward import REWARD_SCHEMA
from agft_ray.priors.store import ReplicaReport
from agft_ray.settings import TunerConfig
from agft_ray.telemetry.engine_inbox import EngineInbox
from agft_ray.telemetry.features import FEATURE_SCHEMA
from agft_ray.telemetry.ray_metrics import ServeMetrics, to_sample
from agft_ray.tuner import Tuner, WindowRecord
from agft_ray.types import Experience, GpuSample, Mode, PriorKey

log = logging.getLogger(__name__)

GOSSIP_INTERVAL_S = 1.0
"""Wall time between reports to the aggregator, and between reads of Ray's metrics."""
GOSSIP_TIMEOUT_S = 5.0
BEAT_S = 0.5
"""Wall time within which the loop's thread shows its clock guard that it is alive."""
OPEN_RETRY_S = 1.0
MAX_OPEN_RETRY_S = 60.0
"""Wall time between attempts to open a GPU that does not answer: at first, and at most."""
MAX_METRICS_AGE_INTERVALS = 3.0
"""Ray's metrics older than this many report intervals count as missing."""


class FrequencyTuner:
    """Thin Ray shell round `Tuner`.

    A thread of its own opens the GPU and drives the loop, and is the only one that sets clocks;
    what talks to others (the replica, the aggregator, the node's metrics scraper) runs on the
    actor's event loop and cannot delay it. The clocks are set under a lease and watched by a guard
    process (see `LeasedGpu`): whatever ends or stops this process, they are reset.
    """

    def __init__(self, spec: TunerSpec) -> None:
        self._spec = spec
        self._clock = spec.gpu.clock
        self._inbox = EngineInbox()
        max_age_s = MAX_METRICS_AGE_INTERVALS * report_interval_s() * self._clock.speed
        self._serve_metrics = ServeMetrics(max_age_s=max_age_s)
        self._config, self._config_version, self._config_error = spec.config, 0, ""
        self._leased: LeasedGpu | None = None
        self._tuner: Tuner | None = None
        self._unavailable = self._gpu_lost = ""
        self._rank: int | None = None
        self._figures: dict[str, Any] = {}
        self._windows = 0
        self._loop_cpu_s = 0.0
        self._last: WindowRecord | None = None
        self._learned: tuple[PriorKey, Experience | None] | None = None
        """Experience, and the key it belongs to; made together, in the loop's thread."""
        self._policy_status: dict[str, Any] = {}
        self._experience_due = True
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._scraper: Any = None
        self._aggregator: Any = None
        self._gossip: list[asyncio.Task[None]] = []
        self._released = False
        threading.Thread(target=self._drive, name="tuner-loop", daemon=True).start()

    # -- called by the replica -----------------------------------------------------------------

    async def observe(self, push: EnginePush) -> TunerReply:
        """Take what the replica has to say; answers at once."""
        if push.sample is not None:
            self._inbox.push(push.sample)
        self._rank, self._figures = push.rank, push.figures
        if push.config is not None and push.config_version != self._config_version:
            self._reconfigure(push.config, push.config_version)
        is_busy = push.sample is not None and not push.sample.is_idle
        if self._tuner and self._tuner.waits_for_work and is_busy:
            self._wake.set()
        if not self._gossip:
            talks = (self._read_ray_metrics, self._report)
            self._gossip = [asyncio.create_task(self._repeat(talk)) for talk in talks]
        return TunerReply(self._role(), self._config_version, self._config_error, self._gpu_lost)

    def _reconfigure(self, config: TunerConfig, version: int) -> None:
        """Take settings, or keep the old ones if the GPU has no arm within their bounds."""
        self._config_version, self._config_error = version, ""
        try:
            if self._tuner is not None:
                self._tuner.reconfigure(config)
            self._config = config
        except ValueError as error:
            self._config_error = f"user_config: {error}"
            log.error("keeping the settings of replica %s: %s", self._spec.replica, error)
        self._wake.set()

    async def release(self) -> None:
        """Reset the clocks, end the loop and the guard."""
        self._released = True
        if self._tuner is not None:
            self._tuner.stop()
        self._wake.set()
        await asyncio.to_thread(self._ended.wait, GOSSIP_TIMEOUT_S)

    async def status(self) -> dict[str, Any]:
        return await self._status()

    # -- the loop's thread ---------------------------------------------------------------------

    def _drive(self) -> None:
        """Open the GPU, then resume the loop at the times it asks for, or at once when woken."""
        try:
            self._tuner = self._open()
            if self._tuner is not None:
                self._metrics = TunerMetrics(
                    self._spec.application,
                    self._spec.deployment,
                    self._spec.replica,
                    self._tuner.gpu,
                )
                for wake_s in self._tuner.run():
                    self._metrics.show(self._tuner)
                    self._loop_cpu_s = time.thread_time()
                    self._sleep_until(wake_s)
        except GpuLostError as error:
            self._gpu_lost = str(error)
        except Exception as error:
            self._unavailable = repr(error)
            log.exception("the tuner of replica %s has ended", self._spec.replica)
        finally:
            self._ended.set()

    def _open(self) -> Tuner | None:
        """The tuner, once its GPUs answer; None if it is certain that they never will."""
        self._unavailable = self._spec.problem
        if self._unavailable:
            return None
        retry_s = OPEN_RETRY_S
        while not self._released:
            try:
                gpu = self._open_gpu()
                return Tuner(
                    self._config,
                    gpu=gpu,
                    engine=self._inbox,
                    serve=self._serve_metrics,
                    clock=self._clock,
                    role=self._spec.engine.role,
                    on_record=self._on_record,
                )
            except GpuLostError:
                raise
            except (GpuError, ValueError) as error:
                self._unavailable = str(error)
                log.error("replica %s is not tuned: %s", self._spec.replica, error)
                if isinstance(error, ValueError):
                    self._config_error = f"user_config: {error}"
                elif not isinstance(error, GpuTransientError):
                    return None
            self._wake.wait(retry_s)
            self._wake.clear()
            retry_s = min(2 * retry_s, MAX_OPEN_RETRY_S)
        return None

    def _open_gpu(self) -> Gpu:
        spec = self._spec
        gpus: list[Gpu] = []
        if spec.gpu.devices:
            self._leased = self._leased or open_gpu(spec.gpu, owner=spec.owner)
            if self._config.mode == "control":
                self._leased.sweep()
            gpus.append(self._leased)
        gpus += [RemoteGpu(node, gpu, self._clock, spec.owner) for node, gpu in spec.elsewhere]
        return gpus[0] if len(gpus) == 1 else GpuGroup(gpus)

    def _sleep_until(self, wake_s: float) -> None:
        """Sleep, in naps short enough for the guard to see that this thread does not hang."""
        self._beat()
        while (delay_s := (wake_s - self._clock.now_s()) / self._clock.speed) > 0:
            if self._wake.wait(min(delay_s, BEAT_S)):
                break
            self._beat()
        self._wake.clear()

    def _beat(self) -> None:
        if self._leased is not None:
            self._leased.beat()

    # -- gossip --------------------------------------------------------------------------------

    async def _repeat(self, talk: Callable[[], Awaitable[None]]) -> None:
        """Do something every second, whatever becomes of it, until the replica lets go."""
        while not self._released:
            try:
                await asyncio.wait_for(talk(), GOSSIP_TIMEOUT_S)
            except Exception as error:
                self._scraper = self._aggregator = None
                log.warning("%s: %r", talk.__name__.strip("_"), error)
            await asyncio.sleep(GOSSIP_INTERVAL_S)

    async def _read_ray_metrics(self) -> None:
        self._scraper = self._scraper or get_scraper()
        taken_s, series = await self._scraper.read.remote(self._spec.replica)
        if series is not None:
            t_s = self._clock.now_s() - (time.monotonic() - taken_s) * self._clock.speed
            self._serve_metrics.push(to_sample(series, t_s=t_s, speed=self._clock.speed))

    async def _report(self) -> None:
        spec, tuner = self._spec, self._tuner
        if tuner is None:
            key, experience = self._prior_key("", ""), None
        else:
            key, experience = self._learned or (self._key_of(tuner), None)
        config = self._config
        report = ReplicaReport(
            replica=spec.replica,
            deployment=f"{spec.application}#{spec.deployment}",
            rank=self._rank,
            key=key,
            experience=experience if config.share_experience else None,
            status=await self._status(),
        )
        self._experience_due = True
        self._aggregator = self._aggregator or get_aggregator()
        reply = await self._aggregator.report.remote(report)
        if tuner is None:
            return
        tuner.holdout = reply.order < config.holdout_replicas
        if reply.prior is not None and config.share_experience and key == self._key_of(tuner):
            tuner.offer_prior(reply.prior)

    def _key_of(self, tuner: Tuner) -> PriorKey:
        return self._prior_key(tuner.gpu.model, tuner.gpu.actuator.value)

    def _prior_key(self, gpu_model: str, actuator: str) -> PriorKey:
        engine = self._spec.engine
        config = self._config if self._tuner is None else self._tuner.config
        return PriorKey(
            gpu_model=gpu_model,
            actuator=actuator,
            engine_model=engine.model,
            tensor_parallel=engine.tensor_parallel,
            role=engine.role,
            quantisation=engine.quantisation,
            objective=f"{config.objective} ttft<={config.slo.ttft_s} tpot<={config.slo.tpot_s}",
            window_s=config.window_s,
            feature_schema=FEATURE_SCHEMA,
            reward_schema=REWARD_SCHEMA,
            policy=config.policy.name,
        )

    def _on_record(self, record: WindowRecord) -> None:
        self._windows += 1
        self._last = record
        tuner = self._tuner
        if tuner is None:  # the loop's thread sets it before the first window
            return
        if self._experience_due:
            policy = tuner.policy
            self._learned = self._key_of(tuner), policy.experience()
            self._policy_status, self._experience_due = policy.status(), False
        self._metrics.export(record)

    def _role(self) -> str:
        return "holdout" if self._tuner and self._tuner.holdout else "tuned"

    async def _status(self) -> dict[str, Any]:
        """Figures for people. Energy and counters are read together, at `t_s`."""
        status: dict[str, Any] = {
            "rank": self._rank,
            "role": self._role(),
            "mode": self._config.mode,
            "state": "gpu lost" if self._gpu_lost else "unavailable",
            "reason": self._gpu_lost or self._unavailable,
            "tuner_pid": os.getpid(),
            "guard_pid": self._leased.guard_pid if self._leased else None,
            "windows": self._windows,
            "loop_cpu_s": self._loop_cpu_s,
        }
        if self._tuner is not None:
            status |= await self._figures_of(self._tuner)
        samples = self._inbox.since(float("-inf"))
        if samples:
            status |= engine_figures(samples[-1])
        return status | self._figures

    async def _figures_of(self, tuner: Tuner) -> dict[str, Any]:
        figures = tuner_figures(tuner, self._last) | {"policy_status": self._policy_status}
        serve = self._serve_metrics.window(self._clock.now_s())
        if serve is not None:
            figures["serve_request_rate_per_s"] = serve.request_rate_per_s
            figures["serve_latency_s"] = serve.mean_latency_s
            figures["serve_in_flight"] = serve.in_flight
            figures["serve_metrics_age_s"] = serve.age_s
        try:
            return figures | gpu_figures(await self._reading(tuner), tuner.gpu)
        except GpuError as error:
            return figures | {"reason": str(error)}

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

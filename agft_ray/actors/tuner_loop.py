"""A tuner's loop in a thread of its own: opens the GPU, sleeps, and is told things meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from agft_ray.actors.gpu_actuator import RemoteGpu
from agft_ray.actors.messages import TunerSpec
from agft_ray.actors.phase_socket import Doorbell, Told, phase_path
from agft_ray.errors import GpuError, GpuLostError, GpuTransientError
from agft_ray.gpu.base import Gpu
from agft_ray.gpu.group import GpuGroup
from agft_ray.gpu.leased import LeasedGpu
from agft_ray.gpu.registry import open_gpu
from agft_ray.settings import TunerConfig
from agft_ray.telemetry.delays import Delays
from agft_ray.telemetry.energy_weight import WeightReader
from agft_ray.telemetry.inbox import EngineInbox
from agft_ray.telemetry.ray_metrics import ServeMetrics
from agft_ray.tuner import Tuner, WindowRecord
from agft_ray.types import Mode, Phase

log = logging.getLogger(__name__)

BEAT_S = 0.5
"""Wall time within which the loop's thread shows its clock guard that it is alive."""
REPLICA_SILENCE_S = 4.5
"""Wall time without a word after which the replica counts as hung. The thread looks within
`BEAT_S`, so that clocks are reset after 5 s: a guard gives the tuner itself as long."""
OPEN_RETRY_S = 1.0
MAX_OPEN_RETRY_S = 60.0
"""Wall time between attempts to open a GPU that does not answer: at first, and at most."""


class TunerLoop:
    """Makes a `Tuner` and drives it. Its thread alone opens the GPU and sets clocks.

    Until the first settings have come nothing is opened or set: a tuner that was restarted cannot
    know what its replica wants by now. Every method may be called from any thread, and returns at
    once unless it says otherwise.

    Args:
        on_made: called with a new tuner before it begins, in the loop's thread.
        on_record: called after each window, in the loop's thread, with the tuner.
    """

    def __init__(
        self,
        spec: TunerSpec,
        *,
        engine: EngineInbox,
        serve: ServeMetrics,
        on_record: Callable[[Tuner, WindowRecord], None],
        on_made: Callable[[Tuner], None] = lambda tuner: None,
    ) -> None:
        self.clock = spec.gpu.clock
        self.config = TunerConfig(mode="off")
        """The settings in force; `off` until some have come."""
        self.config_version = -1
        """That of the newest settings that have come, in force or refused."""
        self.config_error = ""
        """Why the newest are not in force, or ""."""
        self.tuner: Tuner | None = None
        """None until the GPU has been opened."""
        self.unavailable = ""
        """Why it has not been, or what ended the loop."""
        self.gpu_lost = ""
        """How a GPU that had been opened was lost, or ""."""
        self.released = False
        self.cpu_s = 0.0
        """CPU time of the thread."""
        self.delays = Delays()
        """From a prompt's arrival to the GPU's having been called for its clock."""
        self._spec, self._engine, self._serve = spec, engine, serve
        self._on_made, self._on_record = on_made, on_record
        self._weights = WeightReader()
        self._leased: LeasedGpu | None = None
        self._heard_s = self._looked_s = time.monotonic()
        """When the replica last said something, and when the thread last looked whether it did."""
        self._silence_s = 0.0
        self._publishing = threading.Lock()
        """Held while the tuner is published, and while news find out whom to tell."""
        self._has_config, self._bell = threading.Event(), Doorbell()
        self._ended = threading.Event()
        threading.Thread(target=self._drive, name="tuner-loop", daemon=True).start()

    @property
    def guard_pid(self) -> int | None:
        """The process that guards this node's clocks, while they are or may be set."""
        return self._leased.guard_pid if self._leased else None

    def hear(self) -> None:
        """The replica has shown that it lives."""
        self._heard_s = time.monotonic()

    def wake(self) -> None:
        """Resume the loop now."""
        self._bell.ring()

    def take(self, config: TunerConfig, version: int) -> None:
        """Take settings, or keep the old ones if the GPU has no arm within their bounds."""
        with self._publishing:
            self.config_version, self.config_error = version, ""
            if self.tuner is None:
                self.config = config
            else:
                self._reconfigure(self.tuner, config)
        self._has_config.set()
        self._bell.ring()

    def release(self) -> None:
        """Reset the clocks and end: soon, see `wait_ended`."""
        with self._publishing:
            self.released = True
            if self.tuner is not None:
                self.tuner.stop()
        self._has_config.set()
        self._bell.ring()

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait for the end of the loop; False if it takes longer."""
        return self._ended.wait(timeout_s)

    def _reconfigure(self, tuner: Tuner, config: TunerConfig) -> None:
        try:
            tuner.reconfigure(config)
            self.config = config
        except ValueError as error:
            self.config_error = f"user_config: {error}"
            log.error("keeping the settings of replica %s: %s", self._spec.replica, error)

    # -- the thread ----------------------------------------------------------------------------

    def _drive(self) -> None:
        """Open the GPU, then resume the loop at the times it asks for, or at once when woken."""
        try:
            self._open()
            if self.tuner is not None:
                phases = phase_path(self._spec.gpu.lease_directory, self._spec.replica)
                for wake_s in self.tuner.run():
                    self.cpu_s = time.thread_time()
                    if self.tuner.mode is Mode.CONTROL:  # the other modes leave no trace
                        self._bell.listen(phases)
                    self._sleep_until(wake_s, self.tuner)
        except GpuLostError as error:
            self.gpu_lost = str(error)
        except Exception as error:
            self.unavailable = repr(error)
            log.exception("the tuner of replica %s has ended", self._spec.replica)
        finally:
            self._weights.close()
            self._bell.close()
            self._ended.set()

    def _open(self) -> None:
        """Have a tuner, once its GPUs answer; none if it is certain that they never will.

        Only a GPU that has worked can be lost: one that cannot be opened may never have been the
        engine's, and must not cost the replica.
        """
        self.unavailable = self._spec.problem
        if self.unavailable:
            return
        self._has_config.wait()
        retry_s = OPEN_RETRY_S
        while not self.released:
            config = self.config
            try:
                self._publish(self._made(config), config)
                return
            except (GpuError, ValueError) as error:
                self.unavailable = str(error)
                log.error("replica %s is not tuned: %s", self._spec.replica, error)
                if isinstance(error, ValueError):
                    self.config_error = f"user_config: {error}"
                elif not isinstance(error, GpuTransientError):
                    return
            self._bell.wait(retry_s)
            retry_s = min(2 * retry_s, MAX_OPEN_RETRY_S)

    def _made(self, config: TunerConfig) -> Tuner:
        tuner = Tuner(
            config,
            gpu=self._open_gpu(config),
            engine=self._engine,
            serve=self._serve,
            clock=self.clock,
            role=self._spec.engine.role,
            weigh=self._weights.weigh,
            on_record=lambda record: self._on_record(tuner, record),
        )
        self._on_made(tuner)
        return tuner

    def _publish(self, tuner: Tuner, config: TunerConfig) -> None:
        """Have the tuner, and tell it what has come while it was made: settings, or the end."""
        with self._publishing:
            if self.released:
                return
            self.tuner, self.unavailable, self.config_error = tuner, "", ""
            newest, self.config = self.config, config
            if newest is not config:
                self._reconfigure(tuner, newest)

    def _open_gpu(self, config: TunerConfig) -> Gpu:
        spec = self._spec
        gpus: list[Gpu] = []
        if spec.gpu.devices:
            self._leased = self._leased or open_gpu(spec.gpu, owner=spec.owner)
            if config.mode == "control":
                self._leased.sweep()
            gpus.append(self._leased)
        gpus += [RemoteGpu(node, gpu, self.clock, spec.owner) for node, gpu in spec.elsewhere]
        return gpus[0] if len(gpus) == 1 else GpuGroup(gpus)

    def _sleep_until(self, wake_s: float, tuner: Tuner) -> None:
        """Sleep, in naps short enough for the guard to see that this thread does not hang, and for
        this thread to see that the replica does; meanwhile clocks follow what the engine does."""
        self._beat()
        while (delay_s := (wake_s - self.clock.now_s()) / self.clock.speed) > 0:
            woken, told = self._bell.wait(min(delay_s, BEAT_S))
            if told is not None:
                self._enter(told, tuner)
            if self._falls_silent(tuner) or woken:
                break
            self._beat()

    def _enter(self, told: Told, tuner: Tuner) -> None:
        changes = tuner.control.phase_changes
        tuner.enter(told.phase)
        if told.phase is Phase.PREFILL and tuner.control.phase_changes > changes:
            self.delays.add(time.monotonic() - told.since_s)

    def _falls_silent(self, tuner: Tuner) -> bool:
        """Whether the replica has just become one that hangs; tells the tuner whether it is one.

        Time that passes between two looks counts as two naps at most: if this process has been
        stopped, that says nothing about the replica.
        """
        heard_s, now_s = self._heard_s, time.monotonic()
        if heard_s > self._looked_s:
            self._silence_s, self._looked_s = 0.0, heard_s
        self._silence_s += min(now_s - self._looked_s, 2 * BEAT_S)
        self._looked_s = now_s
        was_cut_off, tuner.is_cut_off = tuner.is_cut_off, self._silence_s > REPLICA_SILENCE_S
        return tuner.is_cut_off and not was_cut_off

    def _beat(self) -> None:
        if self._leased is not None:
            self._leased.beat()

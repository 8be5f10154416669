"""THE LOOP: read -> window -> context -> policy -> clock -> reward, and back to default clocks
whenever it cannot know. Plain Python; GPU, metrics, policy and clock are injected.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from agft_ray.clock import Clock
from agft_ray.clock_control import ClockControl
from agft_ray.clock_timer import POLL_S
from agft_ray.errors import GpuError, GpuLostError, GpuTransientError, StaleMetricsError
from agft_ray.fail_safe import FailSafe
from agft_ray.gpu.base import Gpu
from agft_ray.policy.arms import nearest
from agft_ray.policy.base import Policy
from agft_ray.policy.experience import Prior
from agft_ray.policy.registry import build_policy
from agft_ray.policy.reward import DELAY_EXPONENTS, Reward
from agft_ray.settings import TunerConfig
from agft_ray.telemetry.features import extract
from agft_ray.telemetry.inbox import EngineInbox
from agft_ray.telemetry.ray_metrics import ServeMetrics
from agft_ray.telemetry.status import TunerState
from agft_ray.telemetry.windows import WindowRejectedError, close_window
from agft_ray.types import (
    THROTTLED,
    Actuator,
    Arm,
    Context,
    Decision,
    GpuSample,
    Mode,
    Outcome,
    Phase,
    Plan,
    Window,
)

log = logging.getLogger(__name__)

READINGS_PER_WINDOW = 8
"""GPU readings in a window: they place the energy counter in time and average the clock."""
INTERRUPTED, WOKEN = "interrupted", "woken"
"""Why a window was cut short on purpose."""
CUT_OFF = "the replica is silent"
ENDED_BADLY = (TunerState.GPU_LOST, TunerState.FAULT)
MAX_FAULTS = 5
"""Faults in a row after which the tuner stops for good; serving goes on at default clocks."""
MIN_PAUSE_S = 2.0
"""Half of the pause after a first fault, if windows are shorter; it doubles with each in a row."""


@dataclass(frozen=True, slots=True)
class WindowRecord:
    """What one control step saw and did; `window` is None where none could be had."""

    t_s: float
    window: Window | None
    reward: float | None
    decision: Decision
    note: str = ""


class Tuner:
    """Tunes one GPU (group) for one engine.

    Guarantees, in `control`: the clocks are reset before anything else, whenever statistics, energy
    or the GPU cannot be trusted for `stale_windows` windows, after any exception, on `stop`, and
    when the generator is closed; a reset that fails is tried again. In the other modes, and while
    the clocks are not ours to set (see `ClockControl`), nothing is touched but what the tuner
    itself has locked. A policy learns only from windows that are evidence about their clock.

    `run` is a generator of wake-up times on `clock`: whoever drives it sleeps until the time it
    yields (or less: being resumed early is harmless) and resumes it; under Ray that is a thread,
    in virtual time the event loop of the simulation. All other methods but `enter` may be called
    from other threads; they take effect at the loop's next step.
    """

    def __init__(
        self,
        config: TunerConfig,
        *,
        gpu: Gpu,
        engine: EngineInbox,
        serve: ServeMetrics,
        clock: Clock,
        role: str = "mixed",
        policy: Policy | None = None,
        readings_per_window: int = READINGS_PER_WINDOW,
        on_record: Callable[[WindowRecord], None] = lambda record: None,
    ) -> None:
        self.config = config
        self.gpu, self.engine, self.serve, self.clock = gpu, engine, serve, clock
        self.role = role
        """What the engine does: 'mixed', 'prefill' or 'decode'."""
        self.policy = policy or build_policy(config.policy)
        self.holdout = False
        """Keep default clocks whatever the policy says, as the baseline of others."""
        self.is_cut_off = False
        """Whoever hands in the engine's statistics has fallen silent, and may hang: clocks are
        reset at the loop's next step, however long its windows are, and stay at default."""
        self.state = TunerState.STARTING
        self.fault = ""
        """The last fault, until a step has gone well."""
        self.reading: GpuSample | None = None
        """The newest reading of the GPU."""
        self.control = ClockControl(gpu, clock)
        self._readings_per_window = readings_per_window
        self._on_record = on_record
        # Handed over between threads: a deque's append and pop are atomic.
        self._pending: deque[TunerConfig] = deque(maxlen=1)
        self._priors: deque[Prior] = deque(maxlen=1)
        self._stopped = False
        self._controls = False
        self._context: Context | None = None
        self._raised: deque[Exception] = deque(maxlen=1)  # by `enter`
        self._fail_safe, self._faults = FailSafe(), 0
        self._apply(config)

    # -- control from outside ------------------------------------------------------------------

    def reconfigure(self, config: TunerConfig) -> None:
        """Take new settings at the next step.

        What was learned stays, unless the policy's own settings or what a reward means (objective,
        SLOs, length of a window) changed. Raises `ValueError`, and changes nothing, if no supported
        clock lies within the bounds.
        """
        config.arms(self.gpu.arms, self.gpu.actuator)
        self._pending.append(config)

    def offer_prior(self, prior: Prior) -> None:
        """Have the policy take a prior at the next step."""
        self._priors.append(prior)

    def stop(self) -> None:
        """End the loop at its next step; it resets the clocks on its way out."""
        self._stopped = True

    @property
    def mode(self) -> Mode:
        """That of the settings in force."""
        return Mode(self.config.mode)

    @property
    def arms(self) -> tuple[int, ...]:
        """What the policy may choose: supported, within the bounds, and kept by the GPU."""
        dropped = self.control.dropped
        if not dropped:
            return self._arms
        return tuple(arm for arm in self._arms if arm not in dropped) or self._arms

    def enter(self, phase: Phase) -> None:
        """The engine does this now: have the plan's clock for it. To be called by whoever drives
        the loop, between its steps; a fault is the loop's, at its next step."""
        try:
            self.control.enter(phase, self.config.settle_s)
        except Exception as error:
            self._raised.append(error)

    @property
    def waits_for_work(self) -> bool:
        """True while the engine has been empty for long: resume the loop once it is not."""
        return self._fail_safe.idle >= self.config.idle_windows

    def _apply(self, config: TunerConfig) -> None:
        def learning(c: TunerConfig) -> tuple[object, ...]:
            return c.policy, c.objective, c.slo, c.window_s

        if learning(config) != learning(self.config):
            self.policy = build_policy(config.policy)
            self._priors.clear()
        self.control.restart()
        self._arms = config.arms(self.gpu.arms, self.gpu.actuator)
        self._stale_after_s = config.stale_limit_s(self.clock.speed)
        self.reward = Reward(
            DELAY_EXPONENTS[config.objective], config.slo.ttft_s, config.slo.tpot_s
        )
        self.config = config

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> Generator[float, None, None]:
        """Run until `stop`, yielding the time at which to be resumed.

        Raises `GpuLostError` if the GPU is gone; every other fault is dealt with inside.
        """
        try:
            while not self._stopped:
                try:
                    yield from self._step()
                    self._faults, self.fault = 0, ""
                except GpuLostError:
                    self.state = TunerState.GPU_LOST
                    raise
                except Exception as error:
                    yield self._after_fault(error)
        finally:
            if self.control.let_go(for_good=True) and self.state not in ENDED_BADLY:
                self.state = TunerState.STOPPED

    def _step(self) -> Iterator[float]:
        """Observe one window, learn from it, choose the next clock and set it."""
        if self._pending:
            self._apply(self._pending.pop())
        if self._priors:
            self.policy.merge(self._priors.pop())
        if self.mode is Mode.CONTROL:
            self._controls = self.control.take(self.config.settle_s)
        else:
            self._controls = False
            self.control.let_go()
        if self.mode is Mode.OFF:
            self.state = TunerState.OFF
            yield self.clock.now_s() + self.config.window_s
            return
        window, note = yield from self._observe()
        reward = self._learn(window) if window else None
        decision = self._decide(window, note)
        if self._controls and not self.control.is_withdrawn:
            self.control.set(decision.chosen, self.config.settle_s)
        self._on_record(WindowRecord(self.clock.now_s(), window, reward, decision, note))

    def _observe(self) -> Generator[float, None, tuple[Window | None, str]]:
        """One window under the present plan; or None, and why there is none."""
        config = self.config
        yield from self._settle()
        start_s = self.clock.now_s()
        end_s = start_s + config.window_s
        readings, rises = [self._read()], self.control.rises
        while (now_s := self.clock.now_s()) < end_s:
            if self._stopped or self._pending:
                return None, INTERRUPTED
            if self.is_cut_off and not self.control.plan.is_default:
                return None, CUT_OFF
            if self.waits_for_work and not self.engine.is_idle(now_s, self._stale_after_s):
                return None, WOKEN
            yield min(now_s + config.window_s / self._readings_per_window, end_s)
            readings.append(self._read())
        plan = self.control.plan if self._controls else Plan.of(readings[-1].locked)
        if problem := self.control.others(readings, plan, self._controls):
            return None, problem
        try:
            self.engine.latest(self.clock.now_s(), self._stale_after_s)
            window = close_window(
                plan=plan,
                window_s=config.window_s,
                engine=self.engine.since(start_s),
                gpu=readings,
                serve=self.serve.window(self.clock.now_s()),
                rises=self.control.rises - rises,
                clock_change_s=self.control.timer.median_s,
            )
        except (StaleMetricsError, WindowRejectedError) as error:
            return None, str(error)
        if self._controls and (problem := self.control.judge(window)):
            return None, problem
        return window, ""

    def _settle(self) -> Iterator[float]:
        """Wait until a change of plan is over, and meanwhile see how long it takes."""
        control = self.control
        while control.timer.is_running and (now_s := self.clock.now_s()) < control.settled_s:
            control.timer.see(self._read())
            yield min(now_s + POLL_S, control.settled_s)
        control.timer.give_up(self.clock.now_s(), self.config.settle_s)
        yield max(self.clock.now_s(), control.settled_s)

    def _read(self) -> GpuSample:
        if self._raised:
            raise self._raised.pop()
        self.control.catch_up(self.config.settle_s)
        self.reading = self.gpu.read()
        self.control.see(self.reading)
        return self.reading

    def _learn(self, window: Window) -> float | None:
        """Hand the window to the policy if it is evidence about its clock; returns its reward."""
        reward = self.reward(window)
        if reward is None or window.event_reasons & THROTTLED:
            return reward
        outcome = Outcome(window.arm, self._observed_arm(window), extract(window), reward, window)
        self.policy.update(outcome)
        return reward

    def _observed_arm(self, window: Window) -> Arm:
        """The SM clock that was really there, unless it was several; a limit is what was set."""
        is_one = window.plan is None or window.plan.is_uniform
        if window.arm is None or not is_one or self.gpu.actuator is not Actuator.SM_CLOCK:
            return window.arm
        return nearest(self.gpu.arms, window.sm_clock_mhz)

    def _decide(self, window: Window | None, note: str) -> Decision:
        """The next arm. Default clocks wherever the loop cannot know or must not interfere."""
        was_waiting = self.waits_for_work
        safe = self._fail_safe
        safe.see(window, self.config, self.reward, interrupted=note in (INTERRUPTED, WOKEN))
        at_default = self.control.plan.is_default
        if rest := safe.reason(
            self.config, cut_off=self.is_cut_off, holdout=self.holdout, at_default=at_default
        ):
            self.state = rest
            return Decision(None, rest)
        tuning = TunerState.PRESSURE if safe.is_pressed else TunerState.TUNING
        doing = tuning if self._controls else TunerState.OBSERVING
        self.state = TunerState(self.control.state or doing)
        if safe.is_pressed:
            return Decision(None, TunerState.PRESSURE)
        if not self.arms:
            return Decision(None, "no arms")
        if self.waits_for_work:
            return self.policy.select_idle(self.arms)
        if window is not None and not window.is_idle:
            self._context = extract(window)
        if self._context is None:
            return Decision(None, "no load yet")
        if (window is None or safe.is_throttled) and not was_waiting:
            return Decision.of(self.control.plan, "hold")
        return self.policy.select(self._context, self.arms)

    # -- faults ------------------------------------------------------------------------------------

    def _after_fault(self, error: Exception) -> float:
        """Back to default clocks. Tries again a while later, but neither for ever nor in vain."""
        self._faults += 1
        self.fault = str(error) or repr(error)
        log.error(
            "tuner fault %d of %d, clocks are reset", self._faults, MAX_FAULTS, exc_info=error
        )
        self.state = TunerState.FAULT
        self._fail_safe.forget()
        self.control.reset_own()
        permanent = isinstance(error, GpuError) and not isinstance(error, GpuTransientError)
        self._stopped = permanent or self._faults >= MAX_FAULTS
        pause_s = max(self.config.window_s, MIN_PAUSE_S) * 2**self._faults
        return self.clock.now_s() + float(pause_s)

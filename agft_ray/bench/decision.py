"""What one control step costs, and one of the switch: `agft-ray bench decision`."""

from __future__ import annotations

import dataclasses
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from agft_ray.actors.phase_socket import Doorbell, phase_path
from agft_ray.policy.agft.config import AgftConfig
from agft_ray.policy.agft.linucb import LinUcb
from agft_ray.policy.agft.policy import AgftPolicy
from agft_ray.policy.phases.config import PhasesConfig
from agft_ray.policy.phases.policy import PhasesPolicy
from agft_ray.policy.reward import Reward
from agft_ray.policy.statistics import FEATURES, features_of
from agft_ray.serve.live_switch import LiveSwitch
from agft_ray.telemetry.features import extract
from agft_ray.types import EventReason, Outcome, Plan, StepTotals, Window

WARM_UP = 200


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Times of one operation, in milliseconds."""

    what: str
    median_ms: float
    p99_ms: float

    def __str__(self) -> str:
        return f"{self.what:<58} median {self.median_ms:7.3f} ms   p99 {self.p99_ms:7.3f} ms"


def bench_decision(*, arms: int, steps: int, seed: int) -> list[Timing]:
    """Time a policy's part of a control step, over `arms` clocks and random windows; and what the
    replica's process does at an arrival and a step that change the phase."""
    clocks = [210 + 15 * index for index in range(arms)]
    windows = [window for window, _ in zip(_windows(seed), range(steps + WARM_UP), strict=False)]
    policy, reward = AgftPolicy(AgftConfig(seed=seed)), Reward()

    def control_step(window: Window) -> None:
        context = extract(window)
        arm = policy.select(context, clocks).arm
        value = reward(window)
        assert value is not None
        policy.update(Outcome(arm, arm, context, value, window))

    ucb = LinUcb(features=FEATURES, ridge=1.0, slope_ridge=1.0, forgetting=0.999)
    turn = iter(range(steps + WARM_UP))

    def every_arm(window: Window) -> None:
        x = features_of(extract(window))
        prediction = ucb.predict(x, clocks)
        int(np.argmax(prediction.means + prediction.widths))
        ucb.learn(clocks[next(turn) % arms], x, 0.1)

    return [
        _timing(f"agft: context, select, reward, update; {arms} clocks", control_step, windows),
        _timing(f"LinUCB alone with evidence on all {arms} arms", every_arm, windows),
        _timing(f"phases: context, select, update; {arms} clocks", _phases_step(clocks), windows),
        _switch_timing(windows),
    ]


def _phases_step(clocks: list[int]) -> Callable[[Window], None]:
    """On a GPU whose steps are slower below 1500 MHz, and below 1200 MHz."""
    policy = PhasesPolicy(PhasesConfig())

    def step(window: Window) -> None:
        context = extract(window)
        plan = policy.select(context, clocks).chosen
        window = _followed(window, plan)
        policy.update(Outcome(window.arm, window.arm, context, 0.0, window))

    return step


def _followed(window: Window, plan: Plan) -> Window:
    prefill, decode = window.prefill_steps, window.decode_steps
    slower = [
        max(1.0, knee / (arm or knee)) for arm, knee in zip(plan.arms, (1500, 1200), strict=False)
    ]
    return dataclasses.replace(
        window,
        plan=plan,
        arm=plan.decode,
        prefill_steps=dataclasses.replace(prefill, time_s=prefill.time_s * slower[0]),
        decode_steps=dataclasses.replace(decode, time_s=decode.time_s * slower[1]),
    )


def _switch_timing(windows: list[Window]) -> Timing:
    """Two changes, each told to a tuner, whose end is emptied meanwhile."""
    with tempfile.TemporaryDirectory(prefix="agft-bench-") as directory:
        path = phase_path(Path(directory) / "leases", "bench")
        switch, bell = LiveSwitch(), Doorbell()
        bell.listen(path)
        switch.connect(path)

        def step(window: Window) -> None:
            switch.on_arrival()
            switch.on_step(0)

        timing = _timing(
            "switch: an arrival and a step, both told to the tuner",
            step,
            windows,
            between=lambda: bell.wait(0.0),
        )
        bell.close()
    return timing


def versions() -> str:
    """What the timings depend on."""
    return f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}"


def _timing(
    what: str,
    step: Callable[[Window], None],
    windows: list[Window],
    between: Callable[[], object] = lambda: None,
) -> Timing:
    times_ms = []
    for window in windows:
        between()
        start_s = time.perf_counter()
        step(window)
        times_ms.append((time.perf_counter() - start_s) * 1e3)
    median_ms, p99_ms = np.percentile(times_ms[WARM_UP:], [50, 99])
    return Timing(what, float(median_ms), float(p99_ms))


def _windows(seed: int) -> Iterator[Window]:
    """Random, plausible windows."""
    rng = np.random.default_rng(seed)
    while True:
        running = float(rng.uniform(1, 32))
        tokens = int(running * rng.uniform(30, 60))
        yield Window(
            start_s=0.0,
            end_s=2.0,
            arm=None,
            energy_j=float(rng.uniform(200, 600)),
            mean_power_w=float(rng.uniform(100, 300)),
            sm_clock_mhz=1230.0,
            event_reasons=EventReason.NONE,
            running=running,
            waiting=float(rng.integers(0, 2)),
            kv_cache_usage=float(rng.uniform(0, 0.5)),
            prompt_tokens=int(rng.integers(0, 4000)),
            generation_tokens=tokens,
            iterations=80,
            iteration_tokens=tokens + 2000,
            ttft_sum_s=0.5,
            ttft_count=1,
            itl_sum_s=tokens * float(rng.uniform(0.02, 0.04)),
            itl_count=tokens,
            e2e_sum_s=5.0,
            e2e_count=1,
            prefix_cache_queries=1000,
            prefix_cache_hits=int(rng.integers(0, 500)),
            preemptions=0,
            decode_steps=StepTotals(78, tokens, 1.8),
            prefill_steps=StepTotals(2, 2000, 0.2),
            unknown_steps=StepTotals(),
            request_rate_per_s=float(rng.uniform(0.1, 4)),
        )

"""Windows: engine counters, the energy counter and Ray Serve's metrics over one interval."""

from __future__ import annotations

import bisect
import functools
import itertools
import operator
from collections.abc import Sequence

from agft_ray.types import (
    COUNTERS,
    EngineCounters,
    EngineSample,
    EventReason,
    GpuSample,
    Plan,
    Rises,
    ServeWindow,
    StepTotals,
    Window,
    counters_of,
)

MAX_STRETCH = 3.0
"""A window this many times longer than asked for (a suspended host, a stuck call) is dropped."""


class WindowRejectedError(Exception):
    """The samples make no trustworthy window; the message says why."""


def close_window(
    *,
    plan: Plan,
    window_s: float,
    engine: Sequence[EngineSample],
    gpu: Sequence[GpuSample],
    serve: ServeWindow | None,
    rises: Rises | None = None,
    clock_change_s: float | None = None,
) -> Window:
    """The window between the first and the last engine sample.

    Energy is interpolated on the energy counter at those two moments, by the counter's own update
    times, so that both cover the same interval although they tick apart. Raises
    `WindowRejectedError` for fewer than two engine samples, counters that went backwards (a
    restarted engine, a reloaded driver), an energy counter that did not move, and a stretch of
    time far longer than `window_s`.
    """
    if len(engine) < 2:
        raise WindowRejectedError(f"{len(engine)} engine samples, at least 2 are needed")
    first, last = engine[0], engine[-1]
    duration_s = last.t_s - first.t_s
    if duration_s > MAX_STRETCH * window_s:
        raise WindowRejectedError(f"it lasted {duration_s:.1f} s instead of {window_s} s")
    energy_j = _energy_j(gpu, first.t_s, last.t_s)
    _check_only_grew(engine)
    counted = last - first
    reasons = {s.event_reasons for s in gpu}
    idle = {r for r in reasons if r & EventReason.GPU_IDLE}
    busy = [s for s in gpu if s.event_reasons not in idle] or gpu
    return Window(
        *counters_of(counted),
        start_s=first.t_s,
        end_s=last.t_s,
        arm=plan.decode,
        energy_j=energy_j,
        mean_power_w=energy_j / duration_s,
        sm_clock_mhz=_mean([s.sm_clock_mhz for s in busy]),
        event_reasons=functools.reduce(operator.or_, reasons),
        running=_mean([s.running for s in engine]),
        waiting=_mean([s.waiting for s in engine]),
        kv_cache_usage=_mean([s.kv_cache_usage for s in engine]),
        request_rate_per_s=serve.request_rate_per_s if serve else counted.ttft_count / duration_s,
        serve=serve,
        plan=plan,
        rises=rises or Rises(),
        clock_change_s=clock_change_s,
        gpus=gpu[-1].gpus,
    )


_NUMBERS = tuple(
    name
    for name, none in zip(COUNTERS, counters_of(EngineCounters()), strict=True)
    if not isinstance(none, StepTotals)  # whose steps are among the iterations
)
_numbers = operator.attrgetter(*_NUMBERS)


def _check_only_grew(samples: Sequence[EngineSample]) -> None:
    for before, after in itertools.pairwise(map(_numbers, samples)):
        if any(map(operator.lt, after, before)):
            pairs = zip(_NUMBERS, before, after, strict=True)
            backwards = ", ".join(name for name, old, new in pairs if new < old)
            raise WindowRejectedError(f"engine counters went backwards: {backwards}")


def _energy_j(samples: Sequence[GpuSample], start_s: float, end_s: float) -> float:
    readings = sorted({s.energy_t_s: s.energy_j for s in samples}.items())
    if len(readings) < 2:
        raise WindowRejectedError("the energy counter did not move")
    if any(b[1] < a[1] for a, b in itertools.pairwise(readings)):
        raise WindowRejectedError("the energy counter went backwards")
    return _interpolate(readings, end_s) - _interpolate(readings, start_s)


def _interpolate(readings: Sequence[tuple[float, float]], t_s: float) -> float:
    """Piecewise linear, continued at the outermost slopes beyond the readings."""
    index = bisect.bisect_left(readings, (t_s,))
    index = min(max(index, 1), len(readings) - 1)
    (t0, e0), (t1, e1) = readings[index - 1], readings[index]
    return e0 + (e1 - e0) * (t_s - t0) / (t1 - t0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

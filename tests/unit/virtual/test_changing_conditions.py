"""What `phases` under the loop's rules does when load, GPU or power cap change on the way."""

from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import pytest

from agft_ray.settings import TunerConfig
from agft_ray.simulation.decode_series import DecodeCurves
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.types import EventReason
from agft_ray.virtual.replica import FleetSetup, Listeners, VirtualReplica
from agft_ray.workloads.generators import generate_conversation

PROFILE = load_gpu_profile("rtx_a6000")
STEPS = ((0.4, 400.0), (1.2, 400.0), (0.4, 400.0))
"""Requests a second, for so many seconds each."""
BEST_HEAVY, BEST_LIGHT = (1620, 1260, 210), (1500, 1260, 210)
"""`oracle_pair` at each of the loads, 400 s, 60 MHz grid, least energy."""


def arrivals(steps, seed=3):
    """Requests of one load after the other."""
    start_s, requests, numbers = 0.0, [], count()
    for rate, duration_s in steps:
        for each in generate_conversation(rate, duration_s, seed=seed):
            changes = {"arrival_s": start_s + each.arrival_s, "request_id": str(next(numbers))}
            requests.append(replace(each, **changes))
        start_s += duration_s
    return requests


@dataclass
class Came:
    """What came of a run."""

    energy_j: float
    ttft_s: float
    tpot_s: float
    e2e_s: float
    windows: list
    records: list

    @property
    def edp(self):
        return self.energy_j * self.e2e_s


def run(policy, requests, happens=lambda replica: None, happens_s=400.0):
    """One replica under a policy, with something that happens to it on the way."""
    timings, windows, records = [], [], []
    tuner = TunerConfig(policy=policy)
    setup = FleetSetup(PROFILE, "llama-3.1-8b", EngineConfig(), tuner)
    listeners = Listeners(
        lambda _, each: timings.append(each),
        windows.append,
        lambda _, record: records.append(record),
    )
    replica = VirtualReplica(setup, 0, listeners)
    for request in requests:
        if happens_s is not None and request.arrival_s > happens_s:
            replica.advance_to(happens_s)
            happens(replica)
            happens_s = None
        replica.advance_to(request.arrival_s)
        replica.submit(request)
    while not replica.drained:
        replica.advance_to(replica.clock.now_s() + 10.0)
    several = [t for t in timings if t.output_tokens > 1]
    tpot_s = np.mean([(t.e2e_s - t.ttft_s) / (t.output_tokens - 1) for t in several])
    ttft_s, e2e_s = np.mean([t.ttft_s for t in timings]), np.mean([t.e2e_s for t in timings])
    return Came(replica.energy_j, ttft_s, tpot_s, e2e_s, windows, records)


def keeps_bounds(came, default):
    names = ("ttft_s", "tpot_s", "e2e_s")
    return all(getattr(came, name) < 1.10 * getattr(default, name) for name in names)


def capped_at(watts):
    """The GPU gets another power cap."""

    def change(replica):
        device = replica._device
        device._apply_clock(device._state.active_lock_mhz)  # what was done until now, at the old
        device.profile = PROFILE.with_values({"power.cap_w": watts})
        device._curves, device._end_s = DecodeCurves(device.profile, device._model), None
        device._capped.clear()

    return change


def throttled(replica):
    """It becomes too hot: slower, and it says so."""
    capped_at(150.0)(replica)
    read = replica._gpu.read
    replica._gpu.read = lambda: replace(read(), event_reasons=EventReason.HW_THERMAL)


def late_j(came, start_s):
    """Energy from 60 windows after a step on."""
    late = [w for w in came.windows if start_s + 120.0 <= w.start_s < start_s + 400.0]
    return sum(window.energy_j for window in late)


def test_when_the_load_changes_bounds_are_kept_and_it_is_near_the_best_pair_again():
    requests = arrivals(STEPS)
    default, came = run({"name": "default"}, requests), run({"name": "phases"}, requests)
    assert keeps_bounds(came, default)
    assert came.energy_j < 0.7 * default.energy_j
    for start_s, clocks_mhz in ((400.0, BEST_HEAVY), (800.0, BEST_LIGHT)):
        names = ("prefill_sm_clock_mhz", "decode_sm_clock_mhz", "idle_sm_clock_mhz")
        best = run({"name": "pair", **dict(zip(names, clocks_mhz, strict=True))}, requests)
        assert late_j(came, start_s) < 1.05 * late_j(best, start_s)


@pytest.mark.parametrize(
    "happens", [capped_at(200.0), capped_at(250.0), throttled], ids=["200 W", "250 W", "hot"]
)
def test_when_the_gpu_changes_bounds_are_kept_and_edp_is_no_worse(happens):
    requests = arrivals(((0.6, 900.0),))
    default = run({"name": "default"}, requests, happens)
    came = run({"name": "phases"}, requests, happens)
    assert keeps_bounds(came, default)
    assert came.edp < 1.02 * default.edp


@pytest.mark.parametrize("policy", ["phases", "agft", "rules"])
def test_a_queue_that_grows_without_end_has_default_clocks(policy):
    requests = arrivals(((0.5, 200.0), (6.0, 120.0)))
    default, came = run({"name": "default"}, requests), run({"name": policy}, requests)
    assert came.edp < 1.02 * default.edp
    late = [r for r in came.records if 230.0 < r.t_s < 320.0]
    assert {r.decision.reason for r in late} == {"pressure"}

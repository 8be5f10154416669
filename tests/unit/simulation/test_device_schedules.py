"""Random schedules of steps, clock changes and idle gaps: energy, invariances, history."""

import json
import random
from itertools import pairwise

import pytest

from agft_ray.simulation.device import Device
from agft_ray.simulation.physics import (
    StepWork,
    busy_power_w,
    effective_sm_clock_mhz,
    idle_power_w,
    step_time_s,
)
from agft_ray.simulation.profiles import load_gpu_profile

GPUS = {name: load_gpu_profile(name) for name in ("rtx_a6000", "a100_sxm_80gb")}
GPU = GPUS["rtx_a6000"]
MODEL = GPU.model_profile("llama-3.1-8b")


def device(**options):
    return Device(GPU, MODEL, **options)


def change_s(dev):
    """When the last clock change asked for takes effect."""
    return dev.to_state()["pending_clock_changes"][-1][0]


def random_commands(seed, gpu=GPU, duration_s=20.0):
    """(time, kind, argument): steps back to back or after gaps, locks and resets in between."""
    draw = random.Random(seed)
    commands, t_s = [], 0.0
    while t_s < duration_s:
        t_s += draw.choice([0.0, 0.01, 0.3, 2.5]) * draw.random()
        kind = draw.choice(["step", "step", "step", "lock", "reset"])
        work = StepWork(draw.choice([0, 0, 700]), draw.randint(1, 200), draw.randint(0, 90_000))
        clock = draw.choice(gpu.supported_sm_clocks_mhz)
        commands.append((t_s, kind, work if kind == "step" else clock))
        t_s += 0.02
    return commands


def play(dev, commands, extra_reads=None, changes=None):
    """Run the commands as an engine and a tuner would; returns the steps' (start, end)."""
    steps = []

    def finish_by(t_s):
        if dev.step_end_s() is not None and dev.step_end_s() <= t_s:
            dev.finish_step()

    for t_s, kind, argument in commands:
        for at_s in extra_reads or []:
            if dev.t_s < at_s < t_s:
                finish_by(at_s)
                dev.advance(at_s)
        finish_by(t_s)
        if kind == "step":
            start_s = max(t_s, dev.step_end_s() or 0.0)
            finish_by(start_s)
            dev.begin_step(start_s, argument)
            steps.append((start_s, argument))
        elif kind == "lock":
            dev.lock(t_s, argument)
        else:
            dev.reset(t_s)
        if kind != "step" and changes is not None:
            clock = argument if kind == "lock" else None
            changes.append((max(t_s, dev.t_s), change_s(dev), clock))
    last_s = max(dev.step_end_s() or 0.0, commands[-1][0])
    finish_by(last_s)
    dev.advance(last_s + 3.0)
    return steps


def numerical_energy_j(gpu, steps, changes, until_s, dt_s=2e-4):
    """The energy by small steps in time, from the formulas and the times of events alone."""
    model = gpu.model_profile("llama-3.1-8b")
    # A call replaces the one before if that is not in force yet.
    in_force = [
        (at_s, clock)
        for k, (_, at_s, clock) in enumerate(changes)
        if k + 1 == len(changes) or changes[k + 1][0] >= at_s
    ]
    cache, energy_j, lock, work, done, idle_since_s = {}, 0.0, None, None, 0.0, 0.0
    steps, in_force = list(steps), list(in_force)
    for k in range(round(until_s / dt_s)):
        t_s = (k + 0.5) * dt_s
        while in_force and in_force[0][0] <= t_s:
            lock = in_force.pop(0)[1]
        if work is not None and done >= 1.0:
            work, idle_since_s = None, t_s
        if steps and steps[0][0] <= t_s:
            work, done = steps.pop(0)[1], 0.0
        target = lock or gpu.max_sm_clock_mhz
        if work is None:
            if lock is None and t_s >= idle_since_s + gpu.governor.idle_delay_s:
                target = gpu.governor.idle_sm_clock_mhz
            energy_j += idle_power_w(gpu.power, target) * dt_s
            continue
        if (work, target) not in cache:
            clock = effective_sm_clock_mhz(gpu, model, work, target)
            power_w = busy_power_w(gpu, model, work, clock)
            cache[work, target] = power_w, step_time_s(model, work, clock)
        power_w, time_s = cache[work, target]
        energy_j += power_w * dt_s
        done += dt_s / time_s
    return energy_j


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("seed", [1, 2])
def test_energy_is_the_integral_of_power(name, seed):
    gpu = GPUS[name]
    dev = Device(gpu, gpu.model_profile("llama-3.1-8b"), seed=seed, stall_grace_s=1e9)
    changes = []
    steps = play(dev, random_commands(seed, gpu), changes=changes)
    assert len(steps) > 10
    assert len(changes) > 5
    expected_j = numerical_energy_j(gpu, steps, changes, dev.t_s)
    assert dev.energy_j == pytest.approx(expected_j, rel=1e-3)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_advancing_in_many_small_calls_changes_nothing(seed):
    commands = random_commands(seed)
    whole, split = device(seed=seed), device(seed=seed)
    draw = random.Random(seed + 100)
    reads = sorted(draw.uniform(0, 15) for _ in range(2000))
    starts_s, split_starts_s = (
        [start_s for start_s, _ in play(dev, commands, extra)]
        for dev, extra in ((whole, None), (split, reads))
    )
    assert split_starts_s == pytest.approx(starts_s, rel=1e-12)
    assert split.t_s == pytest.approx(whole.t_s, rel=1e-12)
    assert split.energy_j == pytest.approx(whole.energy_j, rel=1e-9)
    for name in ("counter_t_s", "counter_energy_j"):
        assert split.to_state()[name] == pytest.approx(whole.to_state()[name], rel=1e-9)


def test_the_state_survives_json_at_any_moment():
    commands = random_commands(5)
    straight = device(seed=5)
    play(straight, commands)

    class Reloading(Device):
        def advance(self, t_s):
            self.from_state(json.loads(json.dumps(self.to_state())))
            super().advance(t_s)

    restored = Reloading(GPU, MODEL, seed=5)
    play(restored, commands, [k * 0.05 for k in range(300)])
    assert restored.energy_j == pytest.approx(straight.energy_j, rel=1e-9)
    assert restored.to_state()["clock_calls"] == straight.to_state()["clock_calls"] > 0


def test_history_covers_all_time_and_all_energy():
    segments = []
    dev = device(history=lambda *segment: segments.append(segment))
    play(dev, random_commands(3))
    assert segments[0][0] == 0.0
    assert segments[-1][1] == dev.t_s
    assert all(before[1] == after[0] for before, after in pairwise(segments))
    total_j = sum((t1 - t0) * power_w for t0, t1, _, power_w, _ in segments)
    assert total_j == pytest.approx(dev.energy_j, rel=1e-9)
    assert {type(segment[4]) for segment in segments} == {StepWork, type(None)}

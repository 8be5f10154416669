"""The engine under Ray in wall time and the one in virtual time tell the same story."""

import asyncio

import pytest
from serve_app import running_app, simulated_config, wait_until

from agft_ray.policy.baselines.fixed import FixedConfig
from agft_ray.replay.client import replay
from agft_ray.replay.summary import summarise
from agft_ray.settings import TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.virtual.run import run_virtual
from agft_ray.workloads.generators import generate_conversation

pytestmark = [pytest.mark.ray, pytest.mark.alone]
DURATION_S = 180.0
RATE_PER_S = 0.6
CLOCKS_MHZ = (1230, 1545)
SPEED = 6
TOLERANCE = 0.03


def settings(sm_clock_mhz):
    fixed = {"name": "fixed", "sm_clock_mhz": sm_clock_mhz}
    return {"mode": "control", "holdout_replicas": 0, "policy": fixed}


def in_virtual_time(sm_clock_mhz, requests, duration_s, engine):
    policy = FixedConfig(sm_clock_mhz=sm_clock_mhz)
    run = run_virtual(
        requests,
        TunerConfig(policy=policy),
        engine_config=EngineConfig(**engine),
        duration_s=duration_s,
    )
    tpots_s = [timing.tpot_s for timing in run.timings if timing.tpot_s is not None]
    return run.energy_j / run.duration_s * duration_s, sum(tpots_s) / len(tpots_s)


def test_energy_and_tpot_agree_at_fixed_clocks(directory):
    requests = list(generate_conversation(RATE_PER_S, DURATION_S, seed=0))
    arguments = {"speed": SPEED, "num_replicas": 1}
    content = simulated_config(
        directory, args=arguments, user_config=settings(CLOCKS_MHZ[0]) | {"slo": {}}
    )
    (application,) = content["applications"]
    results = []
    with running_app(directory, content) as app:
        for sm_clock_mhz in CLOCKS_MHZ:
            application["deployments"][0]["user_config"] |= settings(sm_clock_mhz)
            app.deploy(content)
            wait_until(
                lambda: [r["locked_sm_clock_mhz"] for r in app.alive()] == [sm_clock_mhz],  # noqa: B023
                30,
                f"locked at {sm_clock_mhz} MHz",
            )
            results.append(asyncio.run(replay(requests, url=app.url, duration_s=DURATION_S)))

    engine = application["args"]["engine"]
    for sm_clock_mhz, result in zip(CLOCKS_MHZ, results, strict=True):
        assert [row.status for row in result.rows] == ["ok"] * len(requests)
        (group,) = summarise(result).groups
        (first,), (last,) = result.timeline[0].replicas, result.timeline[-1].replicas
        duration_s = last.energy_t_s - first.energy_t_s
        energy_j = last.energy_j - first.energy_j
        expected_j, tpot_s = in_virtual_time(sm_clock_mhz, requests, duration_s, engine)
        print(
            f"{sm_clock_mhz} MHz, {duration_s:.0f} s: {energy_j:.0f} J in wall time, "
            f"{expected_j:.0f} J in virtual; TPOT {group.tpot_s.mean * 1e3:.2f} and "
            f"{tpot_s * 1e3:.2f} ms"
        )
        assert energy_j == pytest.approx(expected_j, rel=TOLERANCE)
        assert group.tpot_s.mean == pytest.approx(tpot_s, rel=TOLERANCE)

"""The engine under Ray in wall time and the one in virtual time tell the same story."""

import asyncio

import pytest
from serve_app import running_app, simulated_config, wait_until

from agft_ray.replay.client import replay
from agft_ray.replay.summary import summarise
from agft_ray.settings import TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.virtual.run import run_virtual
from agft_ray.workloads.generators import generate_conversation

pytestmark = [pytest.mark.ray, pytest.mark.alone]
DURATION_S = 180.0
RATE_PER_S = 0.6
FIXED = [{"name": "fixed", "sm_clock_mhz": clock} for clock in (1230, 1545)]
PAIR = {"name": "pair", "prefill_sm_clock_mhz": 1545, "decode_sm_clock_mhz": 1230}
PLANS = ([1230] * 3, [1545] * 3, [1545, 1230, 210])
SPEED = 6
TOLERANCE = 0.03
CHANGES_TOLERANCE = 0.1
"""Of clock changes: a switch that comes late passes over what is over by then."""


def settings(policy):
    return {"mode": "control", "holdout_replicas": 0, "policy": policy}


def in_virtual_time(policy, requests, duration_s, engine):
    return run_virtual(
        requests,
        TunerConfig.model_validate({"policy": policy}),
        engine_config=EngineConfig(**engine),
        duration_s=duration_s,
    )


def test_energy_and_tpot_agree_at_fixed_clocks_and_where_they_are_switched(directory):
    requests = list(generate_conversation(RATE_PER_S, DURATION_S, seed=0))
    arguments = {"speed": SPEED, "num_replicas": 1}
    content = simulated_config(
        directory, args=arguments, user_config=settings(FIXED[0]) | {"slo": {}}
    )
    (application,) = content["applications"]
    results = []
    with running_app(directory, content) as app:
        for policy, plan in zip((*FIXED, PAIR), PLANS, strict=True):
            application["deployments"][0]["user_config"] |= settings(policy)
            app.deploy(content)
            wait_until(
                lambda: [list(r.get("plan", ())) for r in app.alive()] == [plan],  # noqa: B023
                30,
                f"the plan {plan}",
            )
            results.append(asyncio.run(replay(requests, url=app.url, duration_s=DURATION_S)))

        (status,) = app.alive()
    engine = application["args"]["engine"]
    for policy, result in zip((*FIXED, PAIR), results, strict=True):
        assert [row.status for row in result.rows] == ["ok"] * len(requests)
        (group,) = summarise(result).groups
        (first,), (last,) = result.timeline[0].replicas, result.timeline[-1].replicas
        duration_s = last.energy_t_s - first.energy_t_s
        energy_j = last.energy_j - first.energy_j
        run = in_virtual_time(policy, requests, duration_s, engine)
        expected_j = run.energy_j / run.duration_s * duration_s
        tpots_s = [timing.tpot_s for timing in run.timings if timing.tpot_s is not None]
        tpot_s = sum(tpots_s) / len(tpots_s)
        print(
            f"{policy}, {duration_s:.0f} s: {energy_j:.0f} J in wall time, "
            f"{expected_j:.0f} J in virtual; TPOT {group.tpot_s.mean * 1e3:.2f} and "
            f"{tpot_s * 1e3:.2f} ms"
        )
        assert energy_j == pytest.approx(expected_j, rel=TOLERANCE)
        assert group.tpot_s.mean == pytest.approx(tpot_s, rel=TOLERANCE)
    # The last one is the pair: its clocks changed as often as in virtual time.
    assert status["phase_changes"] > len(requests), "a prompt or two at a time"
    assert status["phase_changes"] == pytest.approx(run.clock_changes, rel=CHANGES_TOLERANCE)

"""Changes at equal work: what is known beforehand is found, whatever else differs."""

from itertools import pairwise

import numpy as np
import pytest

from agft_ray.replay.equal_work import BLOCK_S, MIN_BLOCKS, figures_of, needed
from agft_ray.replay.result import ReplicaStatus, RequestRow
from agft_ray.results.spread import t_quantile

DURATION_S = 40 * BLOCK_S
LATENCIES = {"e2e_s": lambda row: row.e2e_s}


def row(t_s, prompt, output, e2e_s):
    return RequestRow("r", t_s, 0.0, "ok", 0, prompt, output, e2e_s=e2e_s)


def rows(rng, count, *, factor=1.0, prompt=1000.0, noise=0.0, duration_s=DURATION_S, waits=None):
    """Requests whose latency is linear in their lengths, times a factor; `waits` by block."""
    found = []
    for t_s in rng.uniform(0, duration_s, count):
        p, o = int(rng.exponential(prompt)), int(rng.exponential(200))
        more = 0.0 if waits is None else waits[int(t_s / BLOCK_S)]
        e2e_s = factor * (0.1 + 2e-4 * p + 0.025 * o + more) * (1 + noise * rng.normal())
        found.append(row(t_s, p, o, e2e_s))
    return found


def changes(tuned, holdout, *, duration_s=DURATION_S, intervals=((), ())):
    figures = figures_of(
        dict(zip("th", (tuned, holdout), strict=True)),
        dict(zip("th", intervals, strict=True)),
        LATENCIES,
        roles=("t", "h"),
        started_s=0.0,
        duration_s=duration_s,
    )
    return figures.changes_percent()


def test_other_lengths_are_no_change():
    rng = np.random.default_rng(1)
    tuned, holdout = rows(rng, 400, factor=1.08, prompt=1300), rows(rng, 200, prompt=900)
    plain = np.mean([r.e2e_s for r in tuned]) / np.mean([r.e2e_s for r in holdout])
    change = changes(tuned, holdout)["e2e_s.mean"]
    assert abs(100 * (plain - 1) - 8.0) > 2.0, "lengths make a difference"
    assert change.mean == pytest.approx(8.0, abs=1e-6)
    assert change.half_width == pytest.approx(0.0, abs=1e-6)


def test_the_interval_is_that_of_chance():
    rng = np.random.default_rng(2)
    same = {"prompt": 1.0, "noise": 0.2}  # hardly any prompt; lengths of answers are matched
    change = changes(rows(rng, 3000, **same), rows(rng, 1500, **same))["e2e_s.mean"]
    # Relative noise: longer requests weigh more, by E[x²]/E[x]², 2 of an exponential.
    expected = 100 * 0.2 * np.sqrt(2 / 3000 + 2 / 1500) * t_quantile(39)
    assert change.half_width == pytest.approx(expected, rel=0.3)
    assert abs(change.mean) < 1.5 * change.half_width


def test_requests_that_wait_together_count_for_less():
    def half_width(waits):
        rng = np.random.default_rng(3)
        tuned, holdout = rows(rng, 600, waits=waits), rows(rng, 300)
        return changes(tuned, holdout)["e2e_s.mean"].half_width

    waits = np.random.default_rng(4).exponential(5.0, 40)
    by_block = half_width(waits)
    # As many requests, each with a wait of its own, would tell its mean to within this.
    mean_s = 0.1 + 0.2 + 5.0 + 5.0
    alone = 100 * t_quantile(39) * 5.0 / mean_s / np.sqrt(600)
    assert by_block > 2 * alone


def test_percentiles_need_requests_beyond_them():
    rng = np.random.default_rng(5)
    tuned, holdout = rows(rng, 1200, factor=1.1), rows(rng, 1200)
    found = changes(tuned, holdout)
    assert list(found) == ["e2e_s.mean", "e2e_s.p50", "e2e_s.p95", "e2e_s.p99"]
    assert (needed(0.5), needed(0.95), needed(0.99)) == (20, 200, 1000)
    for name in ("e2e_s.p50", "e2e_s.p95", "e2e_s.p99"):
        assert abs(found[name].mean - 10.0) < found[name].half_width
    assert found["e2e_s.p50"].half_width < 5.0, "by tenths of lengths; 7 by their means alone"
    assert list(changes(tuned, holdout[:250])) == ["e2e_s.mean", "e2e_s.p50", "e2e_s.p95"]


def test_no_interval_of_a_short_run():
    rng = np.random.default_rng(6)
    short_s = (MIN_BLOCKS - 1) * BLOCK_S
    tuned, holdout = (rows(rng, 50, factor=f, duration_s=short_s) for f in (1.08, 1.0))
    change = changes(tuned, holdout, duration_s=short_s)["e2e_s.mean"]
    assert (change.mean, change.half_width) == (pytest.approx(8.0), None)


def sightings(replica, role, rates, *, watts):
    """A replica seen every 5 s, at so many tokens per second of prompts and answers by block."""
    t_s = energy_j = prompt = output = 0.0
    found = []
    while t_s <= DURATION_S:
        known = {"energy_j": energy_j, "energy_t_s": t_s, "prompt_tokens": round(prompt)}
        load = {"running": 0, "waiting": 0, "generation_tokens": round(output)}
        found.append(
            ReplicaStatus(replica=replica, role=role, t_s=t_s, sm_clock_mhz=1, **known, **load)
        )
        p, o = rates[min(int((t_s + 2.5) / BLOCK_S), 39)]
        t_s, prompt, output = t_s + 5.0, prompt + 5 * p, output + 5 * o
        energy_j += 5 * watts(p, o)
    return list(pairwise(found))


def test_energy_is_compared_at_the_same_load():
    rng = np.random.default_rng(7)

    def fleet(names, role, load, factor):
        found = []
        for name in names:
            rates = load * rng.uniform(50, 150, (40, 2)).round()
            watts = lambda p, o: factor * (100.0 + 0.1 * p + 0.5 * o)  # noqa: E731
            found += sightings(name, role, rates, watts=watts)
        return found

    intervals = fleet("ab", "tuned", 1.0, 0.6), fleet("c", "holdout", 1.2, 1.0)
    requests = rows(rng, 400, factor=1.1), rows(rng, 200)
    found = changes(*requests, intervals=intervals)
    assert found["energy_per_output_token_j"].mean == pytest.approx(-40.0, abs=0.05)
    assert found["edp_per_output_token_j_s"].mean == pytest.approx(-34.0, abs=0.05)
    assert found["edp_per_output_token_j_s"].half_width < 0.2


def test_what_cannot_be_compared_is_left_out():
    rng = np.random.default_rng(8)
    assert changes(rows(rng, 30), []) == {}
    alike = [row(float(t), 100, 10, 2.0) for t in range(100)]
    slower = [row(float(t), 100, 10, 2.2) for t in range(100)]
    change = changes(slower, alike)["e2e_s.mean"]
    assert change.mean == pytest.approx(10.0), "lengths that do not vary need no matching"
    unstated = [row(float(t), None, None, 2.0) for t in range(100)]
    assert changes(slower, unstated)["e2e_s.mean"].mean == pytest.approx(10.0)

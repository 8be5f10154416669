"""Each ablated policy runs, and differs from the whole one in what was taken out of it."""

import importlib.util

import numpy as np
import pytest

from agft_ray.settings import TunerConfig
from agft_ray.virtual.run import run_virtual
from agft_ray.workloads.requests import Request

REQUESTS = [Request(f"r{i}", 1.5 * i, 600, 60) for i in range(120)]


@pytest.fixture
def clocks_of(request, monkeypatch):
    """The clocks for prefill and decode that a policy chooses, by window (windows, 2)."""
    monkeypatch.syspath_prepend(request.config.rootpath / "examples")
    assert importlib.util.find_spec("policy_ablations")

    def run(policy):
        records = run_virtual(REQUESTS, TunerConfig(policy=policy)).records
        plans = [record.decision.chosen.arms[:2] for record in records]
        return np.array([[clock or 2100 for clock in plan] for plan in plans])

    return run


@pytest.mark.parametrize("name", ["NoSafeWalk", "NoInterference", "NoLag"])
def test_it_walks_down_in_its_own_way(clocks_of, name):
    whole = clocks_of({"name": "phases"})
    ablated = clocks_of({"class": f"policy_ablations:{name}"})
    assert ablated[:, 1].min() < 1600
    assert ablated.tolist() != whole.tolist()


def test_without_the_safe_walk_steps_are_larger(clocks_of):
    whole = clocks_of({"name": "phases"})
    ablated = clocks_of({"class": "policy_ablations:NoSafeWalk"})
    assert np.diff(ablated[:, 1]).min() < np.diff(whole[:, 1]).min() < 0

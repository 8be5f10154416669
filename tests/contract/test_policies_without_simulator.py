"""Policies get plain frozen values: pickled windows lead to the same choices in a process in which
the simulator cannot be imported."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from replayed import replay
from test_policy_contract import ARMS, CONFIGS, window

import agft_ray
from agft_ray.policy.baselines.volta import VoltaConfig
from agft_ray.policy.step import StepSample

SCRIPT = Path(__file__).with_name("replayed.py")
GOVERNORS = [VoltaConfig(tpot_slo_s=0.06, ttft_slo_s=0.5)]


def recorded_windows(count, seed=0):
    """One after another, at default clocks to begin with, then at a clock each."""
    rng, windows = np.random.default_rng(seed), []
    for i in range(count):
        arm = None if i < 12 else int(rng.choice(ARMS[::6]))
        changes = {"start_s": 0.8 * i, "end_s": 0.8 * (i + 1), "arm": arm}
        windows.append(replace(window(rng), **changes))
    return windows


def recorded_steps(count, seed=0):
    rng, steps, t_s = np.random.default_rng(seed), [], 0.0
    for _ in range(count):
        prefill = int(rng.integers(1, 2000)) if rng.random() < 0.1 else 0
        decode, clock = int(rng.integers(1, 60)), int(rng.choice(ARMS[50:]))
        step = StepSample(t_s, prefill, decode, 500 * decode, int(rng.integers(0, 3)), 0.2)
        duration_s = 0.01 + (15 + 0.4 * decode + 0.3 * prefill) / clock
        steps.append((step, duration_s, clock))
        t_s += duration_s
    return steps


@pytest.fixture(scope="module")
def record():
    return {
        "arms": ARMS,
        "windows": recorded_windows(150),
        "steps": recorded_steps(600),
        "policies": list(CONFIGS.items()),
        "governors": [(config.name, config) for config in GOVERNORS],
    }


def test_choices_need_no_simulator(record, tmp_path):
    path = tmp_path / "record.pickle"
    path.write_bytes(pickle.dumps(record))
    command = [sys.executable, str(SCRIPT), str(path), "blocked"]
    package = str(Path(agft_ray.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": package}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["simulator"] == []
    assert not answer["importable"]
    here = replay(record)
    assert answer["choices"] == json.loads(json.dumps(here))
    learners = {"agft", "agft_reference", "rules", "activity", "pid", "predictive"}
    for name in learners:
        assert len({arm for arm, *_ in here[name]}) > 1, f"{name} never changed its mind"
    assert len(set(here["volta"])) > 1

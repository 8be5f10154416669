"""Run by test_policies_without_simulator.py, in a process of its own: pickled windows and steps
are replayed to every policy and governor, and the choices are printed as JSON.

With the argument `blocked`, importing anything of the simulator is an error.
"""

import importlib
import json
import pickle
import sys
from importlib.abc import MetaPathFinder


class NoSimulator(MetaPathFinder):
    """Refuses to find the simulator."""

    def find_spec(self, name, path=None, target=None):
        if name == "agft_ray.simulation" or name.startswith("agft_ray.simulation."):
            raise ImportError(f"{name} is blocked: a policy sees plain values only")


def replay_policy(config, windows, arms):
    """What the loop does with each window: hand it over, then ask for the next clock."""
    from agft_ray.policy.registry import build_policy
    from agft_ray.policy.reward import Reward
    from agft_ray.telemetry.features import extract
    from agft_ray.types import Outcome

    policy, reward, choices = build_policy(config), Reward(), []
    for window in windows:
        context = extract(window)
        outcome = Outcome(window.arm, window.arm, context, reward(window), window)
        policy.update(outcome)
        decision = policy.select(context, arms)
        choices.append([decision.arm, decision.reason, policy.select_idle(arms).arm])
    return choices


def replay_governor(config, steps, arms):
    """Each step with its duration and clock."""
    from agft_ray.policy.registry import build_governor

    governor, choices = build_governor(config), []
    for step, duration_s, sm_clock_mhz in steps:
        choices.append(governor.choose(step, arms))
        governor.observe(step, duration_s=duration_s, sm_clock_mhz=sm_clock_mhz)
    return choices


def replay(record):
    """The choices of everything that a record names."""
    arms = record["arms"]
    policies = {name: replay_policy(c, record["windows"], arms) for name, c in record["policies"]}
    governors = {name: replay_governor(c, record["steps"], arms) for name, c in record["governors"]}
    return policies | governors


if __name__ == "__main__":
    if sys.argv[2:] == ["blocked"]:
        sys.meta_path.insert(0, NoSimulator())
    with open(sys.argv[1], "rb") as file:
        result = replay(pickle.load(file))
    simulator = [name for name in sys.modules if name.startswith("agft_ray.simulation")]
    try:
        importlib.import_module("agft_ray.simulation")
        importable = True
    except ImportError:
        importable = False
    print(json.dumps({"choices": result, "simulator": simulator, "importable": importable}))

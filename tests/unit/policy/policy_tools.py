"""Builders that tests of policies share."""

from agft_ray.policy.registry import build_policy
from agft_ray.types import Context, Outcome

ARMS = tuple(range(210, 2101, 15))
CONTEXT = Context((1.0,) + (0.0,) * 8, 1)


def outcome(window, requested, observed="same"):
    """A window at a clock; the reward is of no interest to policies that compute their own."""
    arm = requested if observed == "same" else observed
    return Outcome(requested, arm, CONTEXT, 0.0, window)


def choice(policy, arms=ARMS):
    return policy.select(CONTEXT, arms).arm


def drive(config, plant, windows):
    """Close the loop: `plant(clock)` is the window that a clock leads to. Returns the clocks."""
    policy, clocks = build_policy(config), []
    for _ in range(windows):
        clocks.append(choice(policy))
        policy.update(outcome(plant(clocks[-1]), clocks[-1]))
    return clocks

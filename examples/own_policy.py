"""A policy of your own: `python examples/own_policy.py` runs it on a simulated GPU.

In a config it is `policy: {class: "own_policy:QueuePolicy", settings: {low_mhz: 1200}}`, with this
file's folder on PYTHONPATH of every node.
"""

import sys
from collections.abc import Sequence

from agft_ray import Context, Decision, Outcome, Policy


class QueuePolicy(Policy):
    """Top clocks while requests wait, one low clock while none do."""

    def __init__(self, low_mhz: int = 1200) -> None:
        self.low_mhz, self.waiting = low_mhz, 0.0

    def update(self, outcome: Outcome) -> None:
        self.waiting = outcome.window.waiting

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        if self.waiting > 0:
            return Decision(max(arms), "queue")
        return Decision(min(arms, key=lambda clock: abs(clock - self.low_mhz)), "calm")


if __name__ == "__main__":
    from agft_ray.cli import main

    mine = "own_policy:QueuePolicy"
    policies = ["--policy", mine, "--policy", f"{mine}:low_mhz=900"]
    sys.exit(main(["simulate", "--duration", "300", *policies, *sys.argv[1:]]))

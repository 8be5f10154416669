"""Constant clocks by what the engine does."""

import pytest

from agft_ray.policy.baselines.pair import PairConfig
from agft_ray.policy.registry import build_policy
from agft_ray.types import Context, Plan
from unit.policy.policy_tools import ARMS

CONTEXT = Context((1.0,), 1)


def make(idle="lowest"):
    return build_policy(
        PairConfig(prefill_sm_clock_mhz=1500, decode_sm_clock_mhz=1244, idle_sm_clock_mhz=idle)
    )


def test_it_is_one_plan_of_supported_clocks_busy_or_empty():
    decision = make().select(CONTEXT, ARMS)
    assert decision == make().select_idle(ARMS)
    assert (decision.chosen, decision.arm) == (Plan(1500, 1230, 210), 1230)
    assert make().select(CONTEXT, [300, 600]).chosen == Plan(600, 600, 300)
    assert make().select(CONTEXT, ()).chosen == Plan.of(None)


@pytest.mark.parametrize(
    ("idle", "chosen"), [("lowest", 210), ("default", None), (1244, 1230), (100, 210)]
)
def test_the_clock_while_empty(idle, chosen):
    assert make(idle).select(CONTEXT, ARMS).chosen.idle == chosen
    assert make(idle).select_idle(()).chosen == Plan.of(None)
    assert make(idle).status()["idle_sm_clock_mhz"] == idle

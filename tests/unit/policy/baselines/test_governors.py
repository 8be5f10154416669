"""Step governors on a machine whose latency law is known."""

from itertools import pairwise

import pytest
from pydantic import TypeAdapter, ValidationError

from agft_ray.policy.baselines.volta import VoltaConfig
from agft_ray.policy.registry import GovernorConfig, build_governor
from agft_ray.policy.step import StepSample
from unit.policy.policy_tools import ARMS

LEVELS = [1050, 1260, 1470, 1680, 1890, 2100]
VOLTA = VoltaConfig(tpot_slo_s=0.04, ttft_slo_s=0.5)


def sample(t_s=0.0, prefill=0, decode=8, context=8000, waiting=0):
    return StepSample(t_s, prefill, decode, context, waiting, 0.1)


def law(step, clock):
    """Step time in s, affine in tokens and context for either phase, and in 1/f."""
    if step.has_prefill:
        return 0.01 + (20 + 0.3 * (step.prefill_tokens + step.decode_sequences)) / clock
    memory_s = 0.010 + 2e-7 * step.context_tokens
    return memory_s + (15 + 0.4 * step.decode_sequences) / clock


class Machine:
    """Runs steps back to back at the clock chosen last."""

    def __init__(self, config, arms=ARMS):
        self.governor, self.arms = build_governor(config), arms
        self.t_s, self.log = 0.0, []

    def run(self, steps, **load):
        for _ in range(steps):
            step = sample(self.t_s, **load)
            clock = self.governor.choose(step, self.arms)
            duration_s = law(step, clock)
            self.governor.observe(step, duration_s=duration_s, sm_clock_mhz=clock)
            self.log.append((self.t_s, clock, duration_s))
            self.t_s += duration_s
        return self

    @property
    def clocks(self):
        return [clock for _, clock, _ in self.log]


def lowest_in_time(bound_s, **load):
    return next((c for c in LEVELS if law(sample(**load), c) <= bound_s), LEVELS[-1])


# -- volta ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load",
    [{"decode": 4}, {"decode": 40}, {"decode": 80, "context": 40_000}, {"prefill": 900},
     {"prefill": 1800}, {"prefill": 300, "waiting": 3}],
)  # fmt: skip
def test_after_learning_it_picks_the_lowest_clock_in_time(load):
    machine = Machine(VOLTA)
    for _ in range(60):
        machine.run(30, decode=4).run(30, decode=80, context=40_000)
        machine.run(3, prefill=300).run(3, prefill=1500)
    machine.run(40, **load)
    bound_s = 0.9 * (0.5 / (1 + load.get("waiting", 0)) if "prefill" in load else 0.04)
    best = lowest_in_time(bound_s, **load)
    assert LEVELS[0] <= best <= LEVELS[-1]
    assert set(machine.clocks[-20:]) == {best}


def test_the_loads_of_that_test_need_different_clocks():
    assert lowest_in_time(0.036, decode=4) == 1050
    assert lowest_in_time(0.036, decode=40) == 1470
    assert lowest_in_time(0.036, decode=80, context=40_000) == 2100
    assert lowest_in_time(0.45, prefill=900) == 1050
    assert lowest_in_time(0.45, prefill=1800) == 1470
    assert lowest_in_time(0.45 / 4, prefill=300, waiting=3) == 1260


def test_it_goes_down_one_clock_at_a_time_and_only_as_far_as_it_has_measured():
    machine = Machine(VOLTA).run(400, decode=4)
    clocks = machine.clocks
    assert clocks[:20] == [2100] * 20
    assert sorted(set(clocks), reverse=True) == LEVELS[::-1]
    for before, after in pairwise(clocks):
        assert LEVELS.index(before) - LEVELS.index(after) <= 1
    for level in LEVELS[1:]:
        assert clocks.index(LEVELS[LEVELS.index(level) - 1]) >= clocks.index(level) + 20


def test_nothing_late_is_tried_on_the_way():
    machine = Machine(VOLTA).run(600, decode=40)
    assert all(duration_s <= 0.04 for _, _, duration_s in machine.log)


def test_the_clock_falls_only_a_while_after_a_change_and_rises_at_once():
    config = VoltaConfig(tpot_slo_s=0.04, ttft_slo_s=0.5, min_dwell_s=1.0)
    machine = Machine(config)
    for _ in range(100):
        machine.run(40, decode=4).run(2, prefill=1500)
    start = len(machine.log)
    for _ in range(20):
        machine.run(4, decode=4).run(1, prefill=1500)
    changed_s = -1.0
    falls = rises = 0
    for (_, before, _), (t_s, after, _) in pairwise(machine.log):
        if after < before:
            assert t_s - changed_s >= 1.0
        if after != before:
            changed_s = t_s
    for (_, before, _), (_, after, _) in pairwise(machine.log[start:]):
        falls, rises = falls + (after < before), rises + (after > before)
    assert falls + rises <= 2 * (machine.t_s - machine.log[start][0]) + 2


def test_without_a_ttft_bound_prefill_runs_at_the_highest_clock():
    machine = Machine(VoltaConfig(tpot_slo_s=0.04)).run(300, prefill=500)
    assert set(machine.clocks) == {2100}


def test_what_cannot_be_in_time_runs_at_the_highest_clock():
    machine = Machine(VoltaConfig(tpot_slo_s=0.005)).run(200, decode=4)
    assert set(machine.clocks) == {2100}


def test_steps_in_which_the_clock_changed_teach_nothing_unless_they_are_long():
    governor = build_governor(VOLTA)
    step = sample(5.0)
    governor.choose(step, ARMS)  # the first choice is a change
    governor.observe(step, duration_s=0.03, sm_clock_mhz=1400)
    assert governor.status()["decode_steps"] == 0
    governor.observe(sample(5.03), duration_s=0.03, sm_clock_mhz=2100)
    assert governor.status()["decode_steps"] == 1
    governor.observe(sample(5.0, prefill=900), duration_s=0.2, sm_clock_mhz=2100)
    assert governor.status()["prefill_steps"] == 1


CONFIGS = [VOLTA]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_settings_determine_everything_and_choices_are_supported(config):
    runs = [Machine(config).run(50, decode=4).run(5, prefill=700).run(50, decode=4) for _ in "ab"]
    assert runs[0].log == runs[1].log
    assert set(runs[0].clocks) <= set(ARMS)
    for arms in ([], [1200], [210, 2100], [3000, 4000]):
        for choice in (runs[0].governor.choose(sample(), arms), runs[0].governor.choose_idle(arms)):
            assert choice is None if not arms else choice in arms


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("bad", [{"duration_s": 0.0}, {"duration_s": float("nan")},
                                 {"duration_s": float("inf")}, {"sm_clock_mhz": 0}])  # fmt: skip
def test_an_impossible_observation_is_refused_and_changes_nothing(config, bad):
    machine = Machine(config).run(30)
    before = machine.governor.status()
    with pytest.raises(ValueError, match="finite and above 0"):
        machine.governor.observe(sample(99.0), **({"duration_s": 0.03, "sm_clock_mhz": 1200} | bad))
    assert machine.governor.status() == before


def test_the_name_chooses_the_governor():
    adapter = TypeAdapter(GovernorConfig)
    settings = {"name": "volta", "tpot_slo_s": 0.05, "clock_shares": [0.4, 1.0]}
    governor = build_governor(adapter.validate_python(settings))
    assert governor.name == "volta"
    for wrong in ({"name": "agft"}, {"name": "pair"}, {"name": "volta"}, settings | {"x": 1}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)

"""Long prompts: a clock too low for them must not look cheap, for windows without a second token
are many there. Two workloads on which the policy once parked at such clocks."""

import pytest

from agft_ray.policy.agft.config import AgftConfig
from agft_ray.policy.baselines.default import DefaultConfig
from agft_ray.study.policy_specs import PolicySpec
from agft_ray.study.run import Job, perform
from agft_ray.study.scenario import Scenario


@pytest.mark.parametrize(
    ("prompt_tokens", "output_tokens", "rate_per_s", "seed"),
    [(12_000, 400, 0.12, 3), (16_000, 30, 0.05, 0)],
)
def test_edp_is_better_than_at_default_clocks(prompt_tokens, output_tokens, rate_per_s, seed):
    lengths = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "length_sigma": 0.8}
    scenario = Scenario(
        workload="poisson", rate_per_s=rate_per_s, duration_s=1800.0, parameters=lengths
    )
    learned, default = (
        perform(Job(scenario, PolicySpec("", settings), seed), lambda t_s: None).record
        for settings in (AgftConfig(), DefaultConfig())
    )
    assert learned.edp_j_s < 0.9 * default.edp_j_s
    assert learned.ttft_s.mean < 2 * default.ttft_s.mean

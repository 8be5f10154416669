import pytest
from pydantic import TypeAdapter, ValidationError

from agft_ray.config import parse
from agft_ray.errors import ConfigError
from agft_ray.policy.agft.policy import AgftConfig
from agft_ray.policy.registry import PolicyConfig, build_policy
from agft_ray.types import Context

ADAPTER = TypeAdapter(PolicyConfig)
ARMS = tuple(range(210, 2101, 15))
CONTEXT = Context((1.0,) + (0.5,) * 8, 1)


@pytest.mark.parametrize(
    ("settings", "chosen", "idle"),
    [
        ({"name": "default"}, None, None),
        ({"name": "fixed", "sm_clock_mhz": 1244}, 1230, 1230),
        ({"name": "fixed", "sm_clock_mhz": 100}, 210, 210),
        ({"name": "agft"}, None, 210),
    ],
)
def test_the_name_chooses_the_policy(settings, chosen, idle):
    policy = build_policy(ADAPTER.validate_python(settings))
    assert policy.name == settings["name"]
    assert policy.select(CONTEXT, ARMS).arm == chosen
    assert policy.select_idle(ARMS).arm == idle


@pytest.mark.parametrize(
    "settings",
    [{"name": "nosuch"}, {"name": "fixed"}, {"name": "default", "seed": 1}, {"seed": 1}],
)
def test_other_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(settings)


def test_a_prior_too_light_to_replace_the_baseline_is_refused():
    with pytest.raises(ConfigError, match="prior_windows 5 "):
        parse(AgftConfig, {"prior_windows": 5.0}, source="test")

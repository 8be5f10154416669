"""A person's own policy, by import path or entry point."""

import pickle

import pytest
from pydantic import ValidationError

from agft_ray import Decision, Policy
from agft_ray.config import StrictModel
from agft_ray.errors import ConfigError
from agft_ray.policy import imported
from agft_ray.policy.registry import build_policy
from agft_ray.settings import TunerConfig
from agft_ray.study.policy_specs import parse_policy
from unit.policy.policy_tools import ARMS, CONTEXT


class Lowest(Policy):
    """Gives what must be given, and no more."""

    def __init__(self, above_mhz: int = 0) -> None:
        self.above_mhz = above_mhz

    def select(self, context, arms):
        return Decision(min(arm for arm in arms if arm >= self.above_mhz), "lowest")

    def update(self, outcome):
        pass


class WithSettings(Lowest):
    class Settings(StrictModel):
        above_mhz: int = 300

    def __init__(self, settings):
        super().__init__(settings.above_mhz)


class Unfinished(Policy):
    def select(self, context, arms):
        return Decision(None, "none")


class NoPolicy:
    def select(self, context, arms):
        return Decision(None, "none")

    update = select


LOWEST = f"{__name__}:Lowest"


def config(**policy):
    return TunerConfig.model_validate({"policy": policy})


def chosen(tuner_config):
    return build_policy(tuner_config.policy).select(CONTEXT, ARMS).arm


def test_by_import_path():
    assert chosen(config(**{"class": LOWEST})) == min(ARMS)
    above = config(**{"class": LOWEST, "settings": {"above_mhz": 1000}})
    assert chosen(above) == min(arm for arm in ARMS if arm >= 1000)
    assert above.policy.name == LOWEST


def test_a_model_of_settings_is_made():
    mine = f"{__name__}:WithSettings"
    assert chosen(config(**{"class": mine})) == min(arm for arm in ARMS if arm >= 300)
    with pytest.raises(ValidationError, match=r"abov_mhz: .*'above_mhz'"):
        config(**{"class": mine, "settings": {"abov_mhz": 5}})


def test_the_settings_travel():
    mine = config(**{"class": LOWEST, "settings": {"above_mhz": 1000}})
    assert pickle.loads(pickle.dumps(mine)) == mine
    assert TunerConfig.model_validate(mine.model_dump()) == mine
    assert TunerConfig.model_validate_json(mine.model_dump_json()) == mine


def test_by_entry_point(monkeypatch):
    monkeypatch.setattr(imported, "entry_points", lambda: {"lowest": LOWEST})
    monkeypatch.setattr("agft_ray.study.policy_specs.entry_points", imported.entry_points)
    mine = config(name="lowest", above_mhz=1000)
    assert chosen(mine) == min(arm for arm in ARMS if arm >= 1000)
    assert parse_policy("lowest:above_mhz=1000").settings == mine.policy


def test_on_the_command_line():
    spec = parse_policy(f"{LOWEST}:above_mhz=1000")
    assert spec.settings == config(**{"class": LOWEST, "settings": {"above_mhz": 1000}}).policy
    assert spec.label == f"{LOWEST}:above_mhz=1000"
    assert parse_policy(LOWEST).settings.settings == {}


@pytest.mark.parametrize(
    ("path", "settings", "problem"),
    [
        ("no_such_package.mod:Mine", {}, "no_such_package.*cannot be imported"),
        (f"{__name__}:Missing", {}, "cannot be imported"),
        (f"{__name__}:NoPolicy", {}, r"agft_ray\.Policy"),
        (f"{__name__}:ARMS", {}, r"agft_ray\.Policy"),
        (f"{__name__}:Unfinished", {}, "lacks update"),
        (LOWEST, {"below_mhz": 1}, "unexpected keyword argument 'below_mhz'"),
        ("nonsense", {}, "should match pattern"),
    ],
)
def test_what_is_wrong_is_named(path, settings, problem):
    with pytest.raises(ValidationError, match=problem):
        config(**{"class": path, "settings": settings})


def test_an_unknown_name_is_still_explained():
    with pytest.raises(ConfigError, match=r"'agtf'.* 'agft'"):
        parse_policy("agtf")
    with pytest.raises(ValidationError, match="agtf"):
        config(name="agtf")


def test_the_rest_has_defaults():
    policy = Lowest()
    assert policy.name == "Lowest"
    assert policy.select_idle(ARMS) == Decision(min(ARMS), "idle")
    assert policy.select_idle([]) == Decision(None, "idle")
    assert policy.experience() is None
    assert policy.snapshot() == policy.status() == {}
    policy.restore({})
    with pytest.raises(ValueError, match="keeps no state"):
        policy.restore({"schema": 1})

"""Policies and seeds by what is typed."""

import pytest

from agft_ray.errors import ConfigError
from agft_ray.settings import SloConfig
from agft_ray.study.policy_specs import SEARCHES, fixed, pair, parse_policy, parse_seeds, policies


def test_names_and_settings():
    assert parse_policy("default").settings.name == "default"
    assert parse_policy("fixed:1230").settings.sm_clock_mhz == 1230
    assert fixed(900).label == "fixed:900"
    agft = parse_policy("agft:alpha=2,seed=3").settings
    assert (agft.alpha, agft.seed) == (2, 3)
    assert parse_policy("fixed:sm_clock_mhz=900").settings.sm_clock_mhz == 900
    pair_settings = parse_policy("pair:1500/1230").settings
    assert pair_settings == pair(1500, 1230).settings
    assert (pair_settings.prefill_sm_clock_mhz, pair_settings.decode_sm_clock_mhz) == (1500, 1230)


def test_a_pair_may_have_a_clock_while_empty():
    for text, idle in (("pair:1500/1230/210", 210), ("pair:1500/1230/default", "default")):
        spec = parse_policy(text)
        assert spec == pair(1500, 1230, idle)
        assert spec.label == text
    assert parse_policy("pair:1500/1230/default").settings.idle_sm_clock_mhz == "default"


def test_every_policy_can_be_named():
    slo = SloConfig(ttft_s=2.0, tpot_s=0.05)
    short = {"fixed": "fixed:1230", "pair": "pair:1500/1230"}
    for name, model in policies().items():
        assert type(parse_policy(short.get(name, name), slo).settings) is model
    assert parse_policy("pid", slo).settings.tpot_slo_s == 0.05
    assert parse_policy("pid:tpot_slo_s=0.1", slo).settings.tpot_slo_s == 0.1


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_have_no_settings(name):
    assert parse_policy(name).settings is None
    with pytest.raises(ConfigError, match=f"{name}.* no settings"):
        parse_policy(f"{name}:step=90")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agtf", "'agtf'.* 'agft'.*: .*default.*oracle_pair"),
        ("agft:alhpa=2", "alhpa: .*'alpha'"),
        ("agft:alpha=-1", "alpha: .* 0, got -1"),
        ("agft:alpha", "must be KEY=VALUE"),
        ("agft:alpha=[", "is not a value"),
        ("agft:", "must be KEY=VALUE"),
        ("fixed:1230MHz", "'1230MHz': .*fixed:1230"),
        ("fixed", "needs sm_clock_mhz"),
        ("pid", "tpot_slo_s: required, and missing; give --slo-tpot S"),
        ("pair:1500", "'1500': must be in whole MHz, as in pair:1500/1230"),
        ("pair:1500/1230/low", "'1500/1230/low': must be in whole MHz, as in pair:1500/1230"),
        ("pair:1500/1230/210/5", "must be in whole MHz, as in .* or pair:1500/1230/210"),
        ("pair:1500/default/210", "must be in whole MHz"),
    ],
)
def test_what_is_wrong_is_named(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_policy(text)


def test_seeds():
    assert parse_seeds("0..9") == tuple(range(10))
    assert parse_seeds("0,3,5") == (0, 3, 5)
    assert parse_seeds("4") == (4,)
    assert parse_seeds("0..2,7") == (0, 1, 2, 7)


@pytest.mark.parametrize("text", ["", "a", "1..", "..3", "3..1", "1,1", "-1", "0..2,2"])
def test_other_seeds_are_refused(text):
    with pytest.raises(ConfigError, match="--seed"):
        parse_seeds(text)

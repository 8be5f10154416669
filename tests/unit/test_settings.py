import math
import re

import pytest

from agft_ray.config import parse
from agft_ray.errors import ConfigError
from agft_ray.settings import TunerConfig, check_pushes


def problems(data):
    with pytest.raises(ConfigError) as caught:
        parse(TunerConfig, data, source="user_config")
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"slo": {"tpot_s": math.nan}}, "slo.tpot_s"),
        ({"slo": {"ttft_s": 2000.0}}, r"\bttft_s .*\b2000 s.*\b2\?"),
        (
            {"min_sm_clock_mhz": 1980, "max_sm_clock_mhz": 1200},
            r"min_sm_clock_mhz \(1980\) .*max_sm_clock_mhz \(1200\)",
        ),
        ({"slo": {"statistic": "p95"}}, r"slo.statistic: .*'mean' or 'p99', got 'p95'"),
        ({"slo": {"e2e_s": 60_000.0}}, r"\be2e_s is 60000 s, more than 600 minutes.*\b60\?"),
        ({"bound": 0.0}, r"bound: .*greater than 0, got 0\.0"),
        ({"objective": "power"}, r"objective: .*'energy', 'edp' or 'ed2p', got 'power'"),
        ({"settle_s": 2.0, "window_s": 1.0}, r"settle_s \(2\) .*window_s \(1\)"),
        ({"mode": "contorl"}, "mode"),
        ({"policy": {"name": "agft", "alhpa": 1.0}}, r"\balhpa: .*'alpha'"),
        ({"policy": {"name": "wishful"}}, "policy"),
        ({"holdout_replicas": -1}, "holdout_replicas"),
        ({"window_s": 0.1}, "window_s"),
    ],
)
def test_bad_settings_name_field_value_and_rule(data, named):
    assert re.search(named, problems(data))


def test_a_user_config_survives_its_way_through_json():
    config = TunerConfig(slo={"tpot_s": 0.1}, policy={"name": "fixed", "sm_clock_mhz": 1230})
    assert parse(TunerConfig, config.model_dump(), source="user_config") == config


@pytest.mark.parametrize(
    ("window_s", "speed", "interval_s"),
    [(1.2, 1.0, 0.15), (2.4, 2.0, 0.15), (0.5, 1.0, 0.1), (2.0, 10.0, 0.1), (2.0, 1.0, 0.25)],
)
def test_eight_pushes_a_window_within_bounds(window_s, speed, interval_s):
    config = TunerConfig(window_s=window_s)
    assert config.push_interval_s(speed) == pytest.approx(interval_s)
    assert TunerConfig(window_s=60.0).push_interval_s(1.0) == 0.25


def test_statistics_that_would_never_be_fresh_are_refused():
    config = TunerConfig(stale_after_s=0.4)
    with pytest.raises(ValueError, match=r"stale_after_s \(0\.4\) "):
        check_pushes(config, speed=1.0)
    check_pushes(TunerConfig(stale_after_s=0.5), speed=1.0)


def test_speed_that_leaves_too_few_pushes_is_refused():
    config = TunerConfig(window_s=2.0)
    check_pushes(config, speed=10.0)
    with pytest.raises(ValueError, match=r"\bspeed 20 .*\b1 engine pushes.*\b10\b.*\b4\b"):
        check_pushes(config, speed=20.0)

import math
import re

import pytest

from agft_ray.config import Positive, StrictModel, load_yaml, parse
from agft_ray.errors import ConfigError


class Inner(StrictModel):
    ttft_s: Positive | None = None


class Outer(StrictModel):
    alpha: Positive = 1.0
    inner: Inner = Inner()


def problems(data):
    with pytest.raises(ConfigError) as caught:
        parse(Outer, data, source="test")
    return caught.value.problems


def test_defaults_and_integers_for_floats():
    assert parse(Outer, {"alpha": 2}, source="test").alpha == 2.0


def test_all_problems_at_once_with_field_value_and_rule():
    found = problems({"alpha": -1.0, "alhpa": 1, "inner": {"ttft": 3.0, "ttft_s": math.nan}})
    assert len(found) == 4
    for named in (
        r"alpha: .*\b0, got -1\.0",
        r"alhpa: .* 'alpha'\?",
        r"inner\.ttft: .* 'ttft_s'\?",
        r"inner\.ttft_s: .* got nan",
    ):
        assert any(re.fullmatch(named, problem) for problem in found), named


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1.0", True, None])
def test_what_is_not_a_finite_number_is_refused(value):
    (problem,) = problems({"alpha": value})
    assert problem.startswith("alpha: ")


def test_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(ConfigError("f.yaml", ["a: b", "c: d"])))
    assert error.problems == ("a: b", "c: d")
    assert str(error) == "f.yaml: 2 problems\n  a: b\n  c: d"


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml(broken)

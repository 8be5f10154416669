import copy
import itertools
import re

import pytest
import yaml

from agft_ray.errors import ConfigError, GpuArgumentError
from agft_ray.simulation import profiles
from agft_ray.simulation.profiles import bundled_profiles, load_gpu_profile

LIMITS = {
    "rtx_a6000": (210, 2100, 127, 0.768e12, 48),
    "a100_sxm_80gb": (210, 1410, 81, 2.039e12, 80),
    "h100_sxm_80gb": (345, 1980, 110, 3.35e12, 80),
    "rtx_pro_6000": (180, 2790, 175, 1.792e12, 96),
}
MODELS = [(name, model) for name in LIMITS for model in load_gpu_profile(name).models]


@pytest.fixture
def values():
    path = profiles._BUNDLED / "rtx_a6000.yaml"
    return copy.deepcopy(yaml.safe_load(path.read_text()))


def write(tmp_path, values):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_bundled_profiles_are_the_documented_ones():
    assert bundled_profiles() == tuple(sorted(LIMITS))


@pytest.mark.parametrize("name", LIMITS)
def test_supported_clocks(name):
    low, high, count, *_ = LIMITS[name]
    clocks = load_gpu_profile(name).supported_sm_clocks_mhz
    assert (clocks[0], clocks[-1], len(clocks)) == (low, high, count)
    assert {b - a for a, b in itertools.pairwise(clocks)} == {15}


@pytest.mark.parametrize(("name", "model"), MODELS)
def test_decode_attention_reads_the_kv_cache_at_a_share_of_peak_bandwidth(name, model):
    model = load_gpu_profile(name).model_profile(model)
    per_layer = model.kv_bytes_per_token / model.layers / model.tensor_parallel
    # Measured on the PRO 6000 and the H100.
    shares = {"rtx_pro_6000": (0.80, 1.68), "h100_sxm_80gb": (0.8632, 1.584)}
    share, mixed = shares.get(name, (0.86, 1.9))
    expected_us = per_layer / (share * LIMITS[name][3]) * 1e6
    assert model.attention.decode_context_us == pytest.approx(expected_us, rel=2e-3)
    assert model.attention.mixed_context_us == pytest.approx(mixed * expected_us, rel=2e-3)


@pytest.mark.parametrize(("name", "model"), MODELS)
def test_kv_cache_and_weights_fit_the_memory(name, model):
    model = load_gpu_profile(name).model_profile(model)
    memory = LIMITS[name][4] * 1.0737e9 * 0.9 * model.tensor_parallel
    used = model.weights_bytes + model.kv_blocks * 16 * model.kv_bytes_per_token
    assert 0.93 * memory < used < memory


@pytest.mark.parametrize("name", LIMITS)
def test_the_idle_governor_is_named_as_uncertain(name):
    ranges = load_gpu_profile(name).ranges
    assert list(ranges)[:2] == ["governor.idle_sm_clock_mhz", "governor.idle_delay_s"]


@pytest.mark.parametrize(
    ("asked", "given"), [(210, 210), (224, 210), (225, 225), (2099, 2085), (2100, 2100)]
)
def test_a_clock_between_two_is_the_one_below(asked, given):
    assert load_gpu_profile("rtx_a6000").supported_at_or_below(asked) == given


@pytest.mark.parametrize("asked", [-5, 0, 209, 2101])
def test_a_clock_outside_the_range_is_refused_with_the_range(asked):
    with pytest.raises(GpuArgumentError, match=rf"={asked} is outside .*210\.\.2100 MHz"):
        load_gpu_profile("rtx_a6000").supported_at_or_below(asked)


def test_unknown_names_list_the_known():
    with pytest.raises(ConfigError, match=r"'h900'.*a100_sxm_80gb, h100_sxm_80gb, rtx_a6000"):
        load_gpu_profile("h900")
    with pytest.raises(ConfigError, match=r"'gpt-5'.*llama-3\.1-8b"):
        load_gpu_profile("rtx_a6000").model_profile("gpt-5")


def test_a_users_own_file_is_loaded_by_path(tmp_path, values):
    values["name"] = "mine"
    assert load_gpu_profile(write(tmp_path, values)).name == "mine"
    with pytest.raises(ConfigError, match=r"absent\.yaml: (?s:.*)cannot be read"):
        load_gpu_profile(tmp_path / "absent.yaml")


def test_every_crossed_value_is_reported_at_once(tmp_path, values):
    values["min_sm_clock_mhz"] = 2400
    values["power"]["knee_sm_clock_mhz"] = 1900
    values["models"] = {}
    values["ranges"] = {"governor.idle_delay_s": [3, 9], "power.typo_w": [0, 1]}
    with pytest.raises(ConfigError) as caught:
        load_gpu_profile(write(tmp_path, values))
    fields = [problem.split(":")[0] for problem in caught.value.problems]
    assert fields == [
        "min_sm_clock_mhz",
        "power.knee_sm_clock_mhz",
        "models",
        "ranges.governor.idle_delay_s",
        "ranges.power.typo_w",
    ]


@pytest.mark.parametrize(
    ("keys", "value", "field"),
    [
        (("sm_clock_step_mhz",), 40, "sm_clock_step_mhz"),
        (("governor", "idle_sm_clock_mhz"), 1801, "governor.idle_sm_clock_mhz"),
        (("power", "knee_sm_clock_mhz"), 100, "power.knee_sm_clock_mhz"),
        (("power", "reference_sm_clock_mhz"), 2200, "power.reference_sm_clock_mhz"),
        (("power", "cap_w"), 0, "power.cap_w"),
        (("power", "decode", "form"), "magic", "power.decode"),
        (("power_noise",), float("nan"), "power_noise"),
        (
            ("models", "llama-3.1-8b", "reference_sm_clock_mhz"),
            100,
            "models.llama-3.1-8b.reference_sm_clock_mhz",
        ),
    ],
)
def test_bad_values_name_their_field(tmp_path, values, keys, value, field):
    target = values
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    with pytest.raises(ConfigError) as caught:
        load_gpu_profile(write(tmp_path, values))
    assert caught.value.problems[0].startswith(f"{field}: ")


@pytest.mark.parametrize(("name", "end"), [*itertools.product(LIMITS, [0, 1])])
def test_every_uncertain_number_can_take_both_ends_of_its_range(name, end):
    profile = load_gpu_profile(name)
    for path, interval in profile.ranges.items():
        changed = profile.with_value(path, interval[end])
        values = dict(profiles._flatten(changed.model_dump()))
        assert values[path] == interval[end]
        others = dict(profiles._flatten(profile.model_dump()))
        assert {k for k in values if values[k] != others[k]} <= {path}
        assert type(values[path]) is type(others[path])


EXACT = re.compile(
    r"(min|max)_sm_clock_mhz|sm_clock_step_mhz|power\.(cap_w|reference_sm_clock_mhz)"
    r"|models\..*\.(tensor_parallel|layers|weights_bytes|kv_bytes_per_token)"
)
"""Known as it is: the board's own figures, the LLM's shape, and what a fit is relative to."""
EXACT_OF_ONE = {
    "h100_sxm_80gb": r"noise\.counter_update_s|models\..*\.reference_sm_clock_mhz",  # measured
    "a100_sxm_80gb": r"models\..*\.reference_sm_clock_mhz",  # measured without a cap
}
OF_A_GROUP = re.compile(r"models\..*\.(spinning_activity|all_reduce_ms|all_reduce_token_ms)")
"""Nothing, by definition, on a single GPU."""


@pytest.mark.parametrize("name", LIMITS)
def test_every_number_that_is_not_known_exactly_has_a_range(name):
    profile = load_gpu_profile(name)
    values = dict(profiles._flatten(profile.model_dump(exclude={"ranges"})))
    numbers = {path for path, value in values.items() if isinstance(value, int | float)}
    exact = {
        path
        for path in numbers
        if EXACT.fullmatch(path)
        or re.fullmatch(EXACT_OF_ONE.get(name, "-"), path)
        or (values[path] == 0 and OF_A_GROUP.fullmatch(path))
    }
    assert not {path for path in exact if path in profile.ranges}
    assert numbers - exact == set(profile.ranges)
    assert all(low < high for low, high in profile.ranges.values())


def test_with_values_changes_all_at_once_so_that_they_need_not_be_valid_one_by_one():
    base = load_gpu_profile("rtx_a6000").model_copy(update={"ranges": {}})
    changes = {"power.knee_sm_clock_mhz": 1900, "power.reference_sm_clock_mhz": 2000}
    changed = base.with_values(changes).power
    assert (changed.knee_sm_clock_mhz, changed.reference_sm_clock_mhz) == (1900, 2000)
    with pytest.raises(ConfigError, match=r"power\.knee_sm_clock_mhz: 1900 must be below"):
        base.with_value("power.knee_sm_clock_mhz", 1900)
    with pytest.raises(ConfigError) as caught:
        base.with_values({"a.b": 1, "power.cap_w": 100, "c": 2})
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["a.b", "c"]


def test_with_value_leaves_the_profile_itself_alone():
    profile = load_gpu_profile("rtx_a6000")
    assert profile.with_value("governor.idle_sm_clock_mhz", 210.0).governor.idle_sm_clock_mhz == 210
    assert profile.governor.idle_sm_clock_mhz == 1800


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("power.typo_w", 1, r"power\.typo_w: "),
        ("power.decode.form", 1, r"power\.decode\.form: "),
        ("models.llama-3.1-8b", 1, r"models\.llama-3\.1-8b: "),
        ("governor.idle_sm_clock_mhz", 211, r"\b211 "),
        ("governor.idle_sm_clock_mhz", 210.5, "governor.idle_sm_clock_mhz: .*integer"),
        ("models.llama-3.1-8b.issue_share", 0.5, r"\[0.62, 1\] does not contain .* 0.5"),
        ("power.cap_w", float("inf"), "power.cap_w"),
    ],
)
def test_with_value_refuses_what_the_file_could_not_say(path, value, message):
    with pytest.raises(ConfigError, match=message):
        load_gpu_profile("rtx_a6000").with_value(path, value)

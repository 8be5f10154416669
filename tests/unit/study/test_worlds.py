"""Worlds: which there are, and how policies are judged over them."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from agft_ray.errors import AgftError, ConfigError
from agft_ray.simulation.profiles import bundled_profiles, load_gpu_profile
from agft_ray.study import worlds_console
from agft_ray.study.policy_specs import parse_policy
from agft_ray.study.pool import one_by_one
from agft_ray.study.scenario import Scenario
from agft_ray.study.sensitivity import ranges_of
from agft_ray.study.study import Study
from agft_ray.study.worlds import CORNERS, Outcome, World, judge, named_worlds, worlds_of
from agft_ray.study.worlds_console import print_judgement, run_and_print
from unit.results.test_record import RECORD

PROFILES = {name: load_gpu_profile(name) for name in bundled_profiles()}
PAIRS = [(name, model) for name, profile in PROFILES.items() for model in profile.models]
MODEL = "llama-3.1-8b"


@pytest.mark.parametrize(("name", "model"), PAIRS)
def test_there_are_24_worlds_each_a_valid_profile_within_the_ranges(name, model):
    profile = PROFILES[name]
    worlds, ranges = worlds_of(profile, model), ranges_of(profile, model)
    assert len({world.name for world in worlds}) == len(worlds) == 24
    assert [world.name for world in worlds[: len(CORNERS)]] == list(CORNERS)
    for world in worlds:
        changed = profile.with_values(world.values).numbers()
        assert all(changed[path] == value for path, value in world.values.items())
        assert all(ranges[path][0] <= v <= ranges[path][1] for path, v in world.values.items())
        idle_clock = changed["governor.idle_sm_clock_mhz"]
        assert idle_clock in profile.supported_sm_clocks_mhz
    for world in worlds[len(CORNERS) :]:
        assert set(world.values) == set(ranges)


def test_the_same_worlds_come_every_time_and_others_of_another_profile():
    profile = PROFILES["rtx_a6000"]
    assert worlds_of(profile, MODEL) == worlds_of(load_gpu_profile("rtx_a6000"), MODEL)
    draws = [world.values["noise.step_cv"] for world in worlds_of(profile, MODEL)[-8:]]
    assert len(set(draws)) == 8
    others = worlds_of(PROFILES["a100_sxm_80gb"], MODEL)
    assert not set(draws) & {world.values["noise.step_cv"] for world in others[-8:]}


def test_what_is_drawn_is_spread_over_its_range():
    profile = PROFILES["rtx_a6000"]
    names = [f"draw-{n}" for n in range(1, 101)]
    shares = [world.values["power.decode.single"] for world in named_worlds(profile, MODEL, names)]
    assert sum(shares) / 100 == pytest.approx(0.65, abs=0.035)  # uniform between 0.5 and 0.8
    assert min(shares) < 0.53
    assert max(shares) > 0.77


@pytest.mark.parametrize(("name", "model"), PAIRS)
def test_corners_are_at_the_ends_of_their_ranges(name, model):
    profile = PROFILES[name]
    corners = {world.name: world.values for world in worlds_of(profile, model)}
    assert corners["nominal"] == {}
    assert corners["slow-clock-changes"]["clock_change.median_s"] == 0.2
    ranges = profile.ranges
    for corner in set(CORNERS) - {"nominal"}:
        assert corners[corner]
        assert all(value in ranges[path] for path, value in corners[corner].items())
    share = f"models.{model}.issue_share"
    assert corners["issue-share-low"] == {share: ranges[share][0]}
    assert corners["slow-host"][f"models.{model}.host_ms"] == ranges[f"models.{model}.host_ms"][1]


def test_a_profile_with_few_ranges_has_more_draws():
    ranges = {"clock_change.median_s": (0.02, 0.2)}
    worlds = worlds_of(PROFILES["rtx_a6000"].model_copy(update={"ranges": ranges}), MODEL)
    expected = ["nominal", "slow-clock-changes", *(f"draw-{n}" for n in range(1, 23))]
    assert [world.name for world in worlds] == expected
    with pytest.raises(AgftError, match="no ranges"):
        worlds_of(PROFILES["rtx_a6000"].model_copy(update={"ranges": {}}), MODEL)


def test_worlds_are_named_and_any_number_can_be_drawn():
    profile = PROFILES["rtx_a6000"]
    names = ["draw-2", "slow-host", "draw-2", "draw-12345"]
    found = named_worlds(profile, MODEL, names)
    assert [world.name for world in found] == ["draw-2", "slow-host", "draw-12345"]
    assert found[:2] == tuple(
        world for name in names[:2] for world in worlds_of(profile, MODEL) if world.name == name
    )
    for wrong in ("draw-0", "draw-x", "slow", ""):
        with pytest.raises(ConfigError, match=f"no world '{wrong}'; .*nominal"):
            named_worlds(profile, MODEL, [wrong])


def outcome(name, **edp_by_seed):
    records = [
        replace(RECORD, policy=policy, seed=seed, edp_j_s=edp_j_s, world=name)
        for policy, edp in edp_by_seed.items()
        for seed, edp_j_s in enumerate(edp)
    ]
    return Outcome(World(name, "", {}), tuple(records))


OUTCOMES = [
    outcome("a", default=[100.0, 200.0], agft=[60.0, 140.0], rules=[90.0, 180.0]),
    outcome("b", default=[100.0, 200.0], agft=[50.0, 100.0], rules=[95.0, 190.0]),
    outcome("c", default=[50.0, 50.0], agft=[55.0, 55.0], rules=[49.0, 49.0]),
]


def test_a_policy_is_judged_by_its_median_and_its_worst_world():
    edp = {each.policy: each for each in judge(OUTCOMES) if each.metric == "edp_j_s"}
    assert list(edp) == ["agft", "rules"]
    assert edp["agft"].changes_percent == pytest.approx({"a": -35.0, "b": -50.0, "c": 10.0})
    assert (edp["agft"].median, edp["agft"].worst) == ("a", "c")
    assert (edp["rules"].median, edp["rules"].worst) == ("b", "c")
    two = {each.metric: each for each in judge(OUTCOMES[:2]) if each.policy == "agft"}
    assert (two["edp_j_s"].median, two["edp_j_s"].worst) == ("a", "a")


def test_the_judgement_names_the_worlds():
    console = Console(file=io.StringIO(), width=100)
    print_judgement(OUTCOMES, 2, console)
    text = console.file.getvalue()
    assert "3 worlds, 2 seeds each" in text
    row = next(line for line in text.splitlines() if " EDP " in line)
    assert row.split() == ["EDP", "-35.0", "a", "+10.0", "c"]
    assert "Lowest EDP: agft in 2, rules in 1." in text


def test_interrupted_it_says_how_many_worlds_were_not_run(tmp_path, monkeypatch):
    def interrupted(study, worlds, pool, on_phase):
        yield OUTCOMES[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(worlds_console, "run_worlds", interrupted)
    study = Study(Scenario(duration_s=10.0), [parse_policy("agft")], [0])
    console = Console(file=io.StringIO(), width=100)
    worlds = worlds_of(PROFILES["rtx_a6000"], MODEL)
    path = tmp_path / "out.json"
    assert run_and_print(study, worlds, one_by_one, console, json_path=path) == 130
    assert "23 of 24 worlds were not run" in console.file.getvalue()
    assert path.exists()

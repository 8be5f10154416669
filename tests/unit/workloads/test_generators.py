"""Generators against closed forms and published figures; bounds are 4 standard errors."""

import itertools
import math

import numpy as np
import pytest

from agft_ray.errors import ConfigError, TraceError
from agft_ray.workloads.generators import (
    WORKLOADS,
    generate,
    generate_conversation,
    thin,
    until,
)

RATES = "hour_of_week,req_per_min_low,req_per_min_mid,req_per_min_high\n"
COUNT = 50_000


@pytest.fixture
def write_rates(tmp_path):
    def write(rows):
        path = tmp_path / "rate.csv"
        path.write_text(RATES + rows)
        return str(path)

    return write


def take(name, count=COUNT, *, rate_per_s=2.0, seed=7, **parameters):
    requests = generate(name, rate_per_s=rate_per_s, seed=seed, **parameters)
    return list(itertools.islice(requests, count))


def gaps_of(requests):
    return np.diff([0.0, *(request.arrival_s for request in requests)])


def figures(tokens):
    return [np.mean(tokens), np.percentile(tokens, 50), np.percentile(tokens, 99)]


@pytest.fixture(scope="module")
def generated():
    return take("conversation", 60_000)


def test_generated_lengths_are_those_of_the_trace(generated):
    prompts = [request.prompt_tokens for request in generated]
    outputs = [request.output_tokens for request in generated]
    assert figures(prompts) == pytest.approx([1155, 1020, 4142], rel=0.05)
    assert figures(outputs) == pytest.approx([211, 129, 601], rel=0.05)


def test_generated_arrivals_have_the_rate_and_burstiness(generated):
    gaps_s = gaps_of(generated)
    assert gaps_s.mean() == pytest.approx(0.5, rel=0.02)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.09, abs=0.03)


def test_conversation_is_bounded_by_its_duration():
    requests = list(generate_conversation(1.0, 50.0, seed=3))
    assert requests == take("conversation", len(requests), rate_per_s=1.0, seed=3)
    assert requests[-1].arrival_s < 50.0 <= take("conversation", 99, rate_per_s=1.0)[-1].arrival_s
    with pytest.raises(ValueError, match=r"duration_s: .* 0, got -1"):
        generate_conversation(1.0, -1.0, seed=3)


@pytest.fixture(params=WORKLOADS)
def name_and_settings(request, write_rates):
    rates = {"rates": write_rates("0,1,2,3\n84,1,4,9\n")} if request.param == "day_night" else {}
    return request.param, rates


def test_a_stream_depends_on_the_seed_alone(name_and_settings):
    name, settings = name_and_settings
    assert take(name, 3000, **settings) == take(name, 3000, **settings)
    assert take(name, 3000, **settings)[:100] == take(name, 100, **settings)
    assert take(name, 100, **settings) != take(name, 100, seed=8, **settings)


def test_lengths_do_not_depend_on_the_rate(name_and_settings):
    name, settings = name_and_settings
    lengths = [
        [(r.prompt_tokens, r.output_tokens) for r in take(name, 500, rate_per_s=rate, **settings)]
        for rate in (0.1, 30.0)
    ]
    assert lengths[0] == lengths[1]


def test_every_workload_is_in_order_and_fits_the_context(name_and_settings):
    name, settings = name_and_settings
    requests = take(name, 20_000, max_model_len=4096, seed=0, **settings)
    assert all(gap >= 0 for gap in gaps_of(requests))
    assert all(type(r.prompt_tokens) is type(r.output_tokens) is int for r in requests)
    assert min(min(r.prompt_tokens, r.output_tokens) for r in requests) >= 1
    assert max(r.prompt_tokens + r.output_tokens for r in requests) <= 4096
    assert max(r.output_tokens for r in requests) <= 2048


def test_poisson_gaps_are_exponential():
    gaps_s = gaps_of(take("poisson"))
    # Exponential of mean m: standard error of the mean m/sqrt(n), of the variance m^2 sqrt(8/n).
    assert gaps_s.mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(COUNT))
    assert gaps_s.var() == pytest.approx(0.25, abs=4 * 0.25 * math.sqrt(8 / COUNT))
    longer = np.mean(gaps_s > 1.0)
    assert longer == pytest.approx(math.exp(-2), abs=4 * math.sqrt(0.135 * 0.865 / COUNT))


@pytest.mark.parametrize("cv", [0.5, 3.0])
def test_gamma_gaps_have_the_asked_for_variation(cv):
    gaps_s = gaps_of(take("gamma_burst", cv=cv))
    # Gamma of shape k = 1/cv^2: variance of the mean (m cv)^2 / n, of the variance
    # (m cv)^4 (2 + 6/k) / n.
    variance = (0.5 * cv) ** 2
    assert gaps_s.mean() == pytest.approx(0.5, abs=4 * math.sqrt(variance / COUNT))
    error = 4 * variance * math.sqrt((2 + 6 * cv**2) / COUNT)
    assert gaps_s.var() == pytest.approx(variance, abs=error)


def test_day_night_follows_its_rate(write_rates):
    """Rates 1, 3, 1 at hours 0, 12, 24 and 1 to the week's end: mean 192/168, scaled to 0.1/s."""
    rates = write_rates("0,9,1,9\n12,9,3,9\n24,9,1,9\n")
    scale = 0.1 * 168 / 192
    week_s = 168 * 3600
    requests = take("day_night", 130_000, rate_per_s=0.1, rates=rates)
    times_s = np.array([request.arrival_s for request in requests])
    assert times_s[-1] > 2 * week_s

    def expected(hour):  # integral of the rate from 0, for hours up to 24
        first, second = min(hour, 12), max(hour - 12, 0)
        return 3600 * scale * (first + first**2 / 12 + 3 * second - second**2 / 12)

    def counted(start_s, end_s):
        return np.sum((start_s <= times_s) & (times_s < end_s))

    for week in (0, 1):
        start_s = week * week_s
        for hours in ((0, 6), (6, 12), (12, 18), (18, 24)):
            mean = expected(hours[1]) - expected(hours[0])
            count = counted(*(start_s + hour * 3600 for hour in hours))
            assert abs(count - mean) < 4 * math.sqrt(mean)
        total = 0.1 * week_s
        assert abs(counted(start_s, start_s + week_s) - total) < 4 * math.sqrt(total)


def test_day_night_is_linear_across_the_end_of_the_week(write_rates):
    """Rate 0 at hour 24 and 2 at hour 144: back to 0 over the 48 hours across midnight."""
    rates = write_rates("24,0,0,0\n144,2,2,2\n")
    requests = take("day_night", 20_000, rate_per_s=0.1, rates=rates, start_hour=144.0)
    times_h = [r.arrival_s / 3600 for r in requests]
    assert times_h[-1] > 48
    # The mean is 1 of the file's unit. Hours 144 to 168 from 2 to 1, then to hour 24 from 1 to 0.
    for start, end, mean_rate in ((0, 24, 1.5), (24, 48, 0.5)):
        mean = 0.1 * mean_rate * 24 * 3600
        assert abs(sum(start <= t < end for t in times_h) - mean) < 4 * math.sqrt(mean)


def test_day_night_takes_the_column_asked_for(write_rates):
    rates = write_rates("0,1,1,0\n80,1,1,0\n84,1,1,5\n88,1,1,0\n")
    high = take("day_night", 1000, rates=rates, column="high")
    assert all(80 * 3600 <= r.arrival_s % (168 * 3600) <= 88 * 3600 for r in high)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("0,1,x,1\n", "line 2: could not convert"),
        ("0,1,nan,1\n", "line 2: rate: .*got nan"),
        ("0,1,-1,1\n", "line 2: rate"),
        ("0,1,1,1\n0,1,1,1\n", "line 3: hour_of_week: "),
        ("168,1,1,1\n", "line 2: hour_of_week"),
        ("0,1\n", "line 2: "),
        ("0,1,0,1\n", ".*column req_per_min_mid"),
        ("", ".*column req_per_min_mid"),
    ],
)
def test_a_broken_rate_file_is_named(write_rates, rows, problem):
    with pytest.raises(TraceError, match=rf"rate\.csv: {problem}"):
        generate("day_night", rate_per_s=1.0, rates=write_rates(rows))


def test_lengths_of_ones_own():
    fixed = take("poisson", 2000, prompt_tokens=100, output_tokens=20)
    assert {(r.prompt_tokens, r.output_tokens) for r in fixed} == {(100, 20)}
    spread = take("poisson", prompt_tokens=800, output_tokens=100, length_sigma=0.5)
    logs = np.log([r.prompt_tokens for r in spread])
    assert logs.mean() == pytest.approx(math.log(800), abs=4 * 0.5 / math.sqrt(COUNT))
    assert logs.std() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * COUNT))


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [
        ("normal_load", 512, 192),
        ("long_context", 4096, 128),
        ("long_generation", 256, 1024),
        ("high_concurrency", 256, 192),
        ("high_cache_hit", 4 * 512 + 256, 192),
    ],
)
def test_prototypes_have_their_medians_and_rate(name, prompt, output):
    requests = take(name)
    assert np.median([r.prompt_tokens for r in requests]) == pytest.approx(prompt, rel=0.03)
    assert np.median([r.output_tokens for r in requests]) == pytest.approx(output, rel=0.03)
    assert requests[-1].arrival_s == pytest.approx(COUNT / 2.0, rel=0.08)


def test_high_concurrency_comes_in_groups():
    times_s = [r.arrival_s for r in take("high_concurrency", 8000, group_size=8)]
    sizes = [len(list(group)) for _, group in itertools.groupby(times_s)]
    assert set(sizes) == {8}


def test_high_cache_hit_shares_prefixes_and_nothing_else():
    requests = take("high_cache_hit", 5000, prefixes=3, shared_blocks=2)
    texts = {r.prefix_blocks[:2] for r in requests}
    assert texts == {(0, 1), (2, 3), (4, 5)}
    own = [each for r in requests for each in r.prefix_blocks[2:]]
    assert len(own) == len(set(own))
    assert not set(own) & set(range(6))
    assert all(len(r.prefix_blocks) == math.ceil(r.prompt_tokens / 512) for r in requests)
    counts = [sum(r.prefix_blocks[0] == first for r in requests) for first in (0, 2, 4)]
    assert counts == pytest.approx([5000 / 3] * 3, abs=4 * math.sqrt(5000 * 2 / 9))


def test_other_workloads_say_nothing_of_their_prompts():
    assert not any(request.prefix_blocks for request in take("normal_load", 100))


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("poison", {}, r"'poison'.* 'poisson'\?"),
        ("zzz", {}, "'zzz'.* conversation, poisson, "),
        ("poisson", {"rate_per_s": 0.0}, r"rate_per_s: .* 0, got 0\.0"),
        ("poisson", {"rate_per_s": math.nan}, "rate_per_s"),
        ("poisson", {"seed": -1}, "seed"),
        ("gamma_burst", {"cv": math.inf, "prompt_tokens": 0}, "prompt_tokens"),
        ("gamma_burst", {"cv": math.inf, "prompt_tokens": 0}, "cv"),
        ("gamma_burst", {"cvv": 2.0}, r"cvv: .*'cv'\?"),
        ("normal_load", {"prompt": (1, 0.1)}, r"\bprompt: "),
        ("day_night", {}, r"\brates: required"),
        ("high_cache_hit", {"shared_blocks": 9}, r"shared_blocks: 9 .*\b512 tokens"),
    ],
)
def test_bad_settings_are_refused_together(name, settings, named):
    with pytest.raises(ConfigError, match=named):
        generate(name, **{"rate_per_s": 1.0} | settings)


def test_thinning_keeps_a_share_that_does_not_depend_on_duration(generated):
    whole = list(thin(generated, 0.25, seed=5))
    start = list(thin(generated[:1000], 0.25, seed=5))
    assert whole[: len(start)] == start
    assert len(whole) / len(generated) == pytest.approx(0.25, rel=0.05)
    assert list(thin(generated[:10], 1.0, seed=5)) == generated[:10]
    with pytest.raises(ValueError, match=r"keep: .* 0 .* 1, got 1\.5"):
        thin(generated, 1.5, seed=5)


def test_until_stops_before_the_duration(generated):
    assert list(until(generated, generated[10].arrival_s)) == generated[:10]
    with pytest.raises(ValueError, match=r"duration_s: .* 0, got nan"):
        until(generated, math.nan)

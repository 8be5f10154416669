"""The H100 profile against the page of the card that was lent: `docs/measured/h100_sxm.md`.

Those were bare kernels: no host, no sampling, no all-reduce.
"""

import re
from pathlib import Path
from statistics import fmean

import pytest

from agft_ray.simulation.physics import (
    StepWork,
    busy_power_w,
    idle_power_w,
    prefill_attention_s,
    step_time_s,
)
from agft_ray.simulation.profiles import load_gpu_profile

PAGE = Path(__file__).parents[2] / "docs" / "measured" / "h100_sxm.md"
H100 = load_gpu_profile("h100_sxm_80gb")
ROW = re.compile(
    r"\| (?P<phase>decode B|prefill N)=(?P<size>\d+)(?:, context (?P<context>\d+))? "
    r"\| (?P<step_ms>[\d.]+) ms \|.*\| (?P<power_w>[\d.]+) W "
    r"\| (?:\d+\.\.\d+, mean )?(?P<clock_mhz>\d+) MHz \|"
)


def bare(name):
    """A model's kernels alone."""
    model = H100.model_profile(name)
    none = {"decode_floor_us": 0.0, "decode_sequence_us": 0.0}
    return model.model_copy(
        update={
            "attention": model.attention.model_copy(update=none),
            "host_ms": 0.0,
            "host_sequence_ms": 0.0,
            "prefill_host_ms": 0.0,
            "all_reduce_ms": 0.0,
            "all_reduce_token_ms": 0.0,
            "head_ms": 0.0,
        }
    )


def rows(section):
    part = PAGE.read_text().partition(section)[2].partition("\n## ")[0]
    return [found.groupdict() for line in part.splitlines() if (found := ROW.match(line))]


@pytest.mark.parametrize(
    ("section", "name", "count", "time_bound", "power_bound"),
    [
        ("as CUDA graphs", "llama-3.1-8b", 25, 0.03, 0.07),
        ("A shard of Llama-3.1-70B", "llama-3.1-70b-tp4", 13, 0.04, 0.07),
    ],
)
def test_time_and_power_of_steps(reached, section, name, count, time_bound, power_bound):
    model, times, powers = bare(name), [], []
    for row in rows(section):
        size, clock = int(row["size"]), float(row["clock_mhz"])
        work = StepWork(size, 0, 0, prefill_attention_s(model, size, 0))
        if row["phase"] == "decode B":
            work = StepWork(0, size, size * int(row["context"]))
        times.append(step_time_s(model, work, clock) * 1e3 / float(row["step_ms"]) - 1)
        power_w = min(busy_power_w(H100, model, work, clock), H100.power.cap_w)
        powers.append(power_w / float(row["power_w"]) - 1)
    assert len(times) == count
    time, power = (fmean(map(abs, errors)) for errors in (times, powers))
    assert reached(f"lent H100, {name}: step times, MAPE", time, time_bound) <= time_bound
    assert reached(f"lent H100, {name}: power, MAPE", power, power_bound) <= power_bound


def test_loaded_idle_power(reached):
    off = reached(
        "lent H100: loaded and idle at 1980 MHz", idle_power_w(H100.power, 1980) / 131 - 1, 0.05
    )
    assert abs(off) <= 0.05

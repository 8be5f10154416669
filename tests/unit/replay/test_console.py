"""What the terminal shows: the right numbers, and no NaN."""

import io
from dataclasses import replace

import pytest
from golden_files import assert_golden, sections
from rich.console import Console

from agft_ray.replay.client import Progress
from agft_ray.replay.console import (
    print_comparison,
    progress_display,
    sparkline,
)
from agft_ray.replay.result import ServerStatus
from agft_ray.replay.summary import Comparison, Group
from agft_ray.results.distribution import Distribution, Slo
from agft_ray.results.spread import Spread


def group(role, **values):
    base = Group(
        role=role,
        replicas=2,
        requests=1234,
        failed=0,
        prompt_tokens=1000000,
        output_tokens=5000,
        energy_j=12345.6,
        mean_power_w=201.5,
        energy_per_output_token_j=2.4691,
        ttft_s=Distribution(3, 0.1, 0.0912, 0.3, 0.4),
        tpot_s=Distribution(),
        e2e_s=Distribution(3, 4.0, 3.5, 8.0, 9.0),
        edp_j_s=49382.4,
        edp_per_output_token_j_s=40.0,
        slo_attainment=0.975,
        sm_clock_mhz=1402.0,
        clock_changes=17,
        windows=60,
        sm_clock_over_time_mhz=(1200.0,) * 30 + (1980.0,) * 30,
    )
    return replace(base, **values)


def comparison(groups, **values):
    base = Comparison(
        groups=groups,
        changes_percent={},
        latency_source="engine",
        client_ttft_s=Distribution(3, 0.15, 0.1, 0.2, 0.777),
        client_e2e_s=Distribution(3, 4.5, 4.0, 8.5, 9.25),
        requests=2468,
        failed=0,
        interrupted_requests=0,
        errors={},
        duration_s=600.0,
        wall_s=150.0,
        speed=4.0,
        valid=True,
        interrupted=False,
        slo=None,
        notes=(),
        bottlenecks=(),
    )
    return replace(base, **values)


def printed(value, *, width=100):
    console = Console(file=io.StringIO(), width=width)
    print_comparison(value, console)
    text = console.file.getvalue()
    assert "nan" not in text.lower()
    assert "None" not in text
    return text


def test_the_screen():
    """Of two groups with all there can be, of one, and of one of which next to nothing is known."""
    holdout = group(
        "holdout",
        requests=99,
        ttft_s=Distribution(1, 0.2, 0.2, 1.0, 1.0),
        sm_clock_over_time_mhz=(1980.0,) * 60,
    )
    both = comparison(
        (group("tuned"), holdout),
        changes_percent={
            "ttft_s.mean": Spread(24, -50.0, 12.3),
            "e2e_s.mean": Spread(24, 3.21, 4.56),
            "energy_per_output_token_j": Spread(24, 12.34, 2.1),
        },
        slo=Slo(ttft_s=1.0, tpot_s=0.2),
        errors={"HTTP 500: [bold]x": 3},
        notes=("A note [really].",),
        bottlenecks=("A warning [really].",),
    )
    unknown = group(
        "all",
        replicas=None,
        energy_j=None,
        mean_power_w=None,
        sm_clock_mhz=None,
        ttft_s=Distribution(),
        sm_clock_over_time_mhz=(None,) * 60,
    )
    screens = {
        "two groups": both,
        "one group": comparison((group("tuned"),), speed=1.0),
        "late steps": replace(both, valid=False),
        "no values": comparison((unknown,), client_ttft_s=Distribution()),
    }
    assert_golden("replay", sections({name: printed(each) for name, each in screens.items()}))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_clocks_over_time_share_a_scale(width):
    holdout = group("holdout", sm_clock_over_time_mhz=(1980.0,) * 60)
    text = printed(comparison((group("tuned"), holdout)), width=width)
    if width > 69:
        assert "▁ 1200 MHz to █ 1980 MHz" in text
        assert "tuned " + "▁" * 30 + "█" * 30 in text
        assert "holdout " + "█" * 60 in text
    assert all(len(line) <= width for line in text.splitlines())


def test_sparkline():
    assert sparkline((0.0, None, 4.0, 8.0), 0.0, 8.0) == "▁ ▅█"
    assert sparkline((5.0,), 5.0, 5.0) == "▅"


# -- progress --------------------------------------------------------------------------------------


def status(t_s, energy_j):
    replicas = [
        {
            "replica": name,
            "role": role,
            "t_s": t_s,
            "energy_j": energy_j * share,
            "energy_t_s": t_s,
            "sm_clock_mhz": 1410,
            "running": 3,
            "waiting": 1,
            "prompt_tokens": 0,
            "generation_tokens": 0,
        }
        for name, role, share in (("a", "tuned", 1), ("b", "tuned", 3), ("h", "holdout", 4))
    ]
    return ServerStatus.model_validate({"speed": 1, "now_s": t_s, "replicas": replicas})


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end():
    console = Console(file=io.StringIO(), width=80)
    now_s = 0.0
    with progress_display(50, last_arrival_s=45.0, console=console, now_s=lambda: now_s) as show:
        for second in range(26):
            now_s = float(second)
            sent = status(second, 100.0 * second)
            show(Progress(second, second // 2, 1, 2.0 * second, float(second), sent))
    lines = console.file.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "10 s of wall time, 20 s simulated, about 12 s left",
        "20 s of wall time, 40 s simulated, about 2 s left",
        "25 s of wall time, 50 s simulated",
    ]
    little = Console(file=io.StringIO(), width=80)
    with progress_display(None, console=little) as show:
        show(Progress(3, 1, 0, 7.0, 7.0, None))
    screens = {"all is known": "\n".join(lines), "no status, no total": little.file.getvalue()}
    assert_golden("replay_progress", sections(screens))


def test_a_log_without_any_progress_is_empty():
    silent = Console(file=io.StringIO())
    with progress_display(None, console=silent):
        pass
    assert silent.file.getvalue() == ""


@pytest.mark.parametrize("total", [50, None])
def test_a_terminal_gets_a_bar(total):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with progress_display(total, console=console) as show:
        show(Progress(9, 7, 0, 7.0, 7.0, status(0.0, 0.0)))
        show(Progress(12, 10, 2, 8.0, 8.0, status(1.0, 100.0)))
    text = console.file.getvalue()
    assert f"10/{total or '?'}" in text
    assert "2 in flight, 2 failed" in text
    assert "tuned 200 W 1410 MHz, holdout 400 W" in text

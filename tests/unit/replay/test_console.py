"""What the terminal shows: the right numbers, and no NaN."""

import io
from dataclasses import replace

import pytest
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
        edp_per_request_j_s=40.0,
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
        speed=4.0,
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


def line_of(text, label):
    (line,) = (line for line in text.splitlines() if line.split("│")[1:2] and label in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_two_groups_beside_their_change():
    both = (group("tuned"), group("holdout", requests=99, ttft_s=Distribution(1, 0.2, 0.2, 1, 1)))
    changes = {"ttft_s.mean": -50.0, "energy_per_output_token_j": 12.34, "sm_clock_mhz": -20.0}
    text = printed(comparison(both, changes_percent=changes, slo=Slo(ttft_s=1.0)))
    assert line_of(text, "requests") == ["requests", "1,234", "99", ""]
    assert line_of(text, "prompt tokens") == ["prompt tokens", "1,000,000", "1,000,000", ""]
    assert line_of(text, "TTFT mean") == ["TTFT mean, ms", "100.0", "200.0", "-50.0 %"]
    assert line_of(text, "TTFT p50") == ["TTFT p50, ms", "91.20", "200.0", ""]
    assert line_of(text, "per output token")[1:] == ["2.469", "2.469", "+12.3 %"]
    assert line_of(text, "TPOT p99") == ["TPOT p99, ms", "—", "—", ""]
    assert line_of(text, "SLO") == ["SLO attainment, %", "97.50", "97.50", ""]
    assert line_of(text, "energy, kJ")[1] == "12.35"
    assert "2,468 requests in 600 s (speed 4)" in text


def test_one_group_has_no_column_of_changes():
    text = printed(comparison((group("tuned"),), notes=("No comparison: every replica is tuned.",)))
    assert "change " not in text.splitlines()[2]
    assert line_of(text, "requests") == ["requests", "1,234"]
    assert "No comparison: every replica is tuned." in text
    assert "SLO" not in text


def test_no_values_are_dashes():
    empty = group(
        "all",
        replicas=None,
        energy_j=None,
        mean_power_w=None,
        sm_clock_mhz=None,
        ttft_s=Distribution(),
        sm_clock_over_time_mhz=(None,) * 60,
    )
    text = printed(comparison((empty,), client_ttft_s=Distribution()))
    assert line_of(text, "replicas") == ["replicas", "—"]
    assert "TTFT mean — ms" in text
    assert "SM clock over time" not in text


def test_the_clients_view_errors_and_warnings_are_printed_as_they_are():
    value = comparison(
        (group("tuned"),),
        errors={"HTTP 500: [bold]x": 3},
        bottlenecks=("The client sent late [really].",),
    )
    text = printed(value)
    assert "TTFT mean 150.0 ms, p99 777.0 ms; E2E mean 4.500 s, p99 9.250 s" in text
    assert "3 failed: HTTP 500: [bold]x" in text
    assert "warning: The client sent late [really]." in text


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
    with progress_display(50, console=console, now_s=lambda: now_s) as show:
        for second in range(26):
            now_s = float(second)
            show(Progress(second, second // 2, 1, 2.0 * second, status(second, 100.0 * second)))
    lines = console.file.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["20 s", "40 s", "50 s"]
    assert lines[0] == (
        "20 s: 1 failed, 5 in flight, 5 done of 50; running 9, waiting 3, "
        "tuned 200 W 1410 MHz, holdout 400 W 1410 MHz"
    )


def test_a_log_without_status_total_or_any_progress():
    console = Console(file=io.StringIO(), width=80)
    with progress_display(None, console=console) as show:
        show(Progress(3, 1, 0, 7.0, None))
    assert console.file.getvalue() == "7 s: 0 failed, 2 in flight, 1 done\n"
    silent = Console(file=io.StringIO())
    with progress_display(None, console=silent):
        pass
    assert silent.file.getvalue() == ""


@pytest.mark.parametrize("total", [50, None])
def test_a_terminal_gets_a_bar(total):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with progress_display(total, console=console) as show:
        show(Progress(9, 7, 0, 7.0, status(0.0, 0.0)))
        show(Progress(12, 10, 2, 8.0, status(1.0, 100.0)))
    text = console.file.getvalue()
    assert f"10/{total or '?'}" in text
    assert "2 failed, 2 in flight" in text
    assert "tuned 200 W 1410 MHz, holdout 400 W" in text

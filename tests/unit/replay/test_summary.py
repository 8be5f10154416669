"""Statistics of a replay against hand computation."""

import json
import re

import numpy as np
import pytest

from agft_ray.replay.result import ReplayResult, RequestRow, ServerStatus
from agft_ray.replay.summary import summarise
from agft_ray.results.distribution import Distribution, Slo


def replica(name, role, t_s, **values):
    base = {"running": 0, "waiting": 0, "prompt_tokens": 0, "generation_tokens": 0}
    gpu = {"energy_j": 0.0, "energy_t_s": t_s, "sm_clock_mhz": 1000}
    return {"replica": name, "role": role, "t_s": t_s, **base, **gpu, **values}


def result_of(rows=(), polls=(), **values):
    timeline = tuple(
        ServerStatus.model_validate({"speed": 1, "now_s": t_s, "replicas": replicas})
        for t_s, replicas in polls
    )
    defaults = {"started_s": 5.0, "ended_s": 15.0, "wall_s": 10.0, "speed": 1.0}
    return ReplayResult(rows=tuple(rows), timeline=timeline, **(defaults | values))


def row(role, *, engine=(None, None, None), client=(None, None, None), status="ok", **values):
    names = ("ttft_s", "tpot_s", "e2e_s")
    return RequestRow(
        "r",
        0.0,
        0.0,
        status,
        0,
        role=role,
        **dict(zip(names, client, strict=True)),
        **{f"engine_{n}": v for n, v in zip(names, engine, strict=True)},
        **values,
    )


TWO_ROLES = result_of(
    [
        row("tuned", engine=(0.2, 0.04, 2.0), client=(0.3, 0.05, 2.5)),
        row("tuned", engine=(0.4, 0.06, 4.0), client=(0.5, 0.07, 4.5)),
        row("holdout", engine=(0.1, None, 1.0), client=(0.2, None, 1.5)),
        row(None, status="HTTP 500: no"),
        row(None, status="interrupted"),
    ],
    [
        (
            0,
            [
                replica("a", "tuned", 0.0, energy_j=100.0, generation_tokens=10, windows=1),
                replica("b", "tuned", 0.0, energy_j=0.0, clock_changes=2),
                replica("h", "holdout", 0.0, energy_j=50.0, sm_clock_mhz=2000),
            ],
        ),
        (
            10,
            [
                replica(
                    "a",
                    "tuned",
                    10.0,
                    energy_j=1100.0,
                    generation_tokens=210,
                    windows=13,
                    sm_clock_mhz=1400,
                ),
                replica(
                    "b",
                    "tuned",
                    10.0,
                    energy_j=600.0,
                    generation_tokens=200,
                    prompt_tokens=7,
                    clock_changes=5,
                ),
                replica(
                    "h",
                    "holdout",
                    10.0,
                    energy_j=1050.0,
                    generation_tokens=100,
                    sm_clock_mhz=2000,
                ),
            ],
        ),
    ],
)


def test_groups_by_hand():
    comparison = summarise(TWO_ROLES)
    tuned, holdout = comparison.groups
    assert (tuned.role, holdout.role) == ("tuned", "holdout")
    assert (tuned.replicas, tuned.requests, tuned.failed) == (2, 2, 0)
    assert (tuned.prompt_tokens, tuned.output_tokens) == (7, 400)
    assert tuned.energy_j == 1600.0
    assert tuned.mean_power_w == 80.0  # 1600 J in two times 10 s
    assert tuned.energy_per_output_token_j == 4.0
    assert tuned.e2e_s.mean == 3.0
    assert tuned.edp_j_s == 4800.0
    assert tuned.edp_per_output_token_j_s == 12.0
    assert (tuned.clock_changes, tuned.windows) == (3, 12)
    assert tuned.sm_clock_mhz == pytest.approx(1100.0)  # means 1200 and 1000
    assert holdout.sm_clock_mhz == pytest.approx(2000.0)
    assert (holdout.energy_per_output_token_j, holdout.edp_j_s) == (10.0, 1000.0)
    assert holdout.tpot_s == Distribution()


def test_changes_by_hand():
    comparison = summarise(TWO_ROLES)
    changes = {name: change.mean for name, change in comparison.changes_percent.items()}
    # No lengths are stated, and it is too short to match loads.
    assert changes == pytest.approx(
        {
            "ttft_s.mean": 200.0,
            "e2e_s.mean": 200.0,
            "energy_per_output_token_j": -60.0,
            "edp_per_output_token_j_s": 20.0,
        }
    ), "of TPOT the holdout has none, groups of different size are not compared by energy"
    assert {change.half_width for change in comparison.changes_percent.values()} == {None}
    for doubt in ("Too short for intervals: it takes 300 s", "change of p50 and p95 and p99: p50"):
        assert any(doubt in note for note in comparison.notes)
    assert any("does not state tokens" in note for note in comparison.notes)


def test_totals_and_the_clients_view():
    comparison = summarise(TWO_ROLES)
    assert (comparison.requests, comparison.failed, comparison.interrupted_requests) == (5, 1, 1)
    assert comparison.errors == {"HTTP 500: no": 1}
    assert comparison.duration_s == 10.0
    assert comparison.latency_source == "engine"
    assert comparison.client_e2e_s.mean == pytest.approx(8.5 / 3)
    (note,) = (note for note in comparison.notes if "failed" in note)
    assert note.startswith("1 failed"), "the interrupted one did not fail"


def test_percentiles_interpolate_linearly():
    values = [float(n) for n in range(1, 102)]
    assert Distribution.of([*values, None]) == Distribution(101, 51.0, 51.0, 96.0, 100.0)
    assert Distribution.of([1.0, 2.0]).p95 == pytest.approx(1.95)
    assert Distribution.of([None]) == Distribution(0, None, None, None, None)


def test_client_latencies_if_any_answer_lacks_the_engines():
    rows = [row(None, engine=(0.1, 0.1, 0.1), client=(1, 1, 1)), row(None, client=(3, 3, 3))]
    comparison = summarise(result_of(rows))
    assert comparison.latency_source == "client"
    assert comparison.groups[0].ttft_s.mean == 2.0


def test_a_server_without_status_or_roles():
    rows = [row(None, client=(1, 2, 3), prompt_tokens=5, output_tokens=6)] * 2
    comparison = summarise(result_of(rows))
    (group,) = comparison.groups
    assert (group.role, group.replicas, group.requests) == ("all", None, 2)
    assert (group.prompt_tokens, group.output_tokens) == (10, 12)
    assert (group.energy_j, group.mean_power_w, group.edp_j_s, group.windows) == (None,) * 4
    assert set(group.sm_clock_over_time_mhz) == {None}
    assert comparison.changes_percent == {}
    no_comparison, no_energy = comparison.notes
    assert "tuned" in no_comparison
    assert "/agft/status" in no_energy


def test_one_role_only():
    polls = [(t, [replica("a", "tuned", t, energy_j=9 * t)]) for t in (0.0, 1.0)]
    comparison = summarise(result_of([row("tuned")], polls))
    assert [group.role for group in comparison.groups] == ["tuned"]
    assert comparison.changes_percent == {}
    assert "tuned" in comparison.notes[0]


def test_nothing_at_all():
    comparison = summarise(result_of())
    assert comparison.groups[0].requests == 0
    assert comparison.groups[0].e2e_s == Distribution()


def test_failed_requests_break_the_slo_and_interrupted_ones_do_not():
    rows = [
        row("tuned", engine=(0.1, 0.1, 1.0)),
        row("tuned", engine=(0.1, None, 1.0)),
        row("tuned", engine=(0.1, 0.3, 1.0)),
        row("tuned", status="timeout after 1 s"),
        row("tuned", status="interrupted"),
    ]
    polls = [(0, [replica("a", "tuned", 0.0)])]
    (group,) = summarise(result_of(rows, polls), slo=Slo(ttft_s=0.1, tpot_s=0.2)).groups
    assert group.slo_attainment == 0.5
    assert summarise(result_of(rows, polls)).groups[0].slo_attainment is None
    assert not Slo(e2e_s=1.0).is_met((None, None, 1.5))


def test_replicas_that_come_and_go():
    polls = [
        (0, [replica("old", "tuned", 0.0), replica("h", "holdout", 0.0)]),
        (1, [replica("old", "tuned", 1.0, energy_j=10.0), replica("h", "holdout", 1.0)]),
        (2, [replica("new", "tuned", 2.0, energy_j=500.0), replica("h", "holdout", 2.0)]),
        (3, [replica("new", "tuned", 3.0, energy_j=530.0), replica("h", "holdout", 3.0)]),
    ]
    comparison = summarise(result_of((), polls))
    tuned = comparison.groups[0]
    assert (tuned.replicas, tuned.energy_j, tuned.mean_power_w) == (2, 40.0, 20.0)
    old, new = (note for note in comparison.notes if note.startswith("Replica"))
    assert re.search(r"\bold\b.* until 1\.0 s", old)
    assert re.search(r"\bnew\b.* from 2\.0 s", new)


def test_a_dead_replica_is_named():
    polls = [(0, [replica("a", "tuned", 0.0)]), (1, [replica("a", "tuned", 0.0, alive=False)])]
    notes = summarise(result_of((), polls)).notes
    assert any(re.search(r"\ba\b.* until 0\.0 s", note) for note in notes)


def test_a_change_of_role_splits_the_energy():
    polls = [
        (0, [replica("a", "tuned", 0.0)]),
        (1, [replica("a", "holdout", 1.0, energy_j=10.0)]),
        (2, [replica("a", "holdout", 2.0, energy_j=40.0)]),
    ]
    comparison = summarise(result_of((), polls))
    assert [group.energy_j for group in comparison.groups] == [10.0, 30.0]
    assert any("changed its role" in note for note in comparison.notes)


def test_a_counter_that_restarts_never_counts_backwards():
    polls = [
        (0, [replica("a", "tuned", 0.0, energy_j=1000.0, windows=50)]),
        (1, [replica("a", "tuned", 1.0, energy_j=3.0, windows=2)]),
        (2, [replica("a", "tuned", 2.0, energy_j=10.0, windows=4)]),
    ]
    comparison = summarise(result_of((), polls))
    assert (comparison.groups[0].energy_j, comparison.groups[0].windows) == (10.0, 4)
    assert any("Counters of replica a restarted" in note for note in comparison.notes)


def test_the_clock_is_weighted_by_time_not_by_reading():
    clocks = {0.0: 1000, 1.0: 1000, 1.5: 2000, 9.5: 2000, 10.0: 1000}
    polls = [(t, [replica("a", "tuned", t, sm_clock_mhz=mhz)]) for t, mhz in clocks.items()]
    group = summarise(result_of((), polls)).groups[0]
    # 1 s at 1000, 0.5 s rising, 8 s at 2000, 0.5 s falling
    assert group.sm_clock_mhz == pytest.approx((1000 + 750 + 16000 + 750) / 10)
    over_time = group.sm_clock_over_time_mhz
    assert len(over_time) == 60
    assert np.mean(over_time) == pytest.approx(group.sm_clock_mhz)
    assert over_time[0] == pytest.approx(1000)
    assert over_time[30] == pytest.approx(2000)
    # the last column, a sixth of a second, falls from 1333 to 1000 MHz
    assert over_time[-1] == pytest.approx(1000 + 2000 / 12)


def test_no_clock_where_no_replica_was_seen():
    late = [replica("b", "holdout", t) for t in (5.0, 10.0)]
    polls = [
        (0, [replica("a", "tuned", 0.0)]),
        (5, [replica("a", "tuned", 5.0), late[0]]),
        (10, [replica("a", "tuned", 10.0), late[1]]),
    ]
    holdout = summarise(result_of((), polls)).groups[1]
    assert holdout.sm_clock_over_time_mhz[:30] == (None,) * 30
    assert holdout.sm_clock_over_time_mhz[30:] == pytest.approx((1000.0,) * 30)


def test_what_went_wrong_is_noted():
    notes = summarise(result_of(interrupted=True, settled=False, missed_polls=2)).notes
    for text in ("was interrupted", "not at rest", "2 polls"):
        assert any(text in note for note in notes)


def test_json_has_null_and_never_nan():
    for result in (TWO_ROLES, result_of()):
        text = json.dumps(summarise(result, slo=Slo(ttft_s=1.0)).to_json(), allow_nan=False)
        read = json.loads(text)
        assert read["format"] == 2
        assert read["slo"] == {"ttft_s": 1.0, "tpot_s": None, "e2e_s": None}
        assert len(read["groups"][0]["sm_clock_over_time_mhz"]) == 60

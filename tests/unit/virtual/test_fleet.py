"""Fleets in virtual time: what must be conserved, equal, and known in closed form."""

import dataclasses
import tracemalloc

import pytest

from agft_ray.policy.statistics import Source
from agft_ray.settings import TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.physics import idle_power_w
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.virtual.replica import Listeners, VirtualReplica
from agft_ray.virtual.run import FleetSetup, run_fleet
from agft_ray.virtual.sharing import ExperienceSharing
from agft_ray.workloads.generators import generate_conversation
from agft_ray.workloads.requests import Request

GPU = load_gpu_profile("rtx_a6000")
FIXED = {"name": "fixed", "sm_clock_mhz": 1230}


def make_setup(policy=None, *, tuner=None, **changes):
    config = TunerConfig.model_validate({"policy": policy or {"name": "default"}, **(tuner or {})})
    values = {"duration_s": 120.0, "seed": 7, **changes}
    return FleetSetup(gpu=GPU, model="llama-3.1-8b", engine=EngineConfig(), tuner=config, **values)


@dataclasses.dataclass
class Rows:
    """Everything a run tells."""

    totals: object
    requests: list
    windows: list
    records: list
    progress: list


def run(requests, setup):
    rows = Rows(None, [], [], [], [])
    rows.totals = run_fleet(
        requests,
        setup,
        on_request=lambda replica, timings: rows.requests.append((replica, timings)),
        on_window=rows.windows.append,
        on_record=lambda replica, record: rows.records.append((replica, record)),
        on_progress=rows.progress.append,
    )
    return rows


def conversation(rate_per_s=2.0, duration_s=120.0, seed=3):
    return list(generate_conversation(rate_per_s, duration_s, seed))


@pytest.mark.parametrize("router", ["power_of_two", "round_robin"])
@pytest.mark.parametrize("policy", [FIXED, {"name": "agft"}])
def test_nothing_is_lost_or_counted_twice(router, policy):
    requests = conversation()
    rows = run(iter(requests), make_setup(policy, replicas=3, router=router))
    totals, windows = rows.totals, rows.windows
    answered = [timings for _, timings in rows.requests]
    assert sorted(int(t.request_id) for t in answered) == [int(r.request_id) for r in requests]
    assert (totals.requests, totals.rejected) == (len(requests), 0)
    assert totals.output_tokens == sum(r.output_tokens for r in requests)
    assert totals.prompt_tokens == sum(r.prompt_tokens for r in requests)
    assert sum(w.generation_tokens for w in windows) == totals.output_tokens
    assert sum(w.prompt_tokens for w in windows) == totals.prompt_tokens
    assert sum(w.ttft_count for w in windows) == len(requests)
    assert sum(w.itl_count for w in windows) == totals.output_tokens - len(requests)
    ttft_s, e2e_s = sum(t.ttft_s for t in answered), sum(t.e2e_s for t in answered)
    assert sum(w.ttft_sum_s for w in windows) == pytest.approx(ttft_s, rel=1e-9)
    assert sum(w.itl_sum_s for w in windows) == pytest.approx(e2e_s - ttft_s, rel=1e-9)
    assert sum(w.energy_j for w in windows) == pytest.approx(totals.energy_j, rel=1e-9)
    assert sum(r.energy_j for r in totals.replicas) == pytest.approx(totals.energy_j, rel=1e-12)
    assert sum(r.engine.generation_tokens for r in totals.replicas) == totals.output_tokens
    assert sum(r.clock_changes for r in totals.replicas) == totals.clock_changes


def test_the_grid_covers_the_run_without_gaps_whatever_the_tuner_does():
    requests = conversation(duration_s=90.0)
    setup = make_setup({"name": "agft"}, replicas=2, duration_s=90.5, grid_s=1.5)
    rows = run(requests, setup)
    count = round(rows.totals.duration_s / 1.5)
    assert rows.totals.duration_s == count * 1.5 >= 90.5
    for replica in range(2):
        windows = [w for w in rows.windows if w.replica == replica]
        assert [w.index for w in windows] == list(range(count))
        assert [(w.start_s, w.end_s) for w in windows] == [
            (i * 1.5, (i + 1) * 1.5) for i in range(count)
        ]
        assert (windows[-1].running, windows[-1].waiting) == (0, 0)
    assert rows.progress == sorted(rows.progress)
    assert rows.progress[-1] == rows.totals.duration_s
    assert len(rows.progress) <= count + 2


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    requests = conversation()
    runs = [
        run(requests, make_setup({"name": "agft"}, replicas=3, seed=seed)) for seed in (7, 7, 8)
    ]
    assert runs[0] == runs[1]
    assert runs[0].totals.energy_j != runs[2].totals.energy_j


def test_replicas_have_streams_of_their_own():
    setup = make_setup()
    streams = {setup.stream(replica) for replica in range(100)}
    assert len(streams) == 100
    assert not streams & {make_setup(seed=8).stream(replica) for replica in range(100)}


def test_a_replica_does_not_notice_how_its_fleet_is_advanced():
    requests = conversation(rate_per_s=1.0)
    setup = make_setup({"name": "agft"}, replicas=2, router="round_robin", tuner=ALONE)
    fleet = run(requests, setup)
    windows = []
    replica = VirtualReplica(setup, 1, Listeners(on_window=windows.append))
    for request in requests[1::2]:
        replica.advance_to(request.arrival_s)
        replica.submit(request)
    t_s = 0.0
    while t_s < fleet.totals.duration_s:
        t_s += 0.125
        replica.advance_to(t_s)
    expected = [w for w in fleet.windows if w.replica == 1]
    for one, other in zip(windows, expected, strict=True):
        assert one.arm == other.arm
        numbers = [dataclasses.astuple(dataclasses.replace(w, arm=0)) for w in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, abs=1e-9)


ALONE = {"share_experience": False}


def test_the_idle_fleet_draws_what_the_formula_says():
    rows = run([], make_setup(replicas=2, duration_s=20.0))
    governor = GPU.governor
    expected_j = governor.idle_delay_s * idle_power_w(GPU.power, GPU.max_sm_clock_mhz)
    expected_j += (20.0 - governor.idle_delay_s) * idle_power_w(
        GPU.power, governor.idle_sm_clock_mhz
    )
    assert rows.totals.energy_j == pytest.approx(2 * expected_j, rel=1e-9)
    late = [w.sm_clock_mhz for w in rows.windows if w.start_s >= governor.idle_delay_s]
    assert late == pytest.approx([governor.idle_sm_clock_mhz] * 18, rel=1e-9)
    assert rows.totals.requests == 0


def test_a_fixed_clock_is_what_the_windows_show():
    rows = run(conversation(), make_setup(FIXED))
    late = [w for w in rows.windows if w.start_s >= 10.0 and w.arm == 1230]
    assert len(late) > 30
    assert all(w.sm_clock_mhz == pytest.approx(1230, abs=1e-6) for w in late[1:])


def test_a_tuner_that_waits_for_work_is_woken_by_a_request():
    requests = [Request(str(i), 1.0 + i, 100, 30) for i in range(40)]
    requests.append(Request("late", 70.013, 100, 30))
    rows = run(requests, make_setup({"name": "agft"}, duration_s=80.0))
    woken = [record for _, record in rows.records if record.note == "woken"]
    assert [record.t_s for record in woken] == [70.013]
    idle = [record.decision for _, record in rows.records if 60 < record.t_s < 70]
    assert {(decision.arm, decision.reason) for decision in idle} == {(210, "idle")}
    assert woken[0].decision.reason != "idle"


def test_requests_that_can_never_be_served_are_counted_and_passed_over():
    requests = [
        Request("good", 1.0, 100, 5),
        Request("long", 2.0, 9000, 5),
        Request("better", 3.0, 100, 5),
    ]
    rows = run(requests, make_setup(duration_s=0.0))
    assert (rows.totals.requests, rows.totals.rejected) == (2, 1)
    assert [timings.request_id for _, timings in rows.requests] == ["good", "better"]


def test_holdouts_stay_at_default_clocks():
    setup = make_setup({"name": "agft"}, replicas=3, tuner={"holdout_replicas": 1})
    rows = run(conversation(), setup)
    changes = [replica.clock_changes for replica in rows.totals.replicas]
    assert changes[0] == 0
    assert min(changes[1:]) > 5
    reasons = {record.decision.reason for replica, record in rows.records if replica == 0}
    assert reasons == {"holdout"}


def test_experience_is_shared_each_replicas_once():
    setup = make_setup({"name": "agft"}, replicas=2)
    replicas = [VirtualReplica(setup, index, Listeners()) for index in range(2)]
    sharing = ExperienceSharing(setup, replicas, replicas[0].clock)
    for request in conversation(rate_per_s=1.0, duration_s=40.0):
        replicas[0].advance_to(request.arrival_s)
        replicas[0].submit(request)
    replicas[0].advance_to(60.0)
    for _ in range(3):
        sharing.exchange()
    learned = replicas[0].tuner.policy.experience()
    replicas[1].advance_to(63.0)
    bandit = replicas[1].tuner.policy._learner.bandit
    assert bandit.count(0, Source.PRIOR) == learned.counts[learned.arms_mhz.index(0)] > 0
    assert bandit.count(0, Source.OWN) == 0


@pytest.mark.parametrize(
    ("policy", "replicas", "tuner", "needed"),
    [
        ({"name": "agft"}, 2, {}, True),
        ({"name": "agft"}, 1, {}, False),
        ({"name": "agft"}, 2, {"share_experience": False}, False),
        (FIXED, 2, {}, False),
    ],
)
def test_exchanges_go_on_only_where_there_is_something_to_share(policy, replicas, tuner, needed):
    setup = make_setup(policy, replicas=replicas, tuner=tuner)
    members = [VirtualReplica(setup, index, Listeners()) for index in range(replicas)]
    assert ExperienceSharing(setup, members, members[0].clock).is_needed is needed


def test_memory_does_not_grow_with_the_run():
    sizes = {}

    def on_progress(t_s):
        for mark in (400, 1600):
            if t_s >= mark and mark not in sizes:
                sizes[mark] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        run_fleet(
            generate_conversation(1.0, 1700.0, seed=1), make_setup(FIXED), on_progress=on_progress
        )
    finally:
        tracemalloc.stop()
    assert sizes[1600] - sizes[400] < 100_000

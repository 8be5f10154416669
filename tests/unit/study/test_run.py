"""One run from its job: the figures against its own rows, and the same result every time."""

import csv
import os

import numpy as np
import pytest

from agft_ray.errors import AgftError
from agft_ray.policy.agft.policy import AgftConfig
from agft_ray.policy.reference.policy import AgftReferenceConfig
from agft_ray.results.distribution import Slo
from agft_ray.results.record import read_runs, write_runs
from agft_ray.study.policy_specs import parse_policy
from agft_ray.study.pool import Processes, StoppedError, one_by_one
from agft_ray.study.rows import CHUNK, RunRows, Spill, read_columns
from agft_ray.study.run import Job, perform
from agft_ray.study.scenario import Scenario
from agft_ray.study.study import Study, run_folder
from agft_ray.virtual.run import GridWindow, run_virtual
from agft_ray.workloads.requests import RequestTimings

SHORT = Scenario(rate_per_s=1.0, duration_s=60.0, slo={"ttft_s": 0.3, "tpot_s": 0.03})


def silent(t_s):
    pass


def no_phase(name, runs):
    return lambda number, t_s: None


def run(scenario=SHORT, policy="fixed:1230", seed=0, **values):
    return perform(Job(scenario, parse_policy(policy), seed, **values), silent)


def study(*policies, seeds=(0, 1), scenario=SHORT, **values):
    return Study(scenario, [parse_policy(policy) for policy in policies], seeds, **values)


@pytest.mark.parametrize("policy", ["volta:tpot_slo_s=0.03", "agft"])
def test_few_runs_of_a_fleet_are_spread_over_the_processes_with_the_same_records(
    policy, tmp_path, monkeypatch
):
    monkeypatch.setattr("agft_ray.study.study.WORTH_SPREADING_S", 100.0)
    scenario = SHORT.model_copy(update={"replicas": 3, "rate_per_s": 3.0})
    found, files = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        one = study(policy, seeds=(4,), scenario=scenario, folder=folder, processes=processes)
        assert [job.workers for job in one._spread([one._template(4)])] == [processes]
        found.append(one.run(one_by_one, no_phase))
        files.append([p.read_bytes() for p in sorted(folder.rglob("*.csv"))])
    assert found[0] == found[1]
    assert files[0] == files[1]
    assert len(files[0]) == 4


def test_short_runs_and_many_are_not_spread():
    scenario = SHORT.model_copy(update={"replicas": 300})
    many = study("fixed:1230", scenario=scenario, processes=4)
    jobs = [many._template(seed) for seed in range(5)]
    assert [job.workers for job in many._spread(jobs)] == [1] * 5
    assert [job.workers for job in many._spread(jobs[:2])] == [2, 2]
    short = study("fixed:1230", processes=4)
    assert [job.workers for job in short._spread(jobs[:1])] == [1]


# -- one run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    scenario = SHORT.model_copy(update={"replicas": 2})
    return run(scenario, folder=folder).record, folder


def test_the_record_agrees_with_its_rows(with_rows):
    record, folder = with_rows
    rows = read_columns(folder / "requests.csv", ("replica", "ttft_s", "tpot_s", "e2e_s"))
    windows = read_columns(folder / "windows.csv", ("replica", "energy_j", "sm_clock_mhz"))
    assert record.requests == len(rows["e2e_s"])
    assert set(rows["replica"]) == {0.0, 1.0}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        known = rows[name][~np.isnan(rows[name])]
        latency = getattr(record, name)
        assert latency.mean == pytest.approx(known.mean(), rel=1e-12)
        assert latency.p99 == np.percentile(known, 99)
    assert record.energy_j == pytest.approx(windows["energy_j"].sum(), rel=1e-9)
    assert record.edp_j_s == record.energy_j * record.e2e_s.mean
    assert record.mean_power_w == pytest.approx(record.energy_j / record.duration_s / 2)
    assert record.sm_clock_mhz == pytest.approx(windows["sm_clock_mhz"].mean())
    kept = (rows["ttft_s"] <= 0.3) & ~(rows["tpot_s"] > 0.03)
    assert record.slo_attainment == kept.mean()
    assert 0 < record.slo_attainment < 1


def test_the_rows_have_their_columns(with_rows):
    _, folder = with_rows
    with (folder / "requests.csv").open(newline="") as file:
        header, first, *_ = csv.reader(file)
    assert header[0] == "replica"
    assert len(first) == len(header) == 8
    assert sorted(os.listdir(folder)) == ["requests.csv", "windows.csv"]


def test_a_run_is_that_of_run_virtual():
    """The same loop, by another way."""
    record = run(seed=3).record
    scenario = SHORT.model_copy(update={"duration_s": 60.0})
    spec = parse_policy("fixed:1230")
    other = run_virtual(
        scenario.requests(3), scenario.tuner(spec.settings), duration_s=60.0, seed=3
    )
    assert (record.energy_j, record.duration_s) == (other.energy_j, other.duration_s)
    assert record.clock_changes == other.clock_changes
    assert record.requests == len(other.timings)


def test_a_longer_run_of_the_same_seed_begins_the_same(tmp_path):
    for duration_s in (60.0, 90.0):
        run(SHORT.model_copy(update={"duration_s": duration_s}), folder=tmp_path / f"{duration_s}")
    short, long = (
        read_columns(tmp_path / f"{d}" / "windows.csv", ("energy_j",))["energy_j"]
        for d in (60.0, 90.0)
    )
    assert (short[:30] == long[:30]).all()


def test_keep_is_a_seeded_share_before_routing(conversation_trace):
    scenario = Scenario(trace=str(conversation_trace), keep=0.1, duration_s=300.0, replicas=3)
    ids = [[request.request_id for request in scenario.requests(seed)] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    everything = sum(1 for _ in scenario.model_copy(update={"keep": 1.0}).requests(0))
    assert len(ids[0]) == pytest.approx(0.1 * everything, rel=0.3)
    assert run(scenario.model_copy(update={"duration_s": 60.0})).record.trace == (
        "azure2023_conv.csv"
    )


def test_clocks_are_measured_against_the_best_ones(tmp_path):
    long = SHORT.model_copy(update={"duration_s": 200.0, "slo": Scenario(duration_s=1.0).slo})
    default = run(long, "default", folder=tmp_path)
    rows = read_columns(
        tmp_path / "windows.csv", ("energy_j", "best_energy_j", "regret_j", "busy_s", "over_bound")
    )
    record = default.record
    assert record.energy_regret_j == pytest.approx(rows["regret_j"].sum())
    assert record.energy_regret == pytest.approx(
        rows["regret_j"].sum() / rows["best_energy_j"].sum()
    )
    # Default clocks are the bound: they keep it, and take whatever energy that costs.
    assert record.windows_over_bound == 0.0 == rows["over_bound"].max()
    assert rows["energy_j"] - rows["best_energy_j"] == pytest.approx(rows["regret_j"])
    assert record.windows_to_low_regret is None
    slow = run(long, "fixed:600", default=default).record
    assert slow.windows_over_bound > 0.98  # the lock takes a moment to come into force
    assert slow.worst_exploration_tpot_ratio > 1.3
    good = run(long, "pair:1455/1050", default=default).record
    assert good.windows_to_low_regret < 10
    assert good.energy_regret < 0.01


def test_a_run_without_an_slo_has_no_attainment():
    assert (
        run(SHORT.model_copy(update={"slo": Scenario(duration_s=1.0).slo})).record.to_json()[
            "slo_attainment"
        ]
        is None
    )


# -- studies ---------------------------------------------------------------------------------------


def test_the_same_results_whatever_the_number_of_processes(tmp_path):
    files = []
    for name, pool in (("one", one_by_one), ("two", Processes(2)), ("again", one_by_one)):
        records = study("agft", "fixed:1230", "pair:1500/1230").run(pool, no_phase)
        write_runs(tmp_path / name, records)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] == files[2]
    records = read_runs(tmp_path / "one")
    assert [(record.policy, record.seed) for record in records] == [
        (policy, seed)
        for policy in ("default", "agft", "fixed:1230", "pair:1500/1230")
        for seed in (0, 1)
    ]
    assert len({record.energy_j for record in records}) == len(records)


def test_default_clocks_run_once_if_named_too():
    records = study("default", "fixed:1230", seeds=(0,)).run(one_by_one, no_phase)
    assert [record.policy for record in records] == ["default", "fixed:1230"]


def test_what_was_never_run_has_no_regret():
    default, bound = study("best_steps", seeds=(0,)).run(one_by_one, no_phase)
    assert default.energy_regret > 0
    names = ("energy_regret_j", "energy_regret", "windows_to_low_regret", "windows_over_bound")
    assert all(bound.value(name) is None for name in names)
    assert not any("converge" in name for name in bound.to_json())


def test_rows_of_named_policies_are_kept(tmp_path):
    study("fixed:1230", seeds=(4,), folder=tmp_path).run(one_by_one, no_phase)
    assert (run_folder(tmp_path, "default", 4) / "windows.csv").exists()
    assert (tmp_path / "fixed-1230" / "seed-4" / "requests.csv").exists()


def test_no_request_is_said_so():
    nothing = SHORT.model_copy(update={"duration_s": 0.001})
    with pytest.raises(AgftError, match="--duration"):
        study("agft", scenario=nothing).run(one_by_one, no_phase)


def test_an_interrupted_study_keeps_what_was_finished():
    stopped = study("fixed:1230", "fixed:900")

    def pool(work, jobs, on_progress):
        for number, result in one_by_one(work, jobs, on_progress):
            yield number, result
            if stopped.records:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(pool, no_phase)
    assert [(r.policy, r.seed) for r in stopped.records] == [
        ("default", 0),
        ("default", 1),
        ("fixed:1230", 0),
    ]


# -- scenarios -------------------------------------------------------------------------------------


def test_the_reference_keeps_its_own_windows():
    assert SHORT.tuner(AgftReferenceConfig()).window_s == 0.8
    assert SHORT.tuner(AgftConfig()).window_s == SHORT.window_s == 2.0


def test_a_changed_profile_changes_the_run():
    idle = SHORT.model_copy(update={"profile_values": {"governor.idle_sm_clock_mhz": 210}})
    changed, nominal = run(idle, "default").record, run(policy="default").record
    assert changed.energy_j < nominal.energy_j
    assert changed.profile_change == "governor.idle_sm_clock_mhz=210"


# -- rows and pools --------------------------------------------------------------------------------


def test_a_spill_gives_back_what_it_took():
    spill = Spill()
    values = np.random.default_rng(0).normal(size=CHUNK + 10)
    for value in values[:-1]:
        spill.append(value)
    assert (spill.values() == values[:-1]).all()
    spill.append(values[-1])
    assert (spill.values() == values).all()
    spill.close()


def window(replica, index, **values):
    sums = {"energy_j": 1.0, "itl_sum_s": 0.5, "itl_count": 10, "sm_clock_mhz": 1000.0}
    sums |= {"best_energy_j": 1.0, "regret_j": 0.0, "busy_s": 0.0, "over_bound": 0}
    rest = dict.fromkeys(
        ("ttft_sum_s", "ttft_count", "generation_tokens", "prompt_tokens", "running", "waiting"), 0
    )
    return GridWindow(
        replica=replica, index=index, start_s=2.0 * index, end_s=2.0 * index + 2.0, arm=None,
        **(sums | rest | values),
    )  # fmt: skip


def test_windows_are_summed_over_the_fleet_in_their_order():
    rows = RunRows(2)
    for replica, index in ((0, 0), (0, 1), (1, 0), (0, 2), (1, 1)):
        rows.on_window(window(replica, index, energy_j=100.0 * replica + index))
    assert rows.windows().energy_j.tolist() == [100.0, 102.0]
    assert rows.windows().itl_count.tolist() == [20.0, 20.0]
    assert rows.sm_clock_mhz == 1000.0


def test_regret_is_summed_over_the_fleet_and_bounds_over_its_busy_replicas():
    rows = RunRows(2)
    for replica in (0, 1):
        for index in range(4):
            over = int(replica == 1 and index == 2)
            busy_s = 1.0 if index else 0.0
            regret_j = 10.0 if index == 0 else 0.0
            rows.on_window(
                window(
                    replica, index, best_energy_j=100.0, regret_j=regret_j, busy_s=busy_s,
                    over_bound=over,
                )
            )  # fmt: skip
    regret = rows.clock_regret()
    assert (regret.energy_j, regret.relative) == (20.0, 20.0 / 800.0)
    assert (regret.over_bound, regret.windows_to_low) == (1 / 6, 1)


def test_an_slo_is_counted_as_requests_finish():
    rows = RunRows(1, Slo(ttft_s=1.0, tpot_s=0.1))
    for ttft_s, e2e_s, tokens in ((0.5, 1.0, 11), (2.0, 2.5, 11), (0.5, 9.0, 11), (0.5, 9.0, 1)):
        rows.on_request(0, RequestTimings("r", 0.0, 5, tokens, ttft_s, e2e_s))
    assert (rows.requests, rows.kept_slo) == (4, 2)
    ttft_s, tpot_s, _ = rows.distributions()
    assert (ttft_s.count, tpot_s.count) == (4, 3)


def test_a_broken_run_leaves_no_rows(tmp_path):
    def report(t_s):
        raise StoppedError

    with pytest.raises(StoppedError):
        perform(Job(SHORT, parse_policy("default"), 0, folder=tmp_path / "rows"), report)
    assert os.listdir(tmp_path / "rows") == []


def twice(job, report):
    report(job)
    return 2 * job


def wait_for_ever(job, report):
    while True:
        report(1.0)


def test_processes_report_and_return():
    seen = {}
    done = dict(Processes(2)(twice, [1.0, 2.0, 3.0], lambda number, at: seen.update({number: at})))
    assert done == {0: 2.0, 1: 4.0, 2: 6.0}
    assert set(seen) == {0, 1, 2}


def no_progress(number, at):
    pass


def own_pid(job, report):
    return os.getpid()


def test_processes_stay_for_the_next_call_and_for_more_jobs():
    pool = Processes(1)
    first, second = (dict(pool(own_pid, [0], no_progress))[0] for _ in range(2))
    assert first == second != os.getpid()
    assert len(dict(pool(twice, [1.0] * 300, no_progress))) == 300


def test_after_leaving_early_the_pool_starts_anew():
    pool = Processes(2)
    for number, result in pool(twice, [1.0, 2.0, 3.0], no_progress):
        assert result == 2.0 * (number + 1)
        break
    assert dict(pool(twice, [4.0], no_progress)) == {0: 8.0}


def test_leaving_early_stops_the_jobs():
    def stop(number, at):
        if at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Processes(2)(wait_for_ever, [0], stop))

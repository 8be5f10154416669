"""`agft-ray simulate` as a user meets it."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from golden_files import assert_golden, sections
from rich.console import Console

from agft_ray.actors import simulate_on_ray
from agft_ray.cli.app import main
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.study import pool
from agft_ray.study.console import print_study, study_progress
from agft_ray.study.policy_specs import parse_policy
from agft_ray.study.pool import one_by_one
from agft_ray.study.scenario import Scenario
from agft_ray.study.sensitivity import (
    End,
    print_sweep,
    ranges_of,
    sweep,
    swept_ranges,
    verdict,
)
from agft_ray.study.study import Study
from unit.results.test_record import RECORD

SHORT = ["simulate", "--rate", "1", "--duration", "40", "--jobs", "1"]


def simulated(tmp_path, *arguments):
    path = tmp_path / "out.json"
    assert main([*SHORT, *arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())["runs"]


def test_a_comparison_from_the_command_line(tmp_path, capsys):
    runs = simulated(
        tmp_path, "--policy", "fixed:1230", "--seed", "0..1", "--out", str(tmp_path / "rows")
    )
    assert [(run["policy"], run["seed"]) for run in runs] == [
        ("default", 0),
        ("default", 1),
        ("fixed:1230", 0),
        ("fixed:1230", 1),
    ]
    assert runs[0]["trace"] == "conversation@1"
    assert runs[0]["slo_attainment"] is None
    text = capsys.readouterr().out
    assert "fixed:1230" in text
    assert "nan" not in text.lower()
    assert max(map(len, text.splitlines())) <= 100
    manifest = json.loads((tmp_path / "rows" / "study.json").read_text())
    assert manifest["seeds"] == [0, 1]
    assert manifest["versions"]["agft_ray"]
    assert (tmp_path / "rows" / "runs.json").read_text() == (tmp_path / "out.json").read_text()


@pytest.mark.parametrize("named", [["default"], ["fixed:1230", "default"]])
def test_default_clocks_come_first_wherever_they_are_named(tmp_path, named):
    options = [word for policy in named for word in ("--policy", policy)]
    policies = [run["policy"] for run in simulated(tmp_path, *options)]
    assert policies == ["default", *(policy for policy in named if policy != "default")]


def test_goals_reach_the_policy(tmp_path, capsys):
    (tmp_path / "weights.csv").write_text("time,weight\n2026-01-01T00:00Z,0\n")
    changes = {}
    for goals in (
        ["--bound", "0.1"],
        ["--bound", "0.05"],
        ["--slo-e2e", "99", "--slo-tpot", "0.06"],
        ["--objective", "edp", "--bound", "0.5"],
        ["--energy-weight", str(tmp_path / "weights.csv")],
    ):
        runs = simulated(tmp_path, "--policy", "phases", *goals)
        changes[goals[0], goals[1]] = runs[1]["energy_j"] / runs[0]["energy_j"]
    assert len({*changes.values()}) == 5, "each leads to another run"


def test_searches_and_slo_from_the_command_line(tmp_path, capsys):
    arguments = ["--policy", "best_static", "--policy", "frontier", "--clock-step-mhz", "630"]
    runs = simulated(tmp_path, *arguments, "--slo-ttft", "1", "--slo-tpot", "0.05", "--details")
    policies = [run["policy"] for run in runs]
    assert (
        policies
        == [
            "default",
            *(f"fixed:{mhz}" for mhz in (840, 1470, 2100)),
            "best_static",
        ]
        or policies[1] == "fixed:210"
    )
    best = runs[-1]
    assert best["edp_j_s"] == min(run["edp_j_s"] for run in runs)
    assert f"fixed:{best['choice']}" in policies
    assert runs[0]["slo_attainment"] > 0.5
    assert runs[0]["slo_ttft_s"] == 1.0
    assert "SLO attainment, %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--policy", "agftt"], "'agftt'.*'agft'"),
        (["--policy", "fixed:100"], r"fixed\b.* 100 .* 210\.\.2100 MHz"),
        (["--policy", "pair:9999/900"], r"pair\b.* 9999 .* 210\.\.2100 MHz"),
        (["--policy", "volta"], "volta.* tpot_slo_s: .*--slo-tpot"),
        (["--gpu", "rtx_9999"], "'rtx_9999'.* a100_sxm_80gb, "),
        (["--model", "gpt-9"], "'gpt-9'.* llama-3.1-8b"),
        (["--bound", "0"], r"\bbound: .* 0, got 0\.0"),
        (["--energy-weight", "nowhere.csv"], r"energy_weight: nowhere\.csv: .*No such file"),
        (["--energy-weight", "http://host/x"], r"energy_weight: .*file in virtual time"),
        (["--keep", "0"], r"\bkeep: .* 0, got 0\.0"),
        (["--replicas", "0"], r"\breplicas: .* 1, got 0"),
        (["--router", "random"], r"\brouter: .*'power_of_two' or 'round_robin'"),
        (["--seed", "0..x"], r"--seed: .*0\.\.x"),
        (["--jobs", "0"], "--jobs: .* 1, got 0"),
        (["--engine", "max_num_seqs"], "--engine: .*'max_num_seqs': .*KEY=VALUE"),
        (["--engine", "max_num_seq=64"], r"\bmax_num_seq: .*'max_num_seqs'"),
        (["--window", "0.1"], r"\bwindow_s: .* 0\.5"),
        (["--trace", __file__], "--rate: .*--trace"),
        (["--trace", __file__, "--param", "cv=4"], "--param: "),
        (["--duration", "0.0001"], "--duration"),
        (["--policy", "frontier", "--clock-step-mhz", "20"], "--clock-step-mhz.* 15 MHz"),
        (["--worlds", "nominal,flat"], "--worlds: .*'flat'.* slow-host"),
        (["--worlds", "--out", "x"], "--out: .*--json"),
        (["--set", "power.cap_w"], "--set: .*'power.cap_w': .*PATH=VALUE"),
        (["--set", "power.cap=1"], r"power\.cap: names no number"),
        (["--set", "clock_change.median_s=9"], "does not contain the value used, 9"),
        (["--slo-tpot", "50000"], r"\btpot_s .* 50000 .* 50\?"),
    ],
)
def test_what_is_wrong_is_one_clear_line(capsys, arguments, named):
    assert main([*SHORT, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(named, " ".join(error.split())), error
    assert "Traceback" not in error


def test_a_generated_workload_needs_an_end(capsys):
    assert main(["simulate"]) == 2
    assert "duration_s: " in capsys.readouterr().err


def test_a_broken_trace_is_named_before_anything_runs(tmp_path, capsys):
    trace = tmp_path / "broken.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,100,10\n"
        "2023-11-16 18:15:47.6805900,many,10\n"
    )
    arguments = ["simulate", "--trace", str(trace), "--jobs", "1"]
    assert main(arguments) == 2
    assert f"{trace}: line 3: ContextTokens" in capsys.readouterr().err
    assert main([*arguments, "--skip-broken", "--policy", "fixed:1230"]) == 0
    assert f"skipped: {trace}: line 3" in capsys.readouterr().err


def test_what_was_finished_before_ctrl_c_is_written(tmp_path, monkeypatch, capsys):
    def pool_of(jobs):
        def interrupted(work, jobs, on_progress):
            for number, result in one_by_one(work, jobs, on_progress):
                yield number, result
                if len(jobs) > 1:
                    raise KeyboardInterrupt

        return interrupted

    monkeypatch.setattr(pool, "local_pool", pool_of)
    path = tmp_path / "out.json"
    policies = ["--policy", "fixed:1230", "--policy", "fixed:900"]
    assert main([*SHORT, *policies, "--json", str(path)]) == 130
    runs = json.loads(path.read_text())["runs"]
    assert [run["policy"] for run in runs] == ["default", "fixed:1230"]
    assert "Interrupted" in capsys.readouterr().out


def test_without_a_cluster_ray_is_refused_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*SHORT[:-2], "--ray"]) == 2
    error = capsys.readouterr().err
    assert "--ray" in error
    assert "'agft-ray[serve]'" in error


def test_a_job_on_the_cluster_is_the_job_here():
    def work(job, report):
        report(3.0)
        report(5.0)
        return 2 * job

    assert simulate_on_ray._silently(work, 4) == (5.0, 8)


# -- the terminal ----------------------------------------------------------------------------------


def printed(records, *, width=100, details=False, notes=()):
    console = Console(file=io.StringIO(), width=width)
    print_study(records, notes, console, details=details)
    return console.file.getvalue()


def records_of(*policies, seeds=(0, 1, 2)):
    return [
        replace(RECORD, policy=policy, seed=seed, energy_j=20000.0 / (1 + place) + 100.0 * seed)
        for place, policy in enumerate(policies)
        for seed in seeds
    ]


def test_changes_carry_intervals_over_several_seeds_only():
    several = printed(records_of("default", "agft"))
    row = next(line for line in several.splitlines() if line.strip().startswith("agft"))
    assert "±" in row
    # energies by seed: 20000, 20100, 20200 against 10000, 10100, 10200
    assert "-49.8±0.6" in row
    single = printed(records_of("default", "agft", seeds=(0,)))
    assert "±" not in single


def test_the_screen_of_a_study():
    """As one with several seeds, and as one with a single seed, whose runs keep an SLO or not."""
    several = records_of("default", "agft", "best_static")
    single = [
        replace(record, slo_attainment=share, choice=choice, **clocks)
        for record, share, choice, clocks in zip(
            records_of("default", "agft", "best_static", seeds=(0,)),
            (1.0, 0.975, None),
            (None, None, "1230,1230"),
            (
                {"energy_regret": 0.858, "windows_over_bound": 0.0},
                {"energy_regret": 0.0669, "windows_over_bound": 0.51, "windows_to_low_regret": 210},
                {},
            ),
            strict=True,
        )
    ]
    screens = {
        "several seeds": printed(several, notes=["a note [with brackets]"]),
        "a single seed, with details": printed(single, details=True),
        "no run": printed([], details=True),
    }
    assert_golden("study", sections(screens))


def test_ten_policies_fit_a_hundred_columns():
    names = ("default", "agft:alpha=2,seed=3,forgetting=0.99", *(f"fixed:{i}" for i in range(8)))
    text = printed(records_of(*names), details=True, notes=["a note [with brackets]"])
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "a note [with brackets]" in text
    assert "None" not in text


def test_progress_is_lines_where_there_is_no_terminal():
    now = iter(range(0, 1000, 6))
    console = Console(file=io.StringIO(), width=80)
    with study_progress(100.0, console=console, now_s=lambda: next(now)) as on_phase:
        on_progress = on_phase("policies", 2)
        on_progress(0, 50.0)
        on_progress(1, 25.0)
        on_progress(1, 100.0)
    first, *_, last = console.file.getvalue().splitlines()
    assert re.findall(r"\d+|policies", first) == ["policies", "2"]
    assert re.findall(r"\d+", last) == ["2", "2", "75"], "run 2 of 2 is the latest to begin"


def test_a_search_is_one_phase_whose_runs_become_more():
    now = iter(range(0, 1000, 20))
    console = Console(file=io.StringIO(), width=80)
    with study_progress(100.0, console=console, now_s=lambda: next(now)) as on_phase:
        on_phase("oracle_pair", 1)(0, 100.0)
        on_phase("oracle_pair", 2)(1, 50.0)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "oracle_pair: 1 run"
    assert lines[1] == "oracle_pair: run 1 of 1, 100 s simulated"
    assert lines[2] == "oracle_pair: run 2 of 3, 150 s simulated"


def test_progress_is_a_bar_on_a_terminal():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with study_progress(100.0, console=console) as on_phase:
        on_progress = on_phase("default clocks", 1)
        on_progress(0, 40.0)
        on_phase("policies", 2)(1, 60.0)
        on_phase("policies", 1)(0, 30.0)
    text = console.file.getvalue()
    assert "policies" in text
    assert "90 s simulated" in text


# -- uncertain numbers -----------------------------------------------------------------------------


def test_the_governor_is_swept_first_and_other_models_not():
    profile = load_gpu_profile("rtx_a6000")
    ranges = ranges_of(profile, "llama-3.1-8b")
    assert next(iter(ranges)).startswith("governor.")
    assert any(path.startswith("models.llama-3.1-8b.") for path in ranges)
    assert not any(path.startswith("models.") for path in ranges_of(profile, "another"))


def test_both_ends_of_every_range_are_run():
    scenario = Scenario(rate_per_s=0.3, duration_s=120.0)
    ranges = {"governor.idle_sm_clock_mhz": (210, 2100), "power.idle_base_w": (40, 50)}
    profile = load_gpu_profile("rtx_a6000").model_copy(update={"ranges": ranges})

    class Swept(Scenario):
        def profile(self):
            return super().profile() if self.profile_values else profile

    swept = Swept.model_validate(scenario.model_dump())
    study = Study(swept, [parse_policy("fixed:1230")], [0])
    ends = list(sweep(study, one_by_one, lambda name, runs: lambda number, t_s: None))
    assert [(end.path, end.value) for end in ends] == [
        (None, None),
        ("governor.idle_sm_clock_mhz", 210),
        ("governor.idle_sm_clock_mhz", 2100),
        ("power.idle_base_w", 40),
        ("power.idle_base_w", 50),
    ]
    changes = [end.changes_percent["fixed:1230"] for end in ends]
    assert changes[1] > changes[0] > changes[2]  # a low idle clock leaves less to save
    assert ends[1].records[0].profile_change == "governor.idle_sm_clock_mhz=210"


def end(path, value, *agft_edp):
    """Two other policies, and `agft` with so much EDP by seed."""
    edp = {"default": 100.0, "fixed:1230": 70.0}
    others = [(p, v, seed) for p, v in edp.items() for seed in range(len(agft_edp))]
    of_agft = [("agft", v, seed) for seed, v in enumerate(agft_edp)]
    return End(
        path,
        value,
        tuple(replace(RECORD, policy=p, edp_j_s=v, seed=seed) for p, v, seed in others + of_agft),
    )


NOMINAL, SAME, OTHER = end(None, None, 60.0), end("a.b", 1.0, 65.0), end("a.b", 2.0, 75.0)


def test_the_ranking_after_one_seed_is_not_called_stable():
    assert NOMINAL.ranking == ["agft", "fixed:1230", "default"]
    text = verdict([NOMINAL, SAME], planned=1)
    assert "same at 1 of 1 ends: agft, fixed:1230, default" in text
    assert "One seed cannot tell" in text
    assert "stable" not in text
    assert "changes at 1 of 2 ends: a.b=2." in verdict([NOMINAL, SAME, OTHER], planned=2)


def test_the_ranking_is_stable_only_beyond_the_spread_over_seeds():
    nominal = end(None, None, 60.0, 61.0, 60.0)
    apart, near = end("a.b", 1.0, 62.0, 61.0, 62.0), end("a.b", 2.0, 60.0, 78.0, 65.0)
    assert "stable" not in verdict([nominal, apart], planned=2)
    assert verdict([nominal, apart], planned=1).endswith(
        "It is stable: all differ beyond the spread over seeds."
    )
    text = verdict([nominal, apart, near], planned=2)
    assert "same at 2 of 2 ends" in text
    assert "stable" not in text
    assert "Within the spread over seeds, of 3 settings: agft and fixed:1230 (at 1)." in text
    flipped, unsure = end("c", 3.0, 75.0, 76.0, 75.0), end("c", 4.0, 60.0, 95.0, 75.0)
    text = verdict([nominal, flipped, unsure], planned=2)
    assert "changes at 2 of 2 ends: c=3, c=4." in text
    assert "Beyond the spread over seeds it does at 1: c=3." in text


def test_the_screen_of_a_sweep():
    several = [end(None, None, 60.0, 61.0), end("a.b", 1.0, 65.0, 65.1)]
    screens = {}
    for name, ends, planned in (
        ("one seed", [NOMINAL, SAME], 1),
        ("several", several, 1),
        ("changes, interrupted", [NOMINAL, SAME, OTHER], 4),
    ):
        console = Console(file=io.StringIO(), width=100)
        print_sweep(ends, console, planned=planned)
        screens[name] = console.file.getvalue()
    assert "Interrupted: 2 of 4 ends were not run." in screens["changes, interrupted"]
    assert_golden("sweep", sections(screens))


def test_ranges_of_noise_are_swept_only_with_noise():
    specs = [parse_policy("fixed:1230")]
    quiet, noisy = (
        swept_ranges(Study(Scenario(duration_s=10.0, noise=noise), specs, [0]))
        for noise in (False, True)
    )
    assert {path for path in noisy if path not in quiet} == {
        path for path in noisy if path.startswith("noise.")
    }


# -- noise and worlds ------------------------------------------------------------------------------


def test_noise_and_numbers_of_the_profile_from_the_command_line(tmp_path):
    arguments = ["--policy", "fixed:1230", "--set", "clock_change.median_s=0.2"]
    plain, noisy = (simulated(tmp_path, *arguments, *more) for more in ([], ["--noise"]))
    assert [run["noise"] for run in plain + noisy] == [False, False, True, True]
    assert {run["profile_change"] for run in plain + noisy} == {"clock_change.median_s=0.2"}
    assert noisy[1]["e2e_s"]["mean"] != plain[1]["e2e_s"]["mean"]
    assert noisy[1]["e2e_s"]["mean"] == pytest.approx(plain[1]["e2e_s"]["mean"], rel=0.02)


def test_worlds_from_the_command_line(tmp_path, capsys):
    worlds = ["nominal", "slow-clock-changes", "draw-7"]
    runs = simulated(tmp_path, "--policy", "fixed:1230", "--worlds", ",".join(worlds))
    assert [(run["world"], run["policy"]) for run in runs] == [
        (world, policy) for world in worlds for policy in ("default", "fixed:1230")
    ]
    assert all(run["noise"] for run in runs)
    assert runs[0]["profile_change"] is None
    assert runs[2]["profile_change"].startswith("clock_change.median_s=0.2, ")
    captured = capsys.readouterr()
    assert "3 worlds, 1 seed each" in captured.out
    assert "world 2 of 3, slow-clock-changes: policies" in captured.err
    edp = [runs[k + 1]["edp_j_s"] / runs[k]["edp_j_s"] - 1 for k in (0, 2, 4)]
    worst = worlds[edp.index(max(edp))]
    row = next(line for line in captured.out.splitlines() if " EDP " in line)
    assert row.split()[-2:] == [f"{100 * max(edp):+.1f}", worst]


def test_the_worlds_are_listed_without_a_run(capsys):
    assert main(["simulate", "--list-worlds", "--gpu", "h100_sxm_80gb"]) == 0
    captured = capsys.readouterr()
    assert "issue_share=0.32" in captured.out
    assert "draw-8" in captured.out
    assert captured.err == ""


# -- Ctrl-C ----------------------------------------------------------------------------------------


def started(arguments):
    code = "import sys; from agft_ray.cli.app import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(path, process):
    deadline_s = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("jobs", "sent"), [("1", signal.SIGINT), ("2", signal.SIGINT), ("2", signal.SIGTERM)]
)
def test_ctrl_c_ends_it_at_once_and_leaves_whole_files(tmp_path, jobs, sent):
    out, file = tmp_path / "rows", tmp_path / "out.json"
    process = started(
        [
            *("simulate", "--rate", "1", "--duration", "1e5", "--jobs", jobs),
            *("--policy", "fixed:1230", "--out", str(out), "--json", str(file)),
        ]
    )
    wait_for(out / "default" / "seed-0", process)
    process.send_signal(sent)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in text
    assert json.loads(file.read_text()) == {"runs": []}
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == ["runs.json", "study.json"]
    assert json.loads((out / "study.json").read_text())["interrupted"] is True


# -- Ray -------------------------------------------------------------------------------------------


class FakeRay:
    """As much of Ray as the pool uses; tasks run when they are waited for, the last one first."""

    def __init__(self, *, refuses=False):
        self.refuses, self.addresses, self.cancelled = refuses, [], []

    def init(self, address, **options):
        self.addresses.append(address)
        if self.refuses:
            raise ConnectionError("Could not find any running Ray instance.\nmore")

    def remote(self, **options):
        assert options == {"num_cpus": 1, "max_retries": 3}

        def decorated(function):
            def submit(*arguments):
                return lambda: function(*arguments)

            return type("Task", (), {"remote": staticmethod(submit)})

        return decorated

    def wait(self, pending, num_returns):
        return [pending[-1]], pending[:-1]

    def get(self, reference):
        return reference()

    def cancel(self, reference, force):
        self.cancelled.append(reference)


@pytest.fixture
def fake_ray(monkeypatch):
    pytest.importorskip("ray", reason="the pool catches Ray's own errors")

    def place(fake):
        monkeypatch.setitem(sys.modules, "ray", fake)
        fake.exceptions = sys.modules["ray.exceptions"]
        return fake

    import ray.exceptions

    assert ray.exceptions
    return place


def double(job, report):
    report(float(job))
    return 2 * job


def test_a_cluster_gives_the_results_in_whatever_order(fake_ray, monkeypatch):
    fake = fake_ray(FakeRay())
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    seen = []
    results = simulate_on_ray.ray_pool()(double, [1, 2, 3], lambda n, at: seen.append((n, at)))
    assert list(results) == [(2, 6), (1, 4), (0, 2)]
    assert seen == [(2, 3.0), (1, 2.0), (0, 1.0)]
    assert fake.addresses == ["head:6379"]


def test_a_pool_that_is_left_cancels_what_runs(fake_ray):
    fake = fake_ray(FakeRay())
    results = simulate_on_ray.ray_pool()(double, [1, 2, 3], lambda n, at: None)
    next(results)
    results.close()
    assert len(fake.cancelled) == 2


def test_no_cluster_is_said_with_the_ways_out(fake_ray, capsys):
    fake_ray(FakeRay(refuses=True))
    assert main([*SHORT[:-2], "--ray"]) == 2
    error = capsys.readouterr().err
    assert "Could not find any running Ray instance." in error
    assert "more" not in error, "the first line says it"
    assert "ray start --head" in error

"""The stable format of --json: exactly its fields, null for what does not exist."""

import json
import os
from dataclasses import replace

import pytest

from agft_ray.errors import AgftError
from agft_ray.files import replacing, write_json
from agft_ray.replay.records import records_of_replay
from agft_ray.replay.result import ReplayResult, RequestRow, ServerStatus
from agft_ray.replay.summary import summarise
from agft_ray.results.distribution import Distribution, Slo
from agft_ray.results.record import RunRecord, read_runs, write_runs

RECORD = RunRecord(
    policy="agft",
    gpu="rtx_a6000",
    model="llama-3.1-8b",
    trace="azure2023_conv.csv",
    seed=3,
    replicas=2,
    requests=10,
    duration_s=100.0,
    energy_j=20000.0,
    mean_power_w=100.0,
    output_tokens=2000,
    energy_per_output_token_j=10.0,
    ttft_s=Distribution(10, 0.2, 0.1, 0.3, 0.4),
    tpot_s=Distribution(),
    e2e_s=Distribution(10, 5.0, 4.0, 8.0, 9.0),
    edp_j_s=100000.0,
    slo_attainment=None,
    clock_changes=7,
)
DOCUMENTED = [
    "policy",
    "gpu",
    "model",
    "trace",
    "seed",
    "replicas",
    "requests",
    "duration_s",
    "energy_j",
    "mean_power_w",
    "output_tokens",
    "energy_per_output_token_j",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "edp_j_s",
    "slo_attainment",
    "clock_changes",
    "energy_regret_j",
    "energy_regret",
    "windows_to_low_regret",
    "windows_over_bound",
]


def test_the_documented_fields_come_first_and_in_their_order(tmp_path):
    write_runs(tmp_path / "out.json", [RECORD])
    content = json.loads((tmp_path / "out.json").read_text())
    assert list(content) == ["runs"]
    (run,) = content["runs"]
    assert list(run)[: len(DOCUMENTED)] == DOCUMENTED
    assert run["ttft_s"] == {"mean": 0.2, "p50": 0.1, "p95": 0.3, "p99": 0.4}
    assert run["tpot_s"] == dict.fromkeys(("mean", "p50", "p95", "p99"))
    assert run["slo_attainment"] is None


def test_the_documentation_names_every_field(request):
    text = (request.config.rootpath / "docs" / "evaluation.md").read_text()
    for name in RECORD.to_json():
        assert f"| `{name}`" in text


def test_records_survive_a_round_trip_and_later_fields(tmp_path):
    path = tmp_path / "out.json"
    write_runs(path, [RECORD, replace(RECORD, policy="default", seed=None)])
    content = json.loads(path.read_text())
    content["runs"][0]["a_later_field"] = 1
    path.write_text(json.dumps(content))
    first, second = read_runs(path)
    assert replace(first, tpot_s=RECORD.tpot_s) == RECORD
    assert first.tpot_s.mean is None
    assert second.seed is None


def test_nan_is_refused_and_the_old_file_kept(tmp_path):
    path = tmp_path / "out.json"
    write_runs(path, [RECORD])
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_runs(path, [replace(RECORD, energy_j=float("nan"))])
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["out.json"]


def test_an_interrupted_file_leaves_nothing(tmp_path):
    def interrupted():
        with replacing(tmp_path / "rows.csv") as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [None, "{", "[]", '{"runs": [{"policy": "agft"}]}'])
def test_a_file_that_is_something_else_is_named(tmp_path, content):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(AgftError, match=r"other\.json: "):
        read_runs(path)


def test_values_by_dotted_name():
    assert RECORD.value("ttft_s.p99") == 0.4
    assert RECORD.value("tpot_s.mean") is None
    assert RECORD.value("clock_changes") == 7.0
    with pytest.raises(AttributeError):
        RECORD.value("nonsense")


# -- replay ----------------------------------------------------------------------------------------


def status(t_s, energy_j, tokens):
    def replica(name, role):
        return {
            "replica": name,
            "role": role,
            "policy": "agft",
            "gpu_model": "NVIDIA RTX A6000",
            "t_s": t_s,
            "energy_j": energy_j,
            "energy_t_s": t_s,
            "sm_clock_mhz": 1200,
            "running": 0,
            "waiting": 0,
            "prompt_tokens": 0,
            "generation_tokens": tokens,
        }

    replicas = [replica("a", "tuned"), replica("b", "holdout")]
    return ServerStatus.model_validate({"speed": 1, "now_s": t_s, "replicas": replicas})


def row(role, e2e_s):
    latencies = {"engine_ttft_s": 0.5, "engine_tpot_s": 0.03, "engine_e2e_s": e2e_s}
    return RequestRow("r", 0.0, 0.0, "ok", 0, role=role, **latencies)


def test_a_replay_is_one_run_a_role():
    result = ReplayResult(
        rows=(row("tuned", 2.0), row("tuned", 4.0), row("holdout", 5.0)),
        timeline=(status(0.0, 0.0, 0), status(10.0, 1500.0, 100)),
        started_s=0.0,
        ended_s=10.0,
        wall_s=10.0,
        speed=1.0,
        model="llama",
    )
    comparison = summarise(result, slo=Slo(e2e_s=3.0))
    tuned, holdout = records_of_replay(result, comparison, trace="t.csv", seed=0)
    assert (tuned.policy, tuned.role) == ("agft", "tuned")
    assert (holdout.policy, holdout.role) == ("default", "holdout")
    assert (tuned.gpu, tuned.model, tuned.trace, tuned.seed) == (
        "NVIDIA RTX A6000",
        "llama",
        "t.csv",
        0,
    )
    assert tuned.requests == 2
    assert tuned.energy_j == 1500.0
    assert tuned.edp_j_s == 1500.0 * 3.0
    assert tuned.slo_attainment == 0.5
    assert tuned.mean_power_w == 150.0
    assert tuned.energy_regret_j is tuned.windows_to_low_regret is None


def test_a_server_without_status_still_makes_a_record(tmp_path):
    result = ReplayResult((), (), 0.0, 1.0, 1.0, 1.0)
    (record,) = records_of_replay(result, summarise(result), trace=None, seed=None)
    assert (record.policy, record.energy_j, record.model) == ("unknown", None, None)
    write_json(tmp_path / "x.json", record.to_json())

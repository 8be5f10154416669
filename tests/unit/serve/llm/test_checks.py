"""What `agft-ray validate` says about applications of `ray.serve.llm`."""

import importlib.util

import pytest
import yaml

from agft_ray.cli.app import main
from agft_ray.errors import ConfigError
from agft_ray.serve.checks import validate_file
from agft_ray.serve.llm.checks import LlmApplication

TUNED = "agft_ray.serve.llm:TunedLLMServer"
with_ray_llm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="ray.serve.llm needs vLLM (make vllm)"
)


def llm(model_id="m/llama-3.1", **fields):
    return {"model_loading_config": {"model_id": model_id}} | fields


def energy(**block):
    return {"experimental_configs": {"energy": block}}


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Validates one application; its path is `applications.0`. Ray's own checks are left out,
    since they take the import of vLLM: `with_ray_llm` is for them."""
    monkeypatch.setattr("agft_ray.serve.llm.checks._check_by_ray", lambda llms, problems: False)
    path = tmp_path / "app.yaml"

    def run(import_path, args, deployments=None):
        application = {"name": "llm", "import_path": import_path, "args": args}
        if deployments is not None:
            application["deployments"] = deployments
        path.write_text(yaml.safe_dump({"applications": [application]}))
        (found,) = validate_file(path)
        assert isinstance(found, LlmApplication)
        return found

    return run


@pytest.fixture
def problems(check):
    def run(*args, **kwargs):
        with pytest.raises(ConfigError) as caught:
            check(*args, **kwargs)
        return caught.value.problems

    return run


OURS = "agft_ray.serve:build_openai_app"
DP = "agft_ray.serve:build_dp_openai_app"
PD = "agft_ray.serve:build_pd_openai_app"
RAYS = "ray.serve.llm:build_openai_app"


def test_an_llm_without_a_block_has_the_applications(check):
    args = {
        "energy": {"tuner": {"window_s": 2.0}},
        "llm_configs": [llm("a"), llm("b", **energy(tuner={"window_s": 3.0}))],
    }
    application = check(OURS, args)
    assert [(each.model_id, each.tuner.window_s) for each in application.llms] == [
        ("a", 2.0),
        ("b", 3.0),
    ]
    assert {each.gpu.kind for each in application.llms} == {"nvml"}


def test_a_user_config_goes_before_the_block_and_the_deployments_before_it(check):
    given = llm("a", deployment_config={"user_config": {"window_s": 3.0}})
    args = {"energy": {"tuner": {"window_s": 2.0}}, "llm_configs": [given]}
    assert check(OURS, args).llms[0].tuner.window_s == 3.0
    deployments = [{"name": "TunedLLMServer:a", "user_config": {"window_s": 4.0}}]
    assert check(OURS, args, deployments).llms[0].tuner.window_s == 4.0


def test_roles_of_prefill_and_decode(check):
    args = {"prefill_config": llm(), "decode_config": llm()}
    deployments = [
        {"name": "Prefill:m--llama-3_1", "user_config": {"window_s": 4.0}},
        {"name": "Decode:m--llama-3_1", "user_config": {"window_s": 5.0}},
    ]
    found = check(PD, args, deployments).llms
    assert [(each.role, each.tuner.window_s) for each in found] == [
        ("prefill", 4.0),
        ("decode", 5.0),
    ]


def test_data_parallel(check):
    found = check(DP, {"llm_config": llm(**energy(tuner={"mode": "off"}))}).llms
    assert [(each.role, each.tuner.mode) for each in found] == [("mixed", "off")]


@pytest.mark.parametrize(
    ("builder", "args"),
    [
        (DP, {"llm_config": llm(server_cls=TUNED)}),
        (PD, {"prefill_config": llm(server_cls=TUNED), "decode_config": llm()}),
    ],
)
def test_a_server_class_that_would_be_passed_over(problems, builder, args):
    (problem,) = problems(builder, args)
    assert problem.startswith(f"applications.0.args.{next(iter(args))}.server_cls: ")
    assert "leave it out" in problem


def test_two_lines_in_a_config_of_rays_builder(check):
    given = [llm("a", server_cls=TUNED, **energy(tuner={"mode": "control"})), llm("untuned")]
    found = check(RAYS, {"llm_configs": given}).llms
    assert [(each.model_id, each.tuner.mode) for each in found] == [("a", "control")]


def test_a_server_class_of_the_users_own_is_trusted(check):
    given = llm("a", server_cls="my_code.servers.MyServer", **energy(tuner={"mode": "off"}))
    deployments = [{"name": "MyServer:a", "user_config": {"window_s": 4.0}}]
    (found,) = check(RAYS, {"llm_configs": [given]}, deployments).llms
    assert found.tuner.window_s == 4.0


def test_all_problems_at_once_by_their_places(problems):
    args = {
        "energy": {"mode": "control", "uuids": ["GPU-1"]},
        "llm_configs": [
            llm("a", **energy(tuner={"window_s": -1.0}), energy={}),
            llm("b", deployment_config={"user_config": {"objectiv": "edp"}}),
            7,
        ],
        "llm_config": llm(),
    }
    deployments = [
        {"name": "TunedLLMServer:c", "user_config": {}},
        {"name": "TunedLLMServer:a", "user_config": {"mode": "fast"}},
        {"name": "OpenAiIngress", "user_config": {"anything": 1}},
    ]
    found = dict(problem.split(": ", 1) for problem in problems(OURS, args, deployments))
    named = {
        "args.energy.mode": "energy.tuner",
        "args.energy.uuids": "energy.gpu",
        "args.llm_config": "'llm_configs'?",
        "args.llm_configs.0.experimental_configs.energy.tuner.window_s": "got -1.0",
        "args.llm_configs.0.energy": "experimental_configs",
        "args.llm_configs.1.deployment_config.user_config.objectiv": "'objective'?",
        "args.llm_configs.2": "got 7",
        "deployments.0.name": "'TunedLLMServer:c'",
        "deployments.1.user_config.mode": "'fast'",
    }
    assert found.keys() == {f"applications.0.{place}" for place in named}
    for place, what in named.items():
        assert what in found[f"applications.0.{place}"]


def test_an_energy_block_that_nothing_would_read(problems):
    untuned = llm("a", **energy(tuner={}))
    (problem,) = problems(RAYS, {"llm_configs": [untuned]})
    assert problem.startswith("applications.0.args.llm_configs.0.server_cls: ")
    assert TUNED in problem


def test_an_application_without_a_tuner_is_nothing_to_check(problems):
    (problem,) = problems(RAYS, {"llm_configs": [llm("a")]})
    assert "nothing to check" in problem


def test_what_is_missing(problems):
    (problem,) = problems(PD, {"prefill_config": llm()})
    assert problem.startswith("applications.0.args.decode_config: required")
    assert problems(OURS, [1]) != []


def test_an_llm_config_in_a_file_of_its_own(check, problems, tmp_path):
    path = tmp_path / "llm.yaml"
    path.write_text(yaml.safe_dump(llm("filed", **energy(tuner={"window_s": 2.0}))))
    assert check(OURS, {"llm_configs": [str(path)]}).llms[0].model_id == "filed"
    (problem,) = problems(OURS, {"llm_configs": [str(tmp_path / "gone.yaml")]})
    assert problem.startswith("applications.0.args.llm_configs.0: ")
    assert "gone.yaml" in problem


@pytest.mark.vllm
@with_ray_llm
def test_ray_checks_what_is_rays(tmp_path, capsys):
    path = tmp_path / "app.yaml"
    args = {"llm_configs": [llm("a", server_cls=TUNED, accelerator_typ="H100", lora_config=3)]}
    path.write_text(yaml.safe_dump({"applications": [{"import_path": RAYS, "args": args}]}))
    assert main(["validate", str(path)]) == 2
    message = capsys.readouterr().err
    assert "applications.0.args.llm_configs.0.accelerator_typ: " in message
    assert "applications.0.args.llm_configs.0.lora_config" in message


def test_validate_says_when_ray_was_not_there_to_check(tmp_path, capsys, check):
    path = tmp_path / "app.yaml"
    args = {"llm_configs": [llm("a", server_cls=TUNED)]}
    path.write_text(yaml.safe_dump({"applications": [{"import_path": RAYS, "args": args}]}))
    assert main(["validate", str(path)]) == 0
    out = capsys.readouterr().out
    for what in (f"{path}: valid", "a (mixed)", "nvml", "0 held out", "control", "policy phases"):
        assert what in out
    assert "ray.serve.llm is missing" in out

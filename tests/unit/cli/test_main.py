import argparse
import re
import shlex
import signal
import subprocess
import sys

import pytest
import yaml
from golden_files import assert_golden

from agft_ray.cli.app import EXAMPLES, _parser, main
from agft_ray.serve.checks import simulated_app, validate_file

CONFIG = "configs/simulated.yaml"


@pytest.fixture
def edited(tmp_path, request):
    """Writes the shipped config after an edit; returns its path."""
    content = yaml.safe_load((request.config.rootpath / CONFIG).read_text())

    def write(edit):
        edit(content, content["applications"][0])
        path = tmp_path / "edited.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_every_shipped_config_is_valid(request):
    paths = sorted((request.config.rootpath / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        assert validate_file(path)


def test_the_callers_signal_handler_is_its_own_again(request):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert main(["validate", str(request.config.rootpath / CONFIG)]) == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert main(["validate", "no-such-file.yaml"]) == 2
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_validate_takes_several_files_and_names_the_mistakes_of_each(capsys, request, tmp_path):
    good, bad = request.config.rootpath / CONFIG, tmp_path / "bad.yaml"
    bad.write_text("applications: 5")
    assert main(["validate", str(bad), str(good), str(tmp_path / "missing.yaml")]) == 2
    shown = capsys.readouterr()
    assert f"{good}: valid" in shown.out
    assert str(bad) in shown.err
    assert "missing.yaml" in shown.err


def test_every_command_has_an_example_that_it_understands(capsys):
    commands = next(
        action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    assert set(commands.choices) == set(EXAMPLES)
    for name, example in EXAMPLES.items():
        words = shlex.split(example.partition(" > ")[0])
        assert words[:2] == ["agft-ray", name]
        assert _parser().parse_args(words[1:]).command
        assert example in commands.choices[name].format_help()


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completions_know_the_commands(shell, capsys):
    assert main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in EXAMPLES)
    assert "--sweep-uncertainty" in shown or shell == "tcsh"  # which completes words only


def test_the_completions_of_bash_are_of_bash(capsys):
    main(["completion", "bash"])
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_help_says_defaults():
    commands = next(
        action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    shown = " ".join(commands.choices["demo"].format_help().split())
    assert re.search(r"--wall S [^-]*\b220\.0\b", shown)


def test_output_that_nobody_reads_any_more_is_no_error(request):
    command = f"{sys.executable} -m agft_ray.cli config schema | head -c 10"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.stderr == ""


def test_validate_says_what_will_run(capsys, request):
    path = request.config.rootpath / CONFIG
    assert main(["validate", str(path)]) == 0
    assert_golden("validate", capsys.readouterr().out, {str(path): f"<{CONFIG}>"})


def test_user_config_takes_the_place_of_tuner(edited):
    def edit(content, application):
        application["args"]["tuner"] = {"mode": "off"}

    config = simulated_app(edited(edit))
    assert config.tuner.mode == "control"


def test_validate_names_all_problems_by_their_place(edited, capsys):
    def edit(content, application):
        application["args"] |= {"speeed": 4, "num_replicas": 0, "gpu": {"profile": "rtx_9999"}}
        user_config = application["deployments"][0]["user_config"]
        user_config |= {"slo": {"tpot_s": float("nan")}, "min_sm_clock_mhz": "low"}
        content["http_options"]["port"] = "eight thousand"

    assert main(["validate", str(edited(edit))]) == 2
    message = capsys.readouterr().err
    for named in (
        r"applications\.0\.args\.speeed: .*'speed'\?",
        r"applications\.0\.args\.num_replicas: .* 1, got 0",
        "'rtx_9999'.* a100_sxm_80gb, h100_sxm_80gb, rtx_a6000",
        r"applications\.0\.deployments\.0\.user_config\.slo\.tpot_s: ",
        r"applications\.0\.deployments\.0\.user_config\.min_sm_clock_mhz: ",
        r"http_options\.port: ",
    ):
        assert re.search(named, message), message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"speed": 20}, "speed 20 .* 1 engine pushes"),
        ({"model": "gpt-9"}, "'gpt-9'.* llama-3.1-8b"),
        ({"engine": {"kv_blocks": 2}}, "kv_blocks.* max_model_len"),
        ({"num_replicas": 0}, r"\bnum_replicas: .* 1, got 0"),
        ({"tuner": {"holdout_replicas": 9}}, r"\bholdout_replicas \(9\) .*num_replicas \(3\)"),
        ({"tuner": {"min_sm_clock_mhz": 5000}}, r"\bmin_sm_clock_mhz=5000 .* 210\.\.2100 MHz"),
        ({"gpu": {"kind": "amd"}}, "'amd'.*'simulated', 'nvml', 'zeusd'"),
        ({"gpu": {"state_dir": "here"}}, r"\bstate_dir: 'here'"),
        ({"seed": float("inf")}, r"\bseed: .*\binf\b"),
    ],
)
def test_bad_arguments_are_one_clear_line(edited, capsys, change, named):
    def edit(content, application):
        application["args"] |= change
        del application["deployments"]

    assert main(["validate", str(edited(edit))]) == 2
    message = capsys.readouterr().err
    assert re.search(named, message), message
    assert message.count("\n") == 2, message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not valid YAML"),
        ("a: 1", "applications: required"),
        ("applications: []", "nothing to check"),
    ],
)
def test_files_that_are_no_serve_config(tmp_path, capsys, text, words):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    assert main(["validate", str(path)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("deployments", [5, ["foo"], [{"name": "Other"}]])
def test_odd_deployments_are_named(edited, capsys, deployments):
    def edit(content, application):
        application["deployments"] = deployments

    assert main(["validate", str(edited(edit))]) == 2
    assert "applications.0.deployments" in capsys.readouterr().err


def test_demo_refuses_before_ray_starts(edited, capsys):
    def edit(content, application):
        application["args"]["speed"] = -1

    assert main(["demo", str(edited(edit))]) == 2
    assert "args.speed" in capsys.readouterr().err


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = "2023-11-16 18:15:46.6805900,374,44\n"


def test_a_broken_trace_line_is_named_and_nothing_is_sent(tmp_path, capsys):
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + GOOD + "2023-11-16 18:15:47.0,many,3\n")
    assert main(["replay", "--trace", str(path), "--url", "http://127.0.0.1:9"]) == 2
    assert "trace.csv" in (message := capsys.readouterr().err)
    assert "line 3" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trace", "absent.csv"], "absent.csv"),
        ([], "--duration"),
        (["--duration", "10", "--rate", "-1"], "rate"),
        (["--duration", "nan"], "duration"),
        (["--trace", __file__, "--keep", "2"], "keep"),
        (["--trace", __file__, "--rate", "2"], "--rate: "),
        (["--duration", "10", "--workload", "poison"], "'poisson'?"),
        (["--duration", "10", "--workload", "gamma_burst", "--param", "cv=-1"], "cv: "),
        (["--duration", "10", "--param", "cv"], "--param: must be KEY=VALUE, got 'cv'"),
    ],
)
def test_bad_replays_are_refused(capsys, arguments, words):
    assert main(["replay", "--url", "http://127.0.0.1:9", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_plot_needs_a_replay(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert "timeline.csv" in capsys.readouterr().err

"""What the help of a command lists: every name that an option takes."""

import argparse
import re
import subprocess
import sys
from typing import get_args

import pytest

from agft_ray.cli.app import _parser, main
from agft_ray.policy import imported
from agft_ray.policy.goals import Objective
from agft_ray.study.policy_specs import SEARCHES, policies
from agft_ray.virtual.routers import RouterName

NAMES = {
    "--policy": {*policies(), *SEARCHES},
    "--router": {*get_args(RouterName)},
    "--objective": {*get_args(Objective)},
}


def parsers():
    """Every command's parser, by its name."""
    actions = _parser()._actions
    return next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices


def options():
    """(command, option) of every command that takes an option with names."""
    return [
        (command, option)
        for command, parser in parsers().items()
        for option in NAMES
        if option in parser._option_string_actions
    ]


def help_of(command, option):
    """The words of the option's help, as a person gets it."""
    parser = parsers()[command]
    action = parser._option_string_actions[option]
    return {*re.findall(r"\w+", parser._get_formatter()._expand_help(action))}


def test_the_names_are_there():
    assert {option for _, option in options()} == {*NAMES}
    assert all(NAMES.values())


@pytest.mark.parametrize(("command", "option"), options())
def test_the_help_lists_every_name(command, option):
    assert NAMES[option] <= help_of(command, option)


def test_the_help_lists_policies_of_other_packages(monkeypatch):
    monkeypatch.setitem(imported.entry_points(), "queue", "own_policy:QueuePolicy")
    assert "queue" in help_of("simulate", "--policy")


@pytest.mark.parametrize(("command", "option"), options())
def test_bash_completes_every_name(command, option, capsys):
    assert main(["completion", "bash"]) == 0
    variable = f"_{command}_{option.replace('-', '_')}_choices="
    lines = [line for line in capsys.readouterr().out.splitlines() if variable in line]
    assert len(lines) == 1
    assert NAMES[option] <= {*re.findall(r"\w+", lines[0].partition("=")[2])}


def test_no_command_waits_for_the_names():
    code = (
        "import sys; from agft_ray.cli.app import _parser; _parser().parse_args(['policies']);"
        "print([name for name in sys.modules if name.startswith('agft_ray.policy')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"

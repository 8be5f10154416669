"""Which policies there are, and what may be set of each."""

import pytest
from golden_files import assert_golden, sections

from agft_ray.cli.app import main
from agft_ray.study.policy_specs import SEARCHES, policies


def test_the_screens(capsys, monkeypatch):
    installed = {"theirs": "package.module:Class"}
    monkeypatch.setattr("agft_ray.policy.imported.entry_points", lambda: installed)
    screens = {}
    for arguments in ([], ["rules"]):
        assert main(["policies", *arguments]) == 0
        screens[" ".join(["policies", *arguments])] = capsys.readouterr().out
    assert_golden("policies", sections(screens))


def test_all_are_listed(capsys):
    assert main(["policies"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {*policies(), *SEARCHES, "MODULE:CLASS"} == set(listed)


@pytest.mark.parametrize("name", list(policies()))
def test_the_settings_of_each(name, capsys):
    assert main(["policies", name]) == 0
    shown = capsys.readouterr().out
    for setting in set(policies()[name].model_fields) - {"name"}:
        assert f"\n{setting}  (" in shown


def test_an_unknown_one(capsys):
    assert main(["policies", "agtf"]) == 2
    assert "'agft'?" in capsys.readouterr().err

"""Which policies there are, and what may be set of each."""

import pytest

from agft_ray.cli.app import main
from agft_ray.study.policy_specs import SEARCHES, policies


def test_all_are_listed_with_what_they_do(capsys):
    assert main(["policies"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {*policies(), *SEARCHES, "MODULE:CLASS"} == set(lines)
    assert "AGFT's online clock tuner" in lines["agft"]
    assert lines["pair"].split(maxsplit=1)[1].startswith("step governor: ")


@pytest.mark.parametrize("name", list(policies()))
def test_the_settings_of_each(name, capsys):
    assert main(["policies", name]) == 0
    shown = capsys.readouterr().out
    for setting in set(policies()[name].model_fields) - {"name"}:
        assert f"\n{setting}  (" in shown


def test_an_unknown_one(capsys):
    assert main(["policies", "agtf"]) == 2
    assert "did you mean 'agft'?" in capsys.readouterr().err

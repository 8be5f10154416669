"""Ready configs and the schema of what may be set."""

import json

import jsonschema
import pytest
import yaml

from agft_ray.cli.app import main


def test_every_ready_config_is_listed_and_shown_as_it_is(capsys, request):
    shipped = sorted((request.config.rootpath / "configs").glob("*.yaml"))
    assert main(["config", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        path.stem for path in shipped
    ]
    for path in shipped:
        assert main(["config", "show", path.stem]) == 0
        assert capsys.readouterr().out == path.read_text()


def test_a_config_that_is_not_there(capsys):
    assert main(["config", "show", "simulatd"]) == 2
    assert "'simulated'?" in capsys.readouterr().err


@pytest.mark.parametrize("application", ["simulated", "llm", "dp", "pd", "tuner"])
def test_schemas_are_schemas(application, capsys):
    assert main(["config", "schema", application]) == 0
    jsonschema.Draft202012Validator.check_schema(json.loads(capsys.readouterr().out))


def test_the_schema_takes_the_shipped_config_and_refuses_a_slip(capsys, request):
    main(["config", "schema", "simulated"])
    check = jsonschema.Draft202012Validator(json.loads(capsys.readouterr().out)).is_valid
    content = yaml.safe_load((request.config.rootpath / "configs/simulated.yaml").read_text())
    args = content["applications"][0]["args"]
    assert check(args)
    assert not check(args | {"speeed": 4})

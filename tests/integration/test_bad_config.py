"""What `serve run` says of a config with mistakes."""

import pytest
import yaml
from serve_app import simulated_config

from agft_ray.serve.run import ServeRunError, serve_run
from agft_ray.serve.simulated.config import AppConfig

pytestmark = pytest.mark.ray

ONE = {"num_replicas": 1}
"""Serve starts three for each replica before it gives up."""


@pytest.mark.parametrize(
    ("args", "user_config", "words"),
    [
        ({"speeed": 4}, {}, "speeed: unknown setting; did you mean 'speed'?"),
        (
            ONE,
            {"holdout_replicas": 0, "slo": {"tpot_s": -1.0}},
            "slo.tpot_s: input should be greater than 0, got -1.0",
        ),
    ],
)
def test_mistakes_fail_the_deployment_with_the_validators_words(tmp_path, args, user_config, words):
    path = tmp_path / "app.yaml"
    path.write_text(yaml.safe_dump(simulated_config(tmp_path, args=args, user_config=user_config)))
    with (
        pytest.raises(ServeRunError) as caught,
        serve_run(path, AppConfig(), tmp_path / "serve.log"),
    ):
        pass
    assert "the deployment failed" in str(caught.value)
    assert words in str(caught.value)

"""Ray's own builders accept the shipped LLM configs, offline and without a GPU."""

import importlib
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.vllm

CONFIGS = Path(__file__).parents[4] / "configs"


def deployments(application):
    """Every deployment of an application, by name."""
    from ray.serve.deployment import Application

    found, todo = {}, [application]
    while todo:
        value = todo.pop()
        if isinstance(value, Application):
            bound = value._bound_deployment
            found[bound.name] = bound
            todo += [*bound.init_args, *bound.init_kwargs.values()]
        elif isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
    return found


@pytest.mark.parametrize(
    ("name", "servers", "gpus"),
    [
        ("llm_h100", {"TunedLLMServer:llama-3_1-8b": "TunedLLMServer"}, 1),
        ("llm_tp4", {"TunedLLMServer:llama-3_3-70b": "TunedLLMServer"}, 4),
        (
            "llm_pd",
            {
                "Prefill:llama-3_1-8b": "TunedPDPrefillServer",
                "Decode:llama-3_1-8b": "TunedPDDecodeServer",
            },
            1,
        ),
        ("llm_autoscaled", {"TunedLLMServer:llama-3_1-8b": "TunedLLMServer"}, 1),
        ("vllm_cpu", {"TunedLLMServer:tiny": "TunedLLMServer"}, 0),
    ],
)
def test_a_shipped_config_builds(name, servers, gpus, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (given,) = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["applications"]
    module, _, builder = given["import_path"].partition(":")
    application = getattr(importlib.import_module(module), builder)(given["args"])
    found = deployments(application)
    tuned = {name: found[name] for name in servers}
    assert {name: d.func_or_class.__name__ for name, d in tuned.items()} == servers
    for deployment in tuned.values():
        bundles = deployment._replica_config.placement_group_bundles
        assert sum(bundle.get("GPU", 0) for bundle in bundles) == gpus
    # What the file changes on live replicas are deployments of the application.
    assert {override["name"] for override in given.get("deployments", [])} <= set(servers)

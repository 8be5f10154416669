"""`agft_ray.serve.llm.servers` without a cluster or an engine."""

import asyncio
from types import SimpleNamespace

import pytest

from agft_ray.errors import ConfigError

pytestmark = pytest.mark.vllm

MODEL = {"model_loading_config": {"model_id": "m", "model_source": "none"}}


@pytest.fixture(scope="module")
def llm():
    """Imported here, since it takes seconds."""
    from agft_ray.serve.llm import servers as llm

    return llm


def in_gang(llm, monkeypatch, gang):
    context = SimpleNamespace(gang_context=gang)
    monkeypatch.setattr(llm.serve, "get_replica_context", lambda: context)


def test_a_replica_of_its_own_has_its_whole_placement_group(llm, monkeypatch):
    in_gang(llm, monkeypatch, None)
    assert llm._bundles() is None


def test_a_replica_of_a_gang_has_the_bundles_that_were_chosen_for_it(llm, monkeypatch):
    in_gang(llm, monkeypatch, object())
    monkeypatch.setenv("VLLM_RAY_BUNDLE_INDICES", "2,3")
    assert llm._bundles() == (2, 3)


def test_a_replica_of_a_gang_that_does_not_know_its_bundles_takes_nobodys(llm, monkeypatch, caplog):
    in_gang(llm, monkeypatch, object())
    monkeypatch.delenv("VLLM_RAY_BUNDLE_INDICES", raising=False)
    assert llm._bundles() == ()
    assert "gpu.uuids" in caplog.text


def test_the_tuner_has_reset_the_clocks_before_the_engine_starts(llm, monkeypatch):
    steps = []

    class Link:
        switch = None

        async def probed(self):
            steps.append("probed")

        async def cleared(self):
            steps.append("cleared")

        async def close(self):
            """Nothing to do."""

    class Server:
        async def llm_config(self):
            return SimpleNamespace(engine_kwargs={}, update_engine_kwargs=lambda **_: None)

        async def start(self):
            steps.append("engine")

    class Tuned(llm.TunedServerMixin, Server):
        def __del__(self):
            """For Python, which would not wait for the mixin's."""

    monkeypatch.setattr(llm, "_attach", lambda *_: Link())
    asyncio.run(Tuned().start())
    assert steps == ["probed", "cleared", "engine"]


class FailingLink:
    async def close(self):
        raise RuntimeError("the tuner's fault")


def test_a_server_ends_whatever_its_tuner_does(llm):
    ended = []

    class Server:
        async def __del__(self):
            ended.append(True)

    class Tuned(llm.TunedServerMixin, Server):
        _tuner = FailingLink()

        def __del__(self):
            """For Python, which would not wait for the one below."""

    with pytest.raises(RuntimeError, match="fault"):
        asyncio.run(llm.TunedServerMixin.__del__(Tuned()))
    assert ended == [True]


@pytest.mark.parametrize(
    ("builder", "args", "place"),
    [
        ("build_dp_openai_app", {"llm_config": {}}, "llm_config"),
        ("build_pd_openai_app", {"prefill_config": {}, "decode_config": {}}, "decode_config"),
    ],
)
def test_a_server_class_that_would_be_passed_over_is_refused(llm, builder, args, place):
    given = dict.fromkeys(args, MODEL)
    given[place] = MODEL | {"server_cls": "agft_ray.serve.llm:TunedLLMServer"}
    with pytest.raises(ConfigError, match=rf"{place}.server_cls: .*leave it out"):
        getattr(llm, builder)(given)

"""A replica's end of its tuner, without Ray: replica context and tuner actor are FAKES."""

import asyncio
import gc
import time
import weakref
from types import SimpleNamespace

import pytest

from agft_ray.actors.messages import TunerReply
from agft_ray.errors import StaleMetricsError
from agft_ray.gpu.config import NvmlGpuConfig
from agft_ray.serve import link as link_module
from agft_ray.serve.link import TunerLink
from agft_ray.settings import TunerConfig


class Method:
    """A remote method."""

    def __init__(self, act):
        self._act = act

    async def _run(self, *args):
        return self._act(*args)

    def remote(self, *args):
        return asyncio.ensure_future(self._run(*args))


class FakeTuner:
    """A handle of a tuner; its figures are those given, one after the other, the last for ever."""

    def __init__(self, *figures):
        self.figures = list(figures)
        self.asked = 0
        self.released = released = []
        self.observe = Method(lambda push: TunerReply("tuned", push.config_version))
        self.release = Method(lambda: released.append(True))
        self.status = Method(self._status)

    def _status(self):
        self.asked += 1
        figures = self.figures.pop(0) if len(self.figures) > 1 else self.figures[0]
        if isinstance(figures, Exception):
            raise figures
        return figures


@pytest.fixture(autouse=True)
def replica(monkeypatch):
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"), rank=None)
    monkeypatch.setattr(link_module.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(link_module, "own_node_id", lambda: "node")
    monkeypatch.setattr(link_module, "own_gpu_amounts", lambda bundles: (1.0,))


def stale(t_s):
    raise StaleMetricsError("not started yet")


def link(tuner, *, mode="control", observe_only=""):
    gpu, handles = NvmlGpuConfig(uuids=("GPU-1",)), [tuner]
    config = TunerConfig(mode=mode)
    return TunerLink(gpu, lambda *_: handles.pop(), config, stale, dict, observe_only)


STARTING = {"state": "starting", "reason": ""}
DUE = {"state": "starting", "reason": "", "reset_due": True}
RESET = {"state": "starting", "reason": "", "reset_due": False}
HELD = {"state": "held", "reason": "held by another", "reset_due": True}


def test_a_closed_link_lets_go_of_its_tuner():
    """Ray ends an actor that nobody has a handle of, and its process with it."""

    async def run():
        tuner = FakeTuner(RESET)
        handle, released = weakref.ref(tuner), tuner.released
        tuner.status = None  # it refers to the handle itself
        one = link(tuner)
        del tuner
        await one.probed()
        await one.close()
        await asyncio.sleep(0)
        assert released == [True]
        gc.disable()
        try:
            assert handle() is None, "the link, which may live on, keeps the handle"
        finally:
            gc.enable()
        await one.close()
        assert released == [True], "closed twice"

    asyncio.run(run())


async def cleared(tuner, *, timeout_s=5.0, **options):
    """How long the engine was kept waiting."""
    one = link(tuner, **options)
    await one.probed()
    begin_s = time.monotonic()
    await one.cleared(timeout_s)
    await one.close()
    return time.monotonic() - begin_s


def test_an_engine_waits_until_clocks_are_reset():
    tuner = FakeTuner(STARTING, DUE, DUE, RESET)
    asyncio.run(cleared(tuner))
    assert tuner.figures == [RESET]


@pytest.mark.parametrize("figures", [HELD, {"state": "unavailable", "reason": "no such GPU"}])
def test_an_engine_does_not_wait_for_clocks_that_will_not_be_reset(figures):
    tuner = FakeTuner(figures)
    assert asyncio.run(cleared(tuner, timeout_s=60.0)) < 30.0
    assert tuner.asked == 1


@pytest.mark.parametrize("options", [{"mode": "observe"}, {"observe_only": "fields are missing"}])
def test_an_engine_does_not_wait_for_a_tuner_that_sets_no_clocks(options):
    tuner = FakeTuner(DUE)
    asyncio.run(cleared(tuner, **options))
    assert tuner.asked == 0


@pytest.mark.parametrize("figures", [DUE, RuntimeError("the actor died")])
def test_an_engine_does_not_wait_for_ever_and_starts_all_the_same(figures):
    assert asyncio.run(cleared(FakeTuner(figures), timeout_s=0.05)) < 5.0

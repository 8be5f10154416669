"""A replica's end of its tuner, without Ray: what the tuner, or Ray, does to it is made up."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import RayError, RaySystemError

from agft_ray.actors.messages import TunerReply
from agft_ray.errors import ConfigError, GpuLostError, GpuUnavailableError
from agft_ray.gpu.config import NvmlGpuConfig
from agft_ray.serve import attach as attach_module
from agft_ray.serve import link as link_module
from agft_ray.serve.placement import NodeGpus
from agft_ray.settings import TunerConfig
from agft_ray.types import EngineSample

GPU = NvmlGpuConfig(uuids=("GPU-12345678-1234-1234-1234-123456789012",))


class FakeTuner:
    """A FAKE of a tuner's handle: remembers pushes, confirms their settings, fails on demand."""

    def __init__(self):
        self.pushes, self.releases = [], 0
        self.error, self.says = None, {}
        self.observe = SimpleNamespace(remote=self._observe)
        self.release = SimpleNamespace(remote=self._release)

    @property
    def versions(self):
        """Of the settings that came along, push by push; None where none did."""
        return [p.config_version if p.config is not None else None for p in self.pushes]

    async def _observe(self, push):
        if self.error is not None:
            raise self.error
        self.pushes.append(push)
        return TunerReply("tuned", **{"config_version": push.config_version} | self.says)

    async def _release(self):
        self.releases += 1


@pytest.fixture
def context(monkeypatch):
    """What Serve says of the replica."""
    context = SimpleNamespace(
        app_name="app",
        deployment="llm",
        replica_id=SimpleNamespace(unique_id="r1"),
        rank=None,
        _deployment_config=SimpleNamespace(user_config=None),
    )
    monkeypatch.setattr(link_module.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(link_module, "own_node_id", lambda: "here")
    monkeypatch.setattr(link_module, "own_gpu_amounts", lambda bundles: (1.0,))
    monkeypatch.setattr(link_module, "RETRY_S", 0.02)
    monkeypatch.setattr(link_module, "PUSH_RETRY_S", 0.02)
    monkeypatch.setattr(TunerConfig, "push_interval_s", lambda config, speed: 0.01)
    return context


@pytest.fixture
def started(context, monkeypatch):
    """The specs of the tuners that were started."""
    started = Started()

    def start_tuner(spec):
        started.append(spec)
        return started.tuner

    monkeypatch.setattr(attach_module, "start_tuner", start_tuner)
    return started


class Started(list):
    def __init__(self):
        super().__init__()
        self.tuner = FakeTuner()


def attach(**changes):
    return attach_module.attach_tuner(
        lambda t_s: EngineSample(t_s=t_s), **{"gpu": GPU, "engine_model": "m"} | changes
    )


async def until(condition, what):
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"after 2 s still not: {what}")


def run(act):
    asyncio.run(asyncio.wait_for(act(), 20))


def raise_(error):
    raise error


# -- the tuner's start -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RaySystemError("no control service"), OSError("whatever")])
def test_a_probe_that_ray_fails_is_repeated_until_there_is_a_tuner(started, monkeypatch, error):
    answers = [lambda: raise_(error), lambda: (NodeGpus("here", ("GPU-1",), 1.0),)]
    monkeypatch.setattr(link_module, "probe_gpus", lambda bundles: answers.pop(0)())

    async def act():
        link = attach(gpu=NvmlGpuConfig())
        await asyncio.wait_for(link.probed(), 2)
        await until(lambda: started, "a tuner")
        assert started[0].gpu.devices == ("GPU-1",)
        await until(lambda: started.tuner.pushes, "pushes")
        await link.close()

    run(act)


def test_a_tuner_that_ray_cannot_start_is_started_later(started, monkeypatch):
    start, errors = attach_module.start_tuner, [RaySystemError("no control service")]
    monkeypatch.setattr(
        attach_module, "start_tuner", lambda spec: raise_(errors.pop()) if errors else start(spec)
    )

    async def act():
        link = attach()
        await until(lambda: started.tuner.pushes, "pushes")
        assert len(started) == 1
        await link.close()

    run(act)


def test_gpus_that_cannot_be_told_leave_a_tuner_that_says_why(started, monkeypatch):
    error = GpuUnavailableError("'7' is no GPU of this node, which has 1")
    monkeypatch.setattr(link_module, "probe_gpus", lambda bundles: raise_(error))

    async def act():
        link = attach(gpu=NvmlGpuConfig())
        await until(lambda: started.tuner.pushes, "pushes")
        assert (started[0].problem, started[0].gpu.devices) == (str(error), ())
        link.check_health()
        await link.close()

    run(act)


# -- settings --------------------------------------------------------------------------------------


def test_settings_go_to_the_tuner_once_and_again_after_any_push_that_fails(started, caplog):
    async def act():
        tuner = started.tuner
        link = attach()
        await until(lambda: len(tuner.pushes) > 3, "pushes")
        link.reconfigure({"mode": "observe"})
        await until(lambda: 1 in tuner.versions, "the new settings")
        await until(lambda: tuner.versions[-1] is None, "their confirmation")
        assert tuner.versions.count(0) == 1
        assert tuner.versions.count(1) == 1
        tuner.error = RayError("the tuner has died")
        await asyncio.sleep(0.1)
        assert caplog.text.count("is away") == 1, "said once an outage"
        tuner.pushes.clear()
        tuner.error = None
        await until(lambda: tuner.pushes, "a push to the restarted tuner")
        assert tuner.pushes[0].config.mode == "observe", "it has to ask for them"
        await link.close()

    run(act)


def test_a_tuner_that_says_it_has_none_is_given_the_settings(started):
    async def act():
        tuner = started.tuner
        link = attach()
        await until(lambda: tuner.versions[-1:] == [None], "confirmed settings")
        tuner.says = {"config_version": -1}
        await until(lambda: tuner.versions[-1] == 0, "the settings again")
        await link.close()

    run(act)


def test_a_tuner_that_is_off_is_told_little_until_it_is_to_work(started):
    async def act():
        tuner = started.tuner
        link = attach(config={"mode": "off"})
        await until(lambda: tuner.pushes, "the settings")
        await asyncio.sleep(0.2)
        assert len(tuner.pushes) == 1
        link.reconfigure({"mode": "observe"})
        await until(lambda: len(tuner.pushes) > 5, "pushes")
        assert 1 in tuner.versions
        await link.close()

    run(act)


def test_new_settings_ask_ray_nothing(started, monkeypatch):
    """An exception other than ConfigError, out of `reconfigure`, has Serve replace the replica."""

    async def act():
        link = attach(gpu=NvmlGpuConfig(), config={"mode": "observe"})
        link.reconfigure({"mode": "observe"})
        error = RaySystemError("no control service")
        monkeypatch.setattr(link_module, "own_gpu_amounts", lambda bundles: raise_(error))
        link.reconfigure({"mode": "control"})
        assert link.config_error == ""
        await link.close()

    monkeypatch.setattr(link_module, "probe_gpus", lambda bundles: ())
    run(act)


def test_control_of_a_share_of_a_gpu_is_refused_at_once_and_later(started, monkeypatch):
    monkeypatch.setattr(link_module, "own_gpu_amounts", lambda bundles: (0.5,))

    async def act():
        with pytest.raises(ConfigError, match=r"0\.5 of one"):
            attach(config={"mode": "control"})
        link = attach(config={"mode": "observe"})
        link.reconfigure({"mode": "observe"})
        link.reconfigure({"mode": "control"})
        assert "0.5 of one" in link.config_error
        await link.close()

    run(act)


# -- first settings --------------------------------------------------------------------------------


def test_a_user_config_is_in_force_before_serve_hands_it_over(context, started):
    """An engine takes minutes to start, and Serve calls `reconfigure` only then: meanwhile a tuner
    told by its `user_config` to observe must not set clocks."""
    context._deployment_config.user_config = {"mode": "observe"}

    async def act():
        link = attach(config={"mode": "control"})
        await until(lambda: started.tuner.pushes, "pushes")
        assert started.tuner.pushes[0].config.mode == "observe"
        await link.close()

    run(act)


@pytest.mark.parametrize("user_config", [None, {"greeting": "hello"}, "text"])
def test_a_user_config_that_is_not_the_tuners_leaves_the_constructors(
    context, started, user_config
):
    context._deployment_config.user_config = user_config

    async def act():
        link = attach(config={"window_s": 3.0})
        await until(lambda: started.tuner.pushes, "pushes")
        assert started.tuner.pushes[0].config == TunerConfig(window_s=3.0)
        await link.close()

    run(act)


def test_serves_context_has_the_user_config_where_it_is_looked_for():
    from ray.serve._private.config import DeploymentConfig
    from ray.serve.context import ReplicaContext

    assert "_deployment_config" in ReplicaContext.__dataclass_fields__
    assert DeploymentConfig(user_config={"mode": "off"}).user_config == {"mode": "off"}


# -- health ----------------------------------------------------------------------------------------


def test_only_the_loss_of_a_gpu_that_worked_fails_the_health_check(started):
    async def act():
        tuner = started.tuner
        link = attach()
        tuner.says = {"gpu_lost": "NVML code 15", "gpu_works": False}
        await until(lambda: len(tuner.pushes) > 1, "pushes")
        link.check_health()
        tuner.says = {"gpu_works": True}
        pushes = len(tuner.pushes)
        await until(lambda: len(tuner.pushes) > pushes + 1, "pushes")
        link.check_health()
        tuner.error = RayError("the tuner has died")
        await asyncio.sleep(0.05)
        link.check_health()
        tuner.error, tuner.says = None, {"gpu_works": True, "gpu_lost": "NVML code 15"}
        pushes = len(tuner.pushes)
        await until(lambda: len(tuner.pushes) > pushes + 1, "pushes")
        with pytest.raises(GpuLostError, match="NVML code 15"):
            link.check_health()
        await link.close()

    run(act)

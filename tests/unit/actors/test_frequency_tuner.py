"""The tuner's shell without Ray: its threads and event loop, on a scripted GPU, in wall time."""

import asyncio
import dataclasses
import threading
import time
from types import SimpleNamespace

import pytest

from agft_ray.actors import frequency_tuner, tuner_loop
from agft_ray.actors.frequency_tuner import FrequencyTuner
from agft_ray.actors.memory import Learned
from agft_ray.actors.messages import EngineIdentity, EnginePush, TunerSpec
from agft_ray.errors import GpuLostError, GpuTransientError, GpuUnavailableError
from agft_ray.gpu.config import NvmlGpuConfig
from agft_ray.gpu.registry import GpuSpec
from agft_ray.policy.registry import build_policy
from agft_ray.policy.reward import Reward
from agft_ray.settings import TunerConfig
from agft_ray.types import Actuator, EngineSample, EventReason, GpuSample, StepTotals

FIXED = {"name": "fixed", "sm_clock_mhz": 900}
CONTROL = TunerConfig(policy=FIXED, window_s=0.5, settle_s=0.1)
OBSERVE = CONTROL.model_copy(update={"mode": "observe"})
REQUESTS, TOKENS_PER_S = 4, 200


class FakeLeasedGpu:
    """A FAKE: does what it is told at once, and remembers what would have touched a real one."""

    uuid, model, actuator, guard_pid = "GPU-fake", "Fake", Actuator.SM_CLOCK, None

    def __init__(self):
        self.touched = []
        self.locked = None
        self.error = None
        self.may_open, self.is_opening = threading.Event(), threading.Event()
        self.may_open.set()
        self.may_beat = threading.Event()
        self.may_beat.set()

    @property
    def arms(self):
        """Where NVML is first asked, which takes its time."""
        self.is_opening.set()
        assert self.may_open.wait(10)
        self._fail()
        return 900, 1200, 1500

    def read(self):
        self._fail()
        t_s = time.monotonic()
        return GpuSample(
            t_s=t_s,
            power_w=100.0,
            energy_j=100.0 * t_s,
            energy_t_s=t_s,
            sm_clock_mhz=self.locked or 1500,
            locked=self.locked,
            event_reasons=EventReason.NONE,
        )

    def lock(self, arm):
        self.touched.append(arm)
        self.locked = arm

    def reset(self):
        self.touched.append("reset")
        self.locked = None

    def claim(self):
        self.touched.append("claim")

    def sweep(self):
        self.touched.append("sweep")

    def release(self):
        pass

    def beat(self):
        assert self.may_beat.wait(10)

    def _fail(self):
        if self.error is not None:
            raise self.error


class Replica:
    """What a replica's link does, in the event loop of the test."""

    def __init__(self, tuner):
        self.tuner = tuner

    async def push(self, config=None, version=0):
        return await self.tuner.observe(EnginePush(busy_engine(), 0, {}, config, version))

    async def push_until(self, condition, what, timeout_s=5.0):
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"after {timeout_s} s still not: {what}"
            await self.push(version=self.tuner._loop.config_version)
            await asyncio.sleep(0.02)

    async def push_for(self, duration_s):
        end_s = time.monotonic() + duration_s
        await self.push_until(lambda: time.monotonic() >= end_s, "later", duration_s + 5)


def busy_engine():
    """The statistics of a made-up engine that has always answered four requests at a time."""
    t_s = time.monotonic()
    steps = int(TOKENS_PER_S * t_s / REQUESTS)
    tokens = REQUESTS * steps
    return EngineSample(
        t_s=t_s,
        running=REQUESTS,
        prompt_tokens=tokens,
        generation_tokens=tokens,
        iterations=steps,
        iteration_tokens=tokens,
        itl_sum_s=REQUESTS * t_s,
        itl_count=tokens,
        decode_steps=StepTotals(steps, tokens, t_s),
    )


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeLeasedGpu()
    monkeypatch.setattr(tuner_loop, "open_gpu", lambda spec, owner: gpu)
    return gpu


@pytest.fixture
def live(gpu, monkeypatch, tmp_path):
    """Runs `act(replica, tuner)` beside a tuner that nobody has told anything yet."""

    def no_ray():
        raise RuntimeError("no Ray in this test")

    for name in ("get_scraper", "get_aggregator"):
        monkeypatch.setattr(frequency_tuner, name, no_ray)
    metrics = SimpleNamespace(export=lambda record: None, show=lambda tuner: None)
    monkeypatch.setattr(frequency_tuner, "TunerMetrics", lambda *labels: metrics)

    def run(act):
        async def go():
            tuner = FrequencyTuner(
                TunerSpec(
                    application="app",
                    deployment="llm",
                    replica="r1",
                    gpu=GpuSpec(NvmlGpuConfig(lease_dir=str(tmp_path / "leases")), (gpu.uuid,)),
                    engine=EngineIdentity("m"),
                )
            )
            try:
                await asyncio.wait_for(act(Replica(tuner), tuner), 30)
            finally:
                gpu.may_open.set()
                await tuner.release()
                for talk in tuner._talks:
                    talk.cancel()
            assert tuner._loop.wait_ended(0), "the loop's thread has not ended"
            assert gpu.locked is None

        asyncio.run(go())

    return run


# -- what was learned ------------------------------------------------------------------------------

LEARNING = TunerConfig(policy={"name": "agft"}, window_s=0.5, settle_s=0.1)
MEANING = Reward.of(LEARNING.goals_at()).learned_by(build_policy(LEARNING.policy))


@pytest.mark.parametrize("policy", ["agft", "phases"])
def test_a_tuner_that_is_restarted_goes_on_where_it_was(gpu, live, monkeypatch, policy):
    learning = LEARNING.model_copy(update={"policy": TunerConfig(policy={"name": policy}).policy})
    monkeypatch.setattr(frequency_tuner, "KEEP_INTERVAL_S", 0.05)
    taught = {}

    async def first(replica, tuner):
        await replica.push(learning, 1)
        saved = tuner._memory._path
        await replica.push_until(
            lambda: tuner._windows >= 6 and saved.exists(), "learned and kept", 20
        )
        await asyncio.sleep(0.3)
        taught["text"] = saved.read_text()
        learned = tuner._memory.load(tuner._key_of(tuner._loop.tuner))
        taught["windows"], taught["policy"] = learned.windows, learned.policy

    async def restarted(replica, tuner):
        tuner._memory._path.parent.mkdir(parents=True, exist_ok=True)
        tuner._memory._path.write_text(taught["text"])  # an actor that is killed lets go of nothing
        began = []
        recall = tuner._recall
        monkeypatch.setattr(
            tuner._loop, "_on_made", lambda made: (recall(made), began.append(snapshot(made)))
        )
        await replica.push(learning, 1)
        await replica.push_until(lambda: began, "a tuner")
        assert began == [taught["policy"]]
        assert (await tuner.status())["restored_windows"] == taught["windows"] >= 5
        await replica.push_until(lambda: tuner._windows > taught["windows"], "more windows")

    def snapshot(made):
        return made.policy.snapshot()

    live(first)
    live(restarted)


def test_what_another_policy_learned_is_not_taken_up(gpu, live, monkeypatch):
    async def act(replica, tuner):
        key = dataclasses.replace(
            tuner._prior_key("Fake", "sm_clock", MEANING, LEARNING), policy="rules"
        )
        assert tuner._memory.save(Learned(key, 5000, {"schema": 1}))
        await replica.push(LEARNING, 1)
        await replica.push_until(lambda: tuner._windows > 0, "windows")
        assert (await tuner.status())["restored_windows"] == 0

    live(act)


def test_a_state_that_the_policy_cannot_read_costs_no_tuner(gpu, live):
    async def act(replica, tuner):
        key = tuner._prior_key("Fake", "sm_clock", MEANING, LEARNING)
        assert tuner._memory.save(Learned(key, 5000, {"schema": "of another time"}))
        await replica.push(LEARNING, 1)
        await replica.push_until(lambda: tuner._windows > 0, "windows")
        assert (await tuner.status())["restored_windows"] == 0

    live(act)


def test_a_replica_that_ends_leaves_nothing_behind(gpu, live):
    paths = []

    async def act(replica, tuner):
        assert tuner._memory.save(Learned(tuner._prior_key("", "", "", LEARNING), 1, {}))
        paths.append(tuner._memory._path)
        assert paths[0].exists()

    live(act)
    assert not paths[0].exists()


# -- settings --------------------------------------------------------------------------------------


def test_nothing_is_touched_or_asked_before_the_replicas_settings_have_come(gpu, live):
    async def act(replica, tuner):
        await asyncio.sleep(0.3)
        assert not gpu.is_opening.is_set()
        assert (await tuner.status())["state"] == "starting"
        await replica.push(OBSERVE, 7)
        await replica.push_until(lambda: tuner._windows > 1, "windows")
        assert gpu.touched == []

    live(act)


def test_a_restarted_tuner_asks_for_the_settings_and_touches_nothing_until_it_has_them(gpu, live):
    async def act(replica, tuner):
        reply = await replica.push(None, 5)
        assert reply.config_version != 5, "it confirms settings that it does not have"
        await asyncio.sleep(0.3)
        assert not gpu.is_opening.is_set()
        assert (await replica.push(CONTROL, 5)).config_version == 5
        await replica.push_until(lambda: gpu.locked == 900, "the lock")

    live(act)


def test_settings_that_come_while_the_gpu_is_being_opened_are_the_ones_in_force(gpu, live):
    async def act(replica, tuner):
        gpu.may_open.clear()
        await replica.push(CONTROL, 0)
        assert await asyncio.to_thread(gpu.is_opening.wait, 5)
        assert (await replica.push(OBSERVE, 1)).config_version == 1
        gpu.touched.clear()  # the sweep of a start in control
        gpu.may_open.set()
        await replica.push_until(lambda: tuner._windows > 2, "windows")
        assert (await tuner.status())["mode"] == "observe"
        assert gpu.touched == [], "its status says observe, and it controls"

    live(act)


def test_settings_out_of_bounds_while_the_gpu_is_being_opened_leave_those_before(gpu, live):
    async def act(replica, tuner):
        gpu.may_open.clear()
        await replica.push(OBSERVE, 0)
        assert await asyncio.to_thread(gpu.is_opening.wait, 5)
        await replica.push(CONTROL.model_copy(update={"min_sm_clock_mhz": 3000}), 1)
        gpu.may_open.set()
        await replica.push_until(lambda: tuner._windows > 2, "windows")
        reply = await replica.push(None, 1)
        assert "min_sm_clock_mhz=3000" in reply.config_error
        assert (await tuner.status())["mode"] == "observe"
        assert gpu.touched == []

    live(act)


def test_settings_that_mend_refused_ones_while_those_are_being_tried_leave_no_error(gpu, live):
    async def act(replica, tuner):
        gpu.may_open.clear()
        await replica.push(CONTROL.model_copy(update={"min_sm_clock_mhz": 3000}), 0)
        assert await asyncio.to_thread(gpu.is_opening.wait, 5)
        await replica.push(CONTROL, 1)
        gpu.may_open.set()
        await replica.push_until(lambda: gpu.locked == 900, "the lock")
        assert (await replica.push(None, 1)).config_error == ""

    live(act)


# -- the end ---------------------------------------------------------------------------------------


def test_a_release_while_the_gpu_is_being_opened_ends_the_loop(gpu, live):
    async def act(replica, tuner):
        gpu.may_open.clear()
        await replica.push(CONTROL, 0)
        assert await asyncio.to_thread(gpu.is_opening.wait, 5)
        releasing = asyncio.create_task(tuner.release())
        await asyncio.sleep(0.1)
        gpu.may_open.set()
        await asyncio.wait_for(releasing, 2)
        assert tuner._loop.wait_ended(0)
        assert gpu.touched == ["sweep"], "it went on"

    live(act)


def test_a_release_before_any_settings_ends_it_at_once(gpu, live):
    async def act(replica, tuner):
        await asyncio.wait_for(tuner.release(), 1)

    live(act)


# -- the replica's silence -------------------------------------------------------------------------


def test_clocks_are_reset_when_the_replica_falls_silent_however_long_the_window(
    gpu, live, monkeypatch
):
    monkeypatch.setattr(tuner_loop, "REPLICA_SILENCE_S", 0.5)

    async def act(replica, tuner):
        await replica.push(CONTROL, 0)
        await replica.push_until(lambda: gpu.locked == 900, "the lock")
        long = CONTROL.model_copy(update={"window_s": 60.0, "stale_after_s": 600.0})
        await replica.push(long, 1)
        await replica.push_for(1.0)
        assert gpu.locked == 900
        silent_s = time.monotonic()
        while gpu.locked is not None:
            assert time.monotonic() - silent_s < 2.0, "it is still locked"
            await asyncio.sleep(0.01)
        assert time.monotonic() - silent_s > 0.4
        status = await tuner.status()
        assert status["state"] == "blind"
        assert "silent" in status["last_note"]
        assert tuner._windows < 10, "it spins"
        await replica.push(CONTROL, 2)
        await replica.push_until(lambda: gpu.locked == 900, "the lock again")

    live(act)


def test_a_thread_that_was_stopped_itself_does_not_take_its_replica_for_silent(
    gpu, live, monkeypatch
):
    """As after SIGSTOP: its lease is lost by now, so it may not even reset before it has a new one.
    Pushes come with the next turn of the event loop, which was stopped as well."""
    monkeypatch.setattr(tuner_loop, "REPLICA_SILENCE_S", 0.5)
    monkeypatch.setattr(tuner_loop, "BEAT_S", 0.05)

    async def act(replica, tuner):
        await replica.push(CONTROL, 0)
        await replica.push_until(lambda: gpu.locked == 900, "the lock")
        gpu.touched.clear()
        gpu.may_beat.clear()
        await asyncio.sleep(2)
        gpu.may_beat.set()
        await asyncio.sleep(0.1)
        await replica.push_for(2)
        assert "reset" not in gpu.touched

    live(act)


def test_a_replica_that_pushes_without_statistics_is_not_silent(gpu, live, monkeypatch):
    monkeypatch.setattr(tuner_loop, "REPLICA_SILENCE_S", 0.3)

    async def act(replica, tuner):
        await replica.push(OBSERVE, 0)
        for _ in range(30):
            await tuner.observe(EnginePush(None, 0, {}, None, 0))
            await asyncio.sleep(0.03)
        assert not tuner._loop.tuner.is_cut_off

    live(act)


# -- the GPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [GpuUnavailableError("code 6"), GpuLostError("code 15")])
def test_a_gpu_that_cannot_be_opened_is_unavailable_and_has_never_worked(gpu, live, error):
    async def act(replica, tuner):
        gpu.error = error
        await replica.push(CONTROL, 0)
        assert await asyncio.to_thread(tuner._loop.wait_ended, 5)
        status = await tuner.status()
        assert (status["state"], status["reason"]) == ("unavailable", str(error))
        assert not (await replica.push()).gpu_works

    live(act)


def test_a_gpu_that_worked_and_is_lost_is_said_to_be_lost(gpu, live):
    async def act(replica, tuner):
        await replica.push(OBSERVE, 0)
        await replica.push_until(lambda: tuner._windows > 0, "windows")
        reply = await replica.push()
        assert (reply.gpu_works, reply.gpu_lost) == (True, "")
        gpu.error = GpuLostError("code 15")
        assert await asyncio.to_thread(tuner._loop.wait_ended, 5)
        assert (await replica.push()).gpu_lost == "code 15"
        assert (await tuner.status())["state"] == "gpu lost"

    live(act)


def test_a_gpu_that_does_not_answer_yet_is_tried_again(gpu, live, monkeypatch):
    monkeypatch.setattr(tuner_loop, "OPEN_RETRY_S", 0.05)

    async def act(replica, tuner):
        gpu.error = GpuTransientError("not now")
        await replica.push(CONTROL, 0)
        await replica.push_until(lambda: tuner._loop.unavailable == "not now", "the first attempt")
        gpu.error = None
        await replica.push_until(lambda: gpu.locked == 900, "the lock")

    live(act)

"""Which prompts of vLLM wait for their first token, as a switch is told."""

import asyncio
import dataclasses

import pytest

from agft_ray.serve.vllm.pending import FRUITLESS_STEPS, FRUITLESS_STEPS_UNTIMED, PendingPrompts
from agft_ray.serve.vllm.statistics import VllmStats
from agft_ray.switch import Switch
from agft_ray.types import Phase
from unit.serve.vllm.test_statistics import Finished, Iteration, Scheduler, Times, step


class ToldSwitch:
    """A real switch, and what it was last told."""

    def __init__(self):
        self.switch, self.events = Switch(), []

    def on_arrival(self):
        self.events.append(("arrival",))
        self.switch.on_arrival()

    def on_step(self, pending_prompts):
        self.events.append(("step", pending_prompts))
        self.switch.on_step(pending_prompts)

    def on_empty(self):
        self.events.append(("empty",))
        self.switch.on_empty()

    @property
    def phase(self):
        return self.switch.phase


@pytest.fixture
def told():
    return ToldSwitch()


def decode(prompts, *, is_timed=True, **changes):
    given = {"running": 2, "waiting": 0, "first_tokens": 0, "had_prefill": False, **changes}
    prompts.on_step(**given, is_timed=is_timed)


def test_a_prompt_that_arrives_while_a_step_runs_is_pending_after_it(told):
    prompts = PendingPrompts(told)
    decode(prompts)
    assert told.phase is Phase.DECODE
    prompts.on_arrival()
    decode(prompts)  # scheduled before the arrival
    decode(prompts)  # and this one while the prompt was on its way
    assert told.phase is Phase.PREFILL
    decode(prompts, running=3, first_tokens=1, had_prefill=True)
    assert told.phase is Phase.DECODE


def test_the_others_of_several_prompts_keep_their_clock(told):
    prompts = PendingPrompts(told)
    for _ in range(3):
        prompts.on_arrival()
    decode(prompts, first_tokens=2, had_prefill=True)
    assert (told.events[-1], told.phase) == (("step", 1), Phase.PREFILL)
    decode(prompts, first_tokens=1, had_prefill=True)
    assert told.phase is Phase.DECODE


def test_what_waits_in_the_scheduler_is_pending_without_an_arrival(told):
    prompts = PendingPrompts(told)
    decode(prompts, waiting=1)  # preempted
    assert told.phase is Phase.PREFILL


@pytest.mark.parametrize("is_timed", [True, False])
def test_a_prompt_that_was_aborted_is_forgotten_after_some_steps(told, is_timed):
    prompts = PendingPrompts(told)
    prompts.on_arrival()
    steps = FRUITLESS_STEPS if is_timed else FRUITLESS_STEPS_UNTIMED
    for _ in range(steps - 1):
        decode(prompts, is_timed=is_timed)
    assert told.phase is Phase.PREFILL
    decode(prompts, is_timed=is_timed)
    assert told.phase is Phase.DECODE


def test_a_long_prompt_is_not_forgotten_while_it_is_computed(told):
    prompts = PendingPrompts(told)
    prompts.on_arrival()
    for _ in range(5 * FRUITLESS_STEPS):
        decode(prompts, had_prefill=True)
    assert told.phase is Phase.PREFILL


def test_an_empty_engine_is_told_of_but_not_with_a_prompt_on_its_way(told):
    now = Times()
    prompts = PendingPrompts(told, now_s=now)
    decode(prompts, running=0)
    assert told.phase is Phase.IDLE
    prompts.on_arrival()
    decode(prompts, running=0)
    prompts.settle(is_empty=True)
    assert told.phase is Phase.PREFILL
    now.t_s += 2.0
    prompts.settle(is_empty=False)
    assert told.phase is Phase.PREFILL
    prompts.settle(is_empty=True)
    assert told.phase is Phase.IDLE, "it was aborted"


# -- with the statistics ---------------------------------------------------------------------------


class Engine:
    """As `AsyncLLM`, whose `generate` calls its `add_request`."""

    def __init__(self):
        self.added = []

    async def add_request(self, request_id, prompt):
        self.added.append((request_id, prompt))
        return "queue"

    async def generate(self, request_id, *, prompt):
        return await self.add_request(request_id, prompt=prompt)


def connected():
    stats = VllmStats()
    stats.connect(0, has_details=True)
    return stats


def test_a_watched_engine_tells_of_arrivals_and_steps(told):
    stats, engine = connected(), Engine()
    stats.watch(engine, told)
    assert asyncio.run(engine.generate("a", prompt="hello")) == "queue"
    assert engine.added == [("a", "hello")]
    one = step(ctx=64)
    one.num_running_reqs = 1
    stats.record(one, Iteration(64, 1, 0, [0.1]), 0)
    done = Scheduler()
    stats.record(done, Iteration(0, 1, 0, [], [0.02], [Finished(0.5)]), 0)
    assert told.events == [("arrival",), ("step", 0), ("empty",)]


def test_watching_again_for_another_tuner_tells_that_one_alone(told):
    stats, engine, before = connected(), Engine(), ToldSwitch()
    stats.watch(engine, before)
    stats.watch(engine, told)
    asyncio.run(engine.generate("a", prompt="hello"))
    assert (before.events, told.events) == ([], [("arrival",)])


@dataclasses.dataclass(slots=True)
class Sealed:
    """An engine of another kind."""


def test_an_engine_that_cannot_be_watched_is_read_all_the_same(told):
    stats = connected()
    stats.watch(Sealed(), told)
    stats.watch(None, told)
    one = Scheduler(num_running_reqs=2, num_waiting_reqs=1)
    stats.record(one, Iteration(num_generation_tokens=2), 0)
    assert (stats.sample(0.0).waiting, told.phase) == (1, Phase.PREFILL)

"""The scheduler against schedules computed by hand, and its invariants on random workloads."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agft_ray.config import parse
from agft_ray.errors import ConfigError
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.types import StepTotals
from agft_ray.workloads.requests import Request

STEP_S = 0.5  # exact in binary, so that sums of steps are exact as well


def make_engine(**changes):
    settings = {"kv_blocks": 1000, **changes}
    return BatchingEngine(EngineConfig(**settings), lambda tokens, offset: tokens * 1e-6)


def request(name, prompt, output, arrival_s=0.0):
    return Request(name, arrival_s, prompt, output)


def plan(batch):
    return {sequence.request.request_id: tokens for sequence, tokens in batch.scheduled}


def steps(engine, now_s=0.0):
    """Run to the end with steps of STEP_S; yields (batch, its plan, events)."""
    while not engine.is_empty:
        batch = engine.schedule(now_s)
        if batch is None:
            now_s = engine.next_arrival_s()
            continue
        tokens = plan(batch)
        yield batch, tokens, engine.complete(batch, now_s, now_s + STEP_S)
        now_s += STEP_S


def plans(engine):
    return [tokens for _, tokens, _ in steps(engine)]


def timings_of(engine):
    events = [event for _, _, emitted in steps(engine) for event in emitted]
    return {event.request_id: event.timings for event in events if event.timings}


def test_one_request_alone_meets_the_closed_form():
    engine = make_engine()
    engine.add(request("a", prompt=5000, output=10, arrival_s=2.0))
    assert engine.schedule(1.9) is None
    assert engine.next_arrival_s() == 2.0
    timings = timings_of(engine)["a"]
    # 5,000 tokens are 3 chunks of at most 2,048; the last of them gives the first token.
    assert timings.ttft_s == 3 * STEP_S
    assert timings.e2e_s == (3 + 9) * STEP_S
    assert timings.tpot_s == STEP_S


def test_prefill_chunks_and_decodes_first():
    engine = make_engine(max_num_batched_tokens=100, max_num_seqs=4)
    engine.add(request("a", 30, 6))
    engine.add(request("b", 150, 2))
    engine.add(request("c", 20, 1))
    assert plans(engine) == [
        {"a": 30, "b": 70},
        {"a": 1, "b": 80, "c": 19},
        {"a": 1, "b": 1, "c": 1},
        {"a": 1},
        {"a": 1},
        {"a": 1},
    ]


def test_work_of_a_mixed_step():
    chunks = []

    def attention_s(tokens, offset):
        chunks.append((tokens, offset))
        return 0.25

    engine = BatchingEngine(
        EngineConfig(kv_blocks=1000, max_num_batched_tokens=100, max_num_seqs=4), attention_s
    )
    engine.add(request("a", 30, 6))
    engine.add(request("b", 150, 2))
    engine.add(request("c", 20, 1))
    first, second, third = (batch.work for batch, _, _ in list(steps(engine))[:3])
    assert chunks == [(30, 0), (70, 0), (80, 70), (19, 0), (1, 19)]
    assert (first.prefill_tokens, first.decode_sequences, first.context_tokens) == (100, 0, 0)
    assert (second.prefill_tokens, second.decode_sequences, second.context_tokens) == (99, 1, 31)
    assert (third.prefill_tokens, third.decode_sequences) == (1, 2)
    assert third.context_tokens == 32 + 151
    assert [first.prefill_attention_s, second.prefill_attention_s] == [0.5, 0.5]


def test_max_num_seqs_keeps_the_rest_waiting_in_order():
    engine = make_engine(max_num_seqs=2)
    for name in "abc":
        engine.add(request(name, 10, 2))
    assert plans(engine) == [{"a": 10, "b": 10}, {"a": 1, "b": 1}, {"c": 10}, {"c": 1}]


def test_preemption_takes_the_newest_and_recomputes_prompt_and_output():
    # Four blocks of 4 tokens: each prompt fills two, the first decode needs a third.
    engine = make_engine(kv_blocks=4, block_size=4, max_model_len=16)
    engine.add(request("a", 8, 4))
    engine.add(request("b", 8, 3))
    ran = list(steps(engine))
    assert [tokens for _, tokens, _ in ran] == [
        {"a": 8, "b": 8},
        {"a": 1},
        {"a": 1},
        {"a": 1},
        {"b": 9},  # its prompt and the token it had generated
        {"b": 1},
    ]
    assert ran[4][0].work.prefill_tokens == 9
    b = [event.t_s for _, _, events in ran for event in events if event.request_id == "b"]
    assert b == [1 * STEP_S, 5 * STEP_S, 6 * STEP_S]
    sample = engine.sample(10.0)
    assert (sample.preemptions, sample.prompt_tokens, sample.generation_tokens) == (1, 16, 7)
    assert (sample.ttft_count, sample.itl_count) == (2, 5)
    assert sample.itl_sum_s == 3 * STEP_S + 5 * STEP_S
    assert sample.kv_cache_usage == 0.0


def test_nothing_is_admitted_in_a_step_that_preempts():
    engine = make_engine(
        kv_blocks=5, block_size=4, max_model_len=20, max_num_batched_tokens=8, max_num_seqs=4
    )
    engine.add(request("a", 8, 6))
    engine.add(request("b", 11, 1))
    # b's second chunk finds no block, so b goes; its first chunk would fit again at once.
    assert plans(engine)[:4] == [{"a": 8}, {"a": 1, "b": 7}, {"a": 1}, {"a": 1, "b": 7}]


def test_nobody_overtakes_a_preempted_request():
    engine = make_engine(kv_blocks=4, block_size=4, max_model_len=16)
    engine.add(request("a", 8, 4))
    engine.add(request("b", 8, 4))
    engine.add(request("small", 1, 1, arrival_s=STEP_S))
    # b goes back to the head of the queue; the small one fits but may not overtake it.
    assert plans(engine)[:3] == [{"a": 8, "b": 8}, {"a": 1}, {"a": 1}]


def test_statistics_by_class_of_step():
    engine = make_engine()
    engine.add(request("a", 100, 3, arrival_s=1.0))
    list(steps(engine))
    sample = engine.sample(3.0)
    assert sample.is_idle
    assert sample.prefill_steps == StepTotals(1, 100, STEP_S)
    assert sample.decode_steps == StepTotals(2, 2, 2 * STEP_S)
    assert (sample.ttft_sum_s, sample.e2e_sum_s, sample.e2e_count) == (STEP_S, 3 * STEP_S, 1)


def test_gauges_count_arrived_requests_only():
    engine = make_engine(max_num_seqs=1)
    for name, arrival_s in (("a", 0.0), ("b", 0.0), ("c", 1.0), ("d", 9.0)):
        engine.add(request(name, 16, 2, arrival_s))
    engine.schedule(0.0)
    now = engine.sample(1.0)
    assert (now.running, now.waiting, now.kv_cache_usage) == (1, 2, pytest.approx(1 / 1000))


@pytest.mark.parametrize(
    ("share", "prompt", "cached"),
    [(0.5, 100, 48), (0.57, 1600, 912), (1.0, 160, 144), (1.0, 161, 160), (0.1, 100, 0)],
)
def test_prefix_hits_spare_computed_tokens_exactly(share, prompt, cached):
    engine = make_engine(prefix_hit_share=share)
    engine.add(request("a", prompt, 1))
    assert plans(engine) == [{"a": prompt - cached}]
    sample = engine.sample(1.0)
    assert (sample.prefix_cache_queries, sample.prefix_cache_hits) == (prompt, cached)
    assert sample.prompt_tokens == prompt


def test_abort_frees_blocks_wherever_the_request_is():
    engine = make_engine(max_num_seqs=2)
    for name, arrival_s in (("a", 0.0), ("b", 0.0), ("waits", 0.0), ("future", 9.0)):
        engine.add(request(name, 160, 5, arrival_s))
    batch = engine.schedule(0.0)
    assert [engine.abort(name) for name in ("a", "waits", "future", "unknown")] == [
        True,
        True,
        True,
        False,
    ]
    assert engine.sample(0.0).kv_cache_usage == pytest.approx(10 / 1000)
    engine.add(request("a", 1, 1))  # the id is free again, though the batch still runs
    assert [event.request_id for event in engine.complete(batch, 0.0, STEP_S)] == ["b"]
    assert engine.abort("b")
    assert plans(engine) == [{"a": 1}]
    assert engine.sample(9.0).kv_cache_usage == 0.0


def test_requests_that_cannot_be_served_are_refused():
    engine = make_engine(max_model_len=100)
    with pytest.raises(ValueError, match=r"\b90 .*\b11 .*max_model_len.*\b100\b"):
        engine.add(request("a", 90, 11))
    with pytest.raises(ValueError, match=r"output_tokens 0 .*1"):
        engine.add(request("a", 90, 0))
    engine.add(request("a", 90, 10))
    with pytest.raises(ValueError, match=r"\ba: .*in use"):
        engine.add(request("a", 1, 1))


def test_batches_cannot_be_scheduled_twice_or_completed_twice():
    engine = make_engine()
    engine.add(request("a", 1, 2))
    batch = engine.schedule(0.0)
    with pytest.raises(AssertionError, match="complete the last batch"):
        engine.schedule(0.0)
    engine.complete(batch, 0.0, 1.0)
    with pytest.raises(AssertionError, match="scheduled last"):
        engine.complete(batch, 0.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_blocks": 511}, r"\b511 .*block_size 16 .*8176.*8192"),
        ({"max_num_batched_tokens": 127}, "max_num_batched_tokens.*127 .*max_num_seqs.* 128"),
        ({"block_sise": 16}, "block_sise: .*'block_size'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse(EngineConfig, changes, source="test")


def test_kv_blocks_come_from_the_model_unless_set():
    gpu = load_gpu_profile("rtx_a6000")
    model = next(iter(gpu.models.values()))
    assert EngineConfig().for_model(model).kv_blocks == model.kv_blocks
    assert EngineConfig(block_size=32).for_model(model).kv_blocks == model.kv_blocks // 2
    assert EngineConfig(kv_blocks=600).for_model(model).kv_blocks == 600
    with pytest.raises(ConfigError, match="max_model_len"):
        EngineConfig(max_model_len=10**9).for_model(model)
    with pytest.raises(ValueError, match="kv_blocks: must be set"):
        BatchingEngine(EngineConfig(), lambda tokens, offset: 0.0)


WORKLOADS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 20)), min_size=1, max_size=25
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(workload=WORKLOADS, kv_blocks=st.integers(8, 20), share=st.sampled_from([0.0, 0.4]))
def test_every_request_gets_its_tokens_in_order_and_all_blocks_return(workload, kv_blocks, share):
    engine = make_engine(
        kv_blocks=kv_blocks,
        block_size=4,
        max_model_len=32,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        prefix_hit_share=share,
    )
    for number, (prompt, output, arrival_s) in enumerate(workload):
        engine.add(request(str(number), prompt, output, float(arrival_s)))
    indices = {str(number): [] for number in range(len(workload))}
    for batch, tokens, events in steps(engine):
        assert sum(tokens.values()) <= 24
        assert len(tokens) <= 6
        assert batch.work.tokens == sum(tokens.values())
        assert all(event.index == len(indices[event.request_id]) for event in events)
        for event in events:
            indices[event.request_id].append(event.index)
        assert tokens  # a batch is never empty
        held = sum(s.blocks for s in engine._running)
        assert held + engine.kv.free == kv_blocks
        assert all(4 * s.blocks >= s.computed for s in engine._running)
    assert [len(found) for found in indices.values()] == [output for _, output, _ in workload]
    sample = engine.sample(1e9)
    assert sample.is_idle
    assert sample.kv_cache_usage == 0.0
    assert sample.prompt_tokens == sum(prompt for prompt, _, _ in workload)
    assert sample.generation_tokens == sum(output for _, output, _ in workload)
    assert sample.e2e_count == len(workload)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(workload=WORKLOADS)
def test_decodes_come_first_and_none_is_left_out_without_preemption(workload):
    engine = make_engine(max_num_seqs=6, max_num_batched_tokens=12)
    for number, (prompt, output, arrival_s) in enumerate(workload):
        engine.add(request(str(number), prompt, output, float(arrival_s)))
    now_s = 0.0
    while not engine.is_empty:
        decoding = [s for s in engine._running if s.decoding]
        batch = engine.schedule(now_s)
        if batch is None:
            now_s = engine.next_arrival_s()
            continue
        assert batch.scheduled[: len(decoding)] == [(s, 1) for s in decoding]
        engine.complete(batch, now_s, now_s + STEP_S)
        now_s += STEP_S


def test_random_aborts_leave_nothing_behind():
    random_ = random.Random(1)
    engine = make_engine(kv_blocks=12, block_size=4, max_model_len=32, max_num_seqs=6)
    now_s = 0.0
    for number in range(300):
        prompt, output = random_.randint(1, 20), random_.randint(1, 12)
        engine.add(request(str(number), prompt, output, now_s))
        batch = engine.schedule(now_s)
        if random_.random() < 0.5:
            engine.abort(str(random_.randint(max(0, number - 12), number)))
        now_s += STEP_S
        engine.complete(batch, now_s - STEP_S, now_s)
        held = sum(s.blocks for s in engine._running)
        assert held + engine.kv.free == 12
    list(steps(engine, now_s))
    assert engine.sample(1e9).preemptions > 0
    assert engine.sample(1e9).kv_cache_usage == 0.0

"""Prefix reuse by hash ids, against cases computed by hand."""

import random

import pytest

from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.prefix_cache import PrefixCache
from agft_ray.workloads.requests import Request

STEP_S = 0.5
BLOCKS = 32  # KV blocks of 16 tokens in a prefix block of 512


def make_engine(**changes):
    settings = {"kv_blocks": 1000, "max_num_batched_tokens": 4096, **changes}
    return BatchingEngine(EngineConfig(**settings), lambda tokens, offset: 0.0)


def computed(engine, now_s=0.0):
    """Run to the end; the tokens computed in each step, by request."""
    steps = []
    while not engine.is_empty:
        batch = engine.schedule(now_s)
        if batch is None:
            now_s = engine.next_arrival_s()
            continue
        steps.append({s.request.request_id: tokens for s, tokens in batch.scheduled})
        now_s += STEP_S
        engine.complete(batch, now_s - STEP_S, now_s)
    return steps


def hits(engine):
    sample = engine.sample(1e9)
    return sample.prefix_cache_queries, sample.prefix_cache_hits


def test_only_a_leading_run_counts():
    cache = PrefixCache(BLOCKS)
    cache.use([1, 2, 4])
    assert [cache.leading(ids) for ids in ([1, 2, 3, 4], [2, 1], [1, 2, 4, 5], [], [9])] == [
        2,
        2,
        3,
        0,
        0,
    ]


def test_blocks_in_use_stay_and_the_rest_goes_least_recently_used_first_last_of_a_prompt_first():
    cache = PrefixCache(BLOCKS)
    cache.use([1, 2, 3])
    cache.use([1, 7])
    cache.leave([1, 2, 3])
    assert list(cache.unused()) == [3, 2]  # 1 is still in use
    cache.leave([1, 7])
    assert list(cache.unused()) == [3, 2, 7, 1]
    cache.use([2])  # found again
    cache.leave([2])
    assert list(cache.unused()) == [3, 7, 1, 2]
    cache.shrink(3 * BLOCKS + BLOCKS - 1)
    assert list(cache.unused()) == [7, 1, 2]
    cache.use([7])
    cache.shrink(0)
    assert (len(cache), cache.leading([7]), cache.leading([1])) == (1, 1, 0)


def test_a_finished_prompt_is_found_by_the_next_with_the_same_beginning():
    engine = make_engine()
    engine.add(Request("a", 0.0, 1300, 1, (1, 2, 3)))
    engine.add(Request("b", 5.0, 1700, 1, (1, 2, 8, 9)))
    engine.add(Request("c", 9.0, 600, 1, (7, 2)))
    # a leaves two whole blocks; its third holds 276 tokens, which nobody can find by id.
    assert computed(engine) == [{"a": 1300}, {"b": 1700 - 1024}, {"c": 600}]
    assert hits(engine) == (1300 + 1700 + 600, 1024)
    assert engine.kv_cache_usage == 0.0


def test_a_prompt_is_found_while_it_is_still_being_computed():
    engine = make_engine(max_num_batched_tokens=700)
    engine.add(Request("a", 0.0, 1200, 3, (1, 2, 3)))
    engine.add(Request("b", 0.1, 1200, 1, (1, 2, 4)))
    # After a's first chunk of 700 tokens its first block can be found, after the second both; b
    # is admitted beside the second chunk.
    assert computed(engine) == [{"a": 700}, {"a": 500, "b": 200}, {"a": 1, "b": 488}, {"a": 1}]
    assert hits(engine) == (2400, 512)


def test_one_token_at_least_is_computed_and_kv_blocks_are_whole():
    engine = make_engine()
    for number, arrival_s in enumerate((0.0, 5.0)):
        engine.add(Request(str(number), arrival_s, 1024, 1, (1, 2)))
    assert computed(engine) == [{"0": 1024}, {"1": 16}]  # (1024 - 1) // 16 * 16 = 1008 are found


def test_room_that_is_needed_evicts():
    # 160 blocks of 16 tokens: of a and b four prefix blocks stay, until c takes 65 blocks.
    engine = make_engine(kv_blocks=160, max_model_len=2560)
    engine.add(Request("a", 0.0, 1030, 1, (1, 2)))
    engine.add(Request("b", 2.0, 1030, 1, (3, 4)))
    engine.add(Request("c", 4.0, 1030, 1))  # 95 free while it runs: two of four blocks fit
    assert computed(engine) == [{"a": 1030}, {"b": 1030}, {"c": 1030}]
    assert list(engine.kv.prefixes.unused()) == [4, 3]
    engine.add(Request("d", 6.0, 1030, 1, (3, 4)))
    engine.add(Request("e", 8.0, 1030, 1, (1, 2)))
    assert computed(engine) == [{"d": 6}, {"e": 1030}]


def test_what_is_found_is_not_evicted_to_make_room_for_the_rest():
    engine = make_engine(kv_blocks=128, max_model_len=2048)
    engine.add(Request("a", 0.0, 520, 1, (1,)))
    engine.add(Request("b", 2.0, 2000, 1, (1, 5, 6)))  # takes 125 of 128 blocks
    assert computed(engine) == [{"a": 520}, {"b": 2000 - 512}]
    assert engine.kv.prefixes.leading((1, 5, 6)) == 3
    assert len(engine.kv.prefixes) == 3


def test_a_preempted_sequence_finds_what_it_left():
    # Each holds 34 of 68 blocks when a needs a 35th for its 545th token, and b goes. Its 32 blocks
    # of prefix stay in what is left; of 545 tokens it recomputes 33.
    engine = make_engine(kv_blocks=68, max_model_len=1088)
    engine.add(Request("a", 0.0, 520, 40, (1,)))
    engine.add(Request("b", 0.0, 520, 40, (2,)))
    steps = computed(engine)
    assert engine.sample(1e9).preemptions == 1
    assert [step["b"] for step in steps[1:] if step.get("b", 1) > 1] == [545 - 512]


def test_the_configured_share_holds_where_ids_are_absent():
    engine = make_engine(prefix_hit_share=0.5)
    engine.add(Request("a", 0.0, 1024, 1))
    engine.add(Request("b", 5.0, 1024, 1, (1, 2)))
    assert computed(engine) == [{"a": 512}, {"b": 1024}]


@pytest.mark.parametrize("kv_blocks", [70, 100, 400])
def test_random_prompts_leave_nothing_in_use(kv_blocks):
    engine = make_engine(kv_blocks=kv_blocks, max_model_len=1100, max_num_seqs=4)
    draw = random.Random(1)
    for number in range(60):
        ids = (draw.randint(0, 2), draw.randint(10, 14))
        engine.add(Request(str(number), 0.2 * number, 530 + 7 * number, 30, ids))
    computed(engine)
    unused = list(engine.kv.prefixes.unused())
    assert len(engine.kv.prefixes) == len(unused) <= kv_blocks // BLOCKS
    queries, found = hits(engine)
    assert queries == sum(530 + 7 * number for number in range(60))
    assert 0 < found < queries

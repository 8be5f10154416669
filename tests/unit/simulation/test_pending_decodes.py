"""Counted steps of a decode series, and what of them shows before they are written down."""

import pytest

from agft_ray.simulation.batch import DecodeSeries, Sequence
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.kv_blocks import KvBlocks
from agft_ray.simulation.pending_decodes import PendingDecodes
from agft_ray.simulation.physics import StepWork
from agft_ray.workloads.requests import Request

SERIES = DecodeSeries(StepWork(0, 2, 34), steps=8)


@pytest.fixture
def kv():
    return KvBlocks(EngineConfig(kv_blocks=100, block_size=4, max_model_len=400))


@pytest.fixture
def running(kv):
    """Two sequences that decode: 16 prompt tokens each in four full blocks, one token emitted."""
    sequences = [
        Sequence(
            Request(name, 0.0, prompt_tokens=16, output_tokens=20),
            length=17,
            computed=16,
            decoding=True,
            running=True,
            last_token_s=last_token_s,
        )
        for name, last_token_s in (("a", 1.0), ("b", 1.5))
    ]
    assert all(kv.allocate(sequence, 16) for sequence in sequences)
    return sequences


@pytest.fixture
def pending(running, kv):
    pending = PendingDecodes(running, kv)
    pending.start(SERIES)
    return pending


def test_steps_done_and_in_progress_need_blocks_that_nothing_has_taken(pending, running, kv):
    assert pending.blocks == 0
    pending.begin_step()
    assert pending.blocks == 2
    pending.end_steps(4, end_s=2.0)
    assert pending.blocks == 2, "four more tokens each fill one block each"
    pending.begin_step()
    assert pending.blocks == 4
    assert kv.free == 92
    assert [(s.computed, s.length, s.blocks) for s in running] == [(16, 17, 4)] * 2


def test_settling_writes_all_that_was_done_and_ends_the_series(pending, running, kv):
    pending.end_steps(4, end_s=2.0)
    pending.end_steps(1, end_s=2.5)
    assert pending.left == DecodeSeries(StepWork(0, 2, 44), steps=3)
    pending.settle()
    assert [(s.computed, s.length, s.blocks, s.last_token_s) for s in running] == [
        (21, 22, 6, 2.5)
    ] * 2
    assert kv.free == 88
    assert (pending.left, pending.blocks, pending.is_over) == (None, 0, True)
    pending.settle()
    assert running[0].length == 22, "once is enough"


def test_the_time_since_the_last_tokens_is_theirs_first_and_the_series_then(pending):
    assert pending.end_steps(2, end_s=2.0) == pytest.approx((2.0 - 1.0) + (2.0 - 1.5))
    assert pending.end_steps(6, end_s=4.0) == pytest.approx(2 * (4.0 - 2.0))
    assert pending.is_over


def test_neither_a_step_in_progress_nor_more_than_planned_can_be_written(pending):
    with pytest.raises(AssertionError, match="more than planned"):
        pending.end_steps(9, end_s=2.0)
    pending.begin_step()
    with pytest.raises(AssertionError, match="in progress"):
        pending.settle()

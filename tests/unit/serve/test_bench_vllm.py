"""The parts of `agft-ray bench vllm` that need no vLLM; the engines here are FAKES."""

import asyncio
from pathlib import Path

import pytest
import yaml

from agft_ray.errors import AgftError
from agft_ray.serve.bench_vllm import (
    ENVIRONMENT,
    SIDES,
    _Bench,
    bench_vllm,
    refuse_idle_tuner,
    summary,
)
from agft_ray.serve.bench_vllm_engine import CLIENTS, ENGINE, Block, measure


def block(tokens_per_s, ttft_s=0.1):
    return Block(tokens_per_s * 2, 2.0, [ttft_s] * 100)


def pairs(with_tokens_per_s, *, with_ttft_s=0.1):
    return [{"with": block(t, with_ttft_s), "without": block(1000)} for t in with_tokens_per_s]


# -- a block of load -------------------------------------------------------------------------------


class FakeEngine:
    """Gives out a token at each turn of the event loop; notes requests, and those ended."""

    def __init__(self):
        self.asked, self.ended = {}, 0

    async def generate(self, prompt, max_tokens, request_id):
        assert request_id not in self.asked
        self.asked[request_id] = prompt, max_tokens
        try:
            for _ in range(max_tokens):
                await asyncio.sleep(0)
                yield 1
        finally:
            self.ended += 1


def loaded(engine, **options):
    options = {"seed": 0, "warm_up_s": 0.0, "block_s": 0.05} | options
    return asyncio.run(measure(engine.generate, **options))


def test_a_block_counts_what_comes_and_gives_up_the_rest():
    engine = FakeEngine()
    measured = loaded(engine)
    complete = sum(max_tokens for _, max_tokens in engine.asked.values())
    assert 0 < measured.tokens <= complete
    assert 0 <= len(engine.asked) - len(measured.ttfts_s) <= CLIENTS
    assert measured.elapsed_s >= 0.05
    assert engine.ended == len(engine.asked)


def test_a_seed_gives_the_same_requests_and_another_gives_others():
    first, again, other = FakeEngine(), FakeEngine(), FakeEngine()
    loaded(first, seed=1), loaded(again, seed=1), loaded(other, seed=2)
    both = first.asked.keys() & again.asked.keys()
    assert len(both) >= CLIENTS
    assert all(first.asked[key] == again.asked[key] for key in both)
    assert not first.asked.keys() & other.asked.keys()
    assert len({len(prompt) for prompt, _ in first.asked.values()}) > 1, "lengths are mixed"


def test_the_warm_up_is_not_measured():
    class Silent(FakeEngine):
        async def generate(self, prompt, max_tokens, request_id):
            yield 1
            await asyncio.Event().wait()

    measured = loaded(Silent(), warm_up_s=0.02)
    assert (measured.tokens, list(measured.ttfts_s)) == (0, [])
    with pytest.raises(AgftError, match=r"no request got its first token .* lengthen --block-s"):
        measured.ttft_s(0.99)


def test_an_engine_that_fails_ends_the_block():
    class Failing(FakeEngine):
        async def generate(self, prompt, max_tokens, request_id):
            yield 1
            raise RuntimeError("EngineCore died")

    with pytest.raises(ExceptionGroup, match="unhandled errors"):
        loaded(Failing(), block_s=60.0)


# -- pairs of blocks -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch):
    monkeypatch.setattr("agft_ray.serve.bench_vllm.SETTLE_S", 0.0)


class FakeReplicas(_Bench):
    """Answers as replicas would, and notes what was asked."""

    def __init__(self, state="tuning"):
        super().__init__("http://nowhere", 5.0)
        self.state, self.asked = state, []

    def _ask(self, side, **asked):
        self.asked.append((side, asked["do"], asked.get("seed")))
        status = {"state": self.state, "reason": "", "windows": 8, "clock_changes": 3}
        block = {"tokens": 500, "elapsed_s": 5.0, "ttfts_s": [0.1]}
        return {"block": block, "tuner": status if side == "with" else None}


def test_both_blocks_of_a_pair_have_the_same_requests_in_an_order_of_the_seed():
    bench = FakeReplicas()
    bench.run(20, seed=0)
    steps = bench.asked[2:]
    assert [do for _, do, _ in steps] == ["begin", "measure", "end"] * 40
    measured = [(side, seed) for side, do, seed in steps if do == "measure"]
    first, second = measured[::2], measured[1::2]
    assert all({a[0], b[0]} == set(SIDES) for a, b in zip(first, second, strict=True))
    assert [seed for _, seed in first] == [seed for _, seed in second]
    assert len({seed for _, seed in first}) == 20
    assert {side for side, _ in first} == set(SIDES), "the order changes"
    assert (bench.windows, bench.clock_changes) == (160, 60)
    again = FakeReplicas()
    again.run(20, seed=0)
    assert again.asked == bench.asked


def test_a_tuner_that_does_not_tune_is_not_measured():
    with pytest.raises(AgftError, match=r"the tuner has not come to work.*'blind'"):
        FakeReplicas(state="blind").run(1, seed=0)
    with pytest.raises(AgftError, match="has not come to work"):
        refuse_idle_tuner(None)


# -- what comes of it ------------------------------------------------------------------------------


def test_the_summary_compares_within_pairs():
    with_tuner, without, tokens, ttft = summary(pairs([900, 1000, 1100], with_ttft_s=0.2), seed=0)
    assert "with tuner: 1000.0 tokens/s, TTFT p50 200.0 ms, p99 200.0 ms" in with_tuner
    assert "without tuner: 1000.0 tokens/s, TTFT p50 100.0 ms, p99 100.0 ms" in without
    assert tokens.startswith("tokens/s with / without: median 1.0000, 95 % interval 0.9000 to 1.1")
    assert ttft.startswith("p99 TTFT with / without: median 2.0000, 95 % interval 2.0000 to 2.0")


@pytest.mark.parametrize(
    ("tokens_per_s", "verdict"),
    [
        ([990] * 20, "the target holds"),
        ([989] * 20, "the target is missed"),
        ([900] * 11 + [1100] * 9, "the target holds, 1 is within the interval"),
    ],
)
def test_the_target_of_throughput(tokens_per_s, verdict):
    assert summary(pairs(tokens_per_s), seed=0)[2].endswith(f"; {verdict}")


@pytest.mark.parametrize(
    ("ttft_s", "verdict"), [(0.1009, "the target holds"), (0.102, "the target is missed")]
)
def test_the_target_of_ttft(ttft_s, verdict):
    assert summary(pairs([1000] * 20, with_ttft_s=ttft_s), seed=0)[3].endswith(f"; {verdict}")


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"blocks": 0}, "--blocks: 0"), ({"block_s": 0.0}, "--block-s: 0"), ({"block_s": -1.0}, "-1")],
)
def test_bad_arguments_are_refused(options, problem):
    with pytest.raises(AgftError, match=problem):
        bench_vllm(Path("model"), **options)


def test_engine_and_environment_are_those_of_the_shipped_config(request):
    content = yaml.safe_load((request.config.rootpath / "configs" / "vllm_cpu.yaml").read_text())
    (llm_config,) = content["applications"][0]["args"]["llm_configs"]
    assert llm_config["engine_kwargs"] == ENGINE
    assert llm_config["runtime_env"]["env_vars"] == ENVIRONMENT

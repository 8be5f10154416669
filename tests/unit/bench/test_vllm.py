"""The parts of `agft-ray bench vllm` that need no vLLM; the engines here are FAKES."""

import asyncio
from pathlib import Path

import pytest
import yaml
from golden_files import assert_golden, sections

from agft_ray.bench.tools import CpuUsage
from agft_ray.bench.vllm import (
    ENVIRONMENT,
    SIDES,
    _Bench,
    bench_vllm,
    delay_lines,
    refuse_idle_tuner,
    summary,
)
from agft_ray.bench.vllm_engine import CLIENTS, ENGINE, Block, measure
from agft_ray.errors import AgftError
from agft_ray.telemetry.delays import Delays


def block(tokens_per_s, ttft_s=0.1):
    return Block(tokens_per_s * 2, 2.0, [ttft_s] * 100)


def rounds(with_tokens_per_s, *, with_ttft_s=0.1):
    others = {"untimed": block(500, 0.4), "without": block(1000)}
    return [others | {"with": block(t, with_ttft_s)} for t in with_tokens_per_s]


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
    with pytest.raises(AgftError, match="--block-s"):
        measured.ttft_s(0.99)


def test_an_engine_that_fails_ends_the_block():
    class Failing(FakeEngine):
        async def generate(self, prompt, max_tokens, request_id):
            yield 1
            raise RuntimeError("EngineCore died")

    with pytest.raises(ExceptionGroup, match="unhandled errors"):
        loaded(Failing(), block_s=60.0)


def told_in(delays_s):
    delays = Delays()
    for delay_s in delays_s:
        delays.add(delay_s)
    return delays


# -- rounds of blocks ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch):
    monkeypatch.setattr("agft_ray.bench.vllm.SETTLE_S", 0.0)


class FakeReplicas(_Bench):
    """Answers as replicas would, and notes what was asked."""

    def __init__(self, state="tuning"):
        super().__init__("http://nowhere", 5.0)
        self.state, self.asked = state, []

    def _ask(self, side, **asked):
        self.asked.append((side, asked["do"], asked.get("seed")))
        status = {"state": self.state, "reason": "", "windows": 8, "clock_changes": 3}
        delays = told_in([0.0007, 0.0013])
        status |= {"phase_changes_put_off": 2, "phase_delays": delays.counts}
        block = {"tokens": 500, "elapsed_s": 5.0, "ttfts_s": [0.1]}
        return {"block": block, "tuner": None if side == "without" else status}


def test_the_blocks_of_a_round_have_the_same_requests_in_an_order_of_the_seed():
    bench = FakeReplicas()
    bench.run(20, seed=0)
    steps = bench.asked[3:]
    assert [do for _, do, _ in steps] == ["begin", "measure", "end"] * 60
    measured = [(side, seed) for side, do, seed in steps if do == "measure"]
    turns = [measured[start : start + 3] for start in range(0, 60, 3)]
    assert all({side for side, _ in turn} == set(SIDES) for turn in turns)
    assert all(len({seed for _, seed in turn}) == 1 for turn in turns)
    assert len({turn[0][1] for turn in turns}) == 20
    for place in range(3):
        assert {turn[place][0] for turn in turns} == set(SIDES), "the order changes"
    assert (bench.windows, bench.clock_changes, bench.put_off) == (320, 120, 80)
    assert (sum(bench.delays.counts), bench.delays.percentile_ms(0.5)) == (80, 0.75)
    again = FakeReplicas()
    again.run(20, seed=0)
    assert again.asked == bench.asked


def test_a_tuner_that_does_not_tune_is_not_measured():
    with pytest.raises(AgftError, match="'blind'"):
        FakeReplicas(state="blind").run(1, seed=0)
    with pytest.raises(AgftError, match="tuner"):
        refuse_idle_tuner(None)


# -- what comes of it ------------------------------------------------------------------------------


def test_the_screen_of_a_summary():
    screens = {
        "missed by TTFT": summary(rounds([900, 1000, 1100], with_ttft_s=0.2), seed=0)[0],
        "holds": summary(rounds([1000] * 20), seed=0)[0],
        "holds within the interval": summary(rounds([900] * 11 + [1100] * 9), seed=0)[0],
        "delays": delay_lines(told_in([0.0007] * 98 + [0.004] * 2))[0],
    }
    assert_golden("bench_vllm", sections({name: "\n".join(s) for name, s in screens.items()}))


def test_the_summary_compares_within_rounds():
    lines, is_missed = summary(rounds([900, 1000, 1100], with_ttft_s=0.2), seed=0)
    intervals = {line.partition(":")[0]: line.partition(": ")[2] for line in lines[3:]}
    assert list(intervals) == [
        "tokens/s with / without",
        "p99 TTFT with / without",
        "tokens/s untimed / without",
        "p99 TTFT untimed / without",
        "tokens/s with / untimed",
        "p99 TTFT with / untimed",
    ]
    medians = [float(text.split()[1].rstrip(",")) for text in intervals.values()]
    assert medians == [1.0, 2.0, 0.5, 4.0, 2.0, 0.5]
    assert is_missed


def test_only_an_engine_as_it_is_tuned_has_targets():
    lines, is_missed = summary(rounds([1000] * 20), seed=0)
    assert all("the target holds" in line for line in lines[3:5])
    assert not any("target" in line for line in lines[5:])
    assert not is_missed, "the untimed side is far off, and not the point"


@pytest.mark.parametrize(
    ("tokens_per_s", "missed"),
    [([990] * 20, False), ([989] * 20, True), ([900] * 11 + [1100] * 9, False)],
)
def test_the_target_of_throughput(tokens_per_s, missed):
    lines, is_missed = summary(rounds(tokens_per_s), seed=0)
    assert ("missed" in lines[3]) is missed
    assert is_missed is missed


@pytest.mark.parametrize(("ttft_s", "missed"), [(0.1009, False), (0.102, True)])
def test_the_target_of_ttft(ttft_s, missed):
    lines, is_missed = summary(rounds([1000] * 20, with_ttft_s=ttft_s), seed=0)
    assert ("missed" in lines[4]) is missed
    assert is_missed is missed


@pytest.mark.parametrize(
    ("delays_s", "missed"),
    [([0.001, 0.0099, 0.5], False), ([0.001, 0.011, 0.5], True), ([], True)],
)
def test_the_target_of_delays(delays_s, missed):
    lines, is_late = delay_lines(told_in(delays_s))
    assert ("missed" in lines[0]) is missed
    assert is_late is missed


@pytest.mark.parametrize("delays_s", [[0.001], [0.02]])
def test_the_exit_status_is_1_if_clocks_follow_late(delays_s, capsys):
    bench = FakeReplicas()
    bench.rounds, bench.delays = rounds([1000] * 3), told_in(delays_s)
    assert bench.print_summary(seed=0) == (delays_s == [0.02])


@pytest.mark.parametrize(("tokens_per_s", "status"), [(1000, 0), (900, 1)])
def test_the_exit_status_is_1_if_a_target_is_missed(tokens_per_s, status, capsys):
    bench = FakeReplicas()
    bench.rounds, bench.delays = rounds([tokens_per_s] * 3), told_in([0.001])
    assert bench.print_summary(seed=0) == status
    assert ("is missed" in capsys.readouterr().out) is bool(status)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"blocks": 0}, "--blocks: 0"),
        ({"block_s": 0.0}, "--block-s: 0"),
        ({"block_s": -1.0}, "-1"),
        ({"window_s": 0.1}, r"window_s: .* 0\.5, got 0\.1"),
    ],
)
def test_bad_arguments_are_refused(options, problem):
    with pytest.raises(AgftError, match=problem):
        bench_vllm(Path("model"), **options)


def test_a_process_that_began_within_a_block_has_used_all_its_time_in_it():
    usage = CpuUsage()
    usage.add({1: ("Tuner", 3.0)}, {1: ("Tuner", 3.5), 2: ("IDLE", 1.0)}, 10.0)
    assert str(usage) == "IDLE 10.0%, Tuner 5.0%"


def test_engine_and_environment_are_those_of_the_shipped_config(request):
    content = yaml.safe_load((request.config.rootpath / "configs" / "vllm_cpu.yaml").read_text())
    (llm_config,) = content["applications"][0]["args"]["llm_configs"]
    assert llm_config["engine_kwargs"] == ENGINE
    assert llm_config["runtime_env"]["env_vars"] == ENVIRONMENT

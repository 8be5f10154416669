"""A continuous-batching LLM engine without a model: vLLM V1's scheduling, token by token.

It knows no clock and does not wait: a driver asks for a batch, times it and reports its end.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable

from agft_ray.simulation.batch import Batch as Batch
from agft_ray.simulation.batch import DecodeSeries, Sequence
from agft_ray.simulation.batch import StepDevice as StepDevice
from agft_ray.simulation.batch import TokenEvent as TokenEvent
from agft_ray.simulation.engine_config import EngineConfig as EngineConfig
from agft_ray.simulation.kv_blocks import KvBlocks
from agft_ray.simulation.pending_decodes import PendingDecodes
from agft_ray.simulation.physics import StepWork
from agft_ray.telemetry.counters import EngineStats
from agft_ray.types import EngineSample
from agft_ray.workloads.requests import Request, RequestTimings


class BatchingEngine:
    """vLLM V1's scheduler over requests whose output lengths are known beforehand.

    Each step has a token budget. Running sequences come first, in the order of their admission
    (decodes take one token, a partial prefill goes on), then waiting ones, first come first
    served, prompts being split to fill the budget. KV blocks are taken as tokens are computed. If
    a running sequence finds none, the most recently admitted one is preempted: its blocks are
    freed, it goes to the head of the queue and later recomputes prompt and output so far, save
    what the prefix cache holds (see `KvBlocks`). `chunk_attention_s(tokens, offset)` is the
    attention time of a prefill chunk.
    """

    def __init__(
        self, config: EngineConfig, chunk_attention_s: Callable[[int, int], float]
    ) -> None:
        self.config = config
        self.kv = KvBlocks(config)
        self._chunk_attention_s = chunk_attention_s
        self._sequences: dict[str, Sequence] = {}
        self._future: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._in_flight: Batch | None = None
        self._pending = PendingDecodes(self._running, self.kv)
        self._stats = EngineStats()

    @property
    def is_empty(self) -> bool:
        """No request is known that is not finished, not even one yet to arrive."""
        return not self._sequences

    @property
    def waiting(self) -> int:
        """Requests that have arrived and wait, as of the last `schedule`."""
        return len(self._waiting)

    @property
    def kv_cache_usage(self) -> float:
        """Share of KV blocks in use, 0..1."""
        return 1.0 - (self.kv.free - self._pending.blocks) / self.kv.total

    def is_idle(self, t_s: float) -> bool:
        """Nothing runs, and nothing has arrived by `t_s` that waits."""
        arrived = bool(self._future) and _arrival_s(self._future[0]) <= t_s
        return not (self._running or self._waiting or arrived)

    def pending_prompts(self, t_s: float) -> int:
        """Requests that have arrived by `t_s` and whose next token needs prefill first."""
        arrived = bisect.bisect_right(self._future, t_s, key=_arrival_s)
        return len(self._waiting) + arrived + sum(not s.decoding for s in self._running)

    def check(self, request: Request) -> None:
        """Raise `ValueError` if the request can never be served."""
        prompt, output = request.prompt_tokens, request.output_tokens
        if prompt < 1 or output < 1:
            raise ValueError(
                f"request {request.request_id}: prompt_tokens {prompt} and output_tokens {output} "
                "must be at least 1"
            )
        if prompt + output > self.config.max_model_len:
            raise ValueError(
                f"request {request.request_id}: {prompt} prompt tokens and {output} output tokens "
                f"exceed max_model_len, which is {self.config.max_model_len}; shorten the request "
                "or raise max_model_len"
            )

    def add(self, request: Request) -> None:
        """Queue a request; it is visible to `schedule` from its `arrival_s` on.

        Raises `ValueError` if it does not fit `max_model_len` or its id is in use.
        """
        self.check(request)
        if request.request_id in self._sequences:
            raise ValueError(
                f"request {request.request_id}: the id is in use; choose another until it finishes"
            )
        sequence = Sequence.of(request)
        self._sequences[request.request_id] = sequence
        bisect.insort(self._future, sequence, key=_arrival_s)

    def abort(self, request_id: str) -> bool:
        """Drop a request wherever it is, also from the batch that runs; False if unknown."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        self._pending.settle()
        for queue in (self._running, self._waiting, self._future):
            if sequence in queue:
                queue.remove(sequence)
        self._release(sequence)
        return True

    def next_arrival_s(self) -> float | None:
        """When the next request arrives of those `schedule` has not seen; None if there is none."""
        return _arrival_s(self._future[0]) if self._future else None

    def schedule(self, now_s: float) -> Batch | None:
        """The next step's batch, of requests that arrived by `now_s`; None if there are none.

        The batch must be given to `complete` before the next call.
        """
        assert self._in_flight is None, "complete the last batch before scheduling the next"
        self._pending.settle()
        self._receive_arrivals(now_s)
        scheduled: list[tuple[Sequence, int]] = []
        preemptions = self._stats.preemptions
        budget = self._schedule_running(scheduled)
        if self._stats.preemptions == preemptions:
            budget = self._schedule_waiting(scheduled, budget)
        assert budget >= 0
        if scheduled:
            self._in_flight = Batch(scheduled, self._work(scheduled))
        return self._in_flight

    def complete(self, batch: Batch, start_s: float, end_s: float) -> list[TokenEvent]:
        """Account for a step that ran from `start_s` to `end_s`; returns the tokens it emitted."""
        assert batch is self._in_flight, "only the batch scheduled last can be completed"
        self._in_flight = None
        self._stats.on_step(
            prefill_tokens=batch.work.prefill_tokens,
            decode_tokens=batch.work.decode_sequences,
            time_s=end_s - start_s,
        )
        events = []
        for sequence, tokens in batch.scheduled:
            if sequence.running:  # else aborted meanwhile
                sequence.computed += tokens
                if sequence.prefix and not sequence.decoding:
                    self.kv.hold_prefix(sequence)
                if sequence.computed == sequence.length:
                    events.append(self._emit(sequence, end_s))
        return events

    def sample(self, t_s: float) -> EngineSample:
        """The statistics at `t_s`. Requests that arrived since the last `schedule` are waiting."""
        arrived = bisect.bisect_right(self._future, t_s, key=_arrival_s)
        return self._stats.sample(
            t_s=t_s,
            running=len(self._running),
            waiting=len(self._waiting) + arrived,
            kv_cache_usage=self.kv_cache_usage,
        )

    # -- series of decode-only steps, instead of `schedule` and `complete` for each -------------

    def plan_decodes(self, now_s: float) -> DecodeSeries | None:
        """The series of steps ahead at `now_s` if all running sequences decode and nothing that
        has arrived could be admitted before one finishes; else None, and `schedule` is to be
        asked. Nothing needs to come of it.
        """
        assert self._in_flight is None, "complete the last batch before planning"
        if self._receive_arrivals(now_s) or self._pending.is_over:
            self._pending.settle()
            self._pending.start(self._new_series())
        return self._pending.left

    def begin_decode(self) -> None:
        """The next step of the planned series runs: its KV blocks count as taken."""
        self._pending.begin_step()

    def complete_decodes(self, steps: int, start_s: float, end_s: float) -> list[RequestTimings]:
        """Account for steps of the planned series that ran from `start_s` to `end_s`; returns the
        requests they finished, which can only be in its last one.
        """
        self._stats.on_decode_steps(
            steps=steps,
            sequences=len(self._running),
            time_s=end_s - start_s,
            itl_sum_s=self._pending.end_steps(steps, end_s),
        )
        if not self._pending.is_over:
            return []
        self._pending.settle()
        return [self._finish(s) for s in tuple(self._running) if not s.remaining]

    def _new_series(self) -> DecodeSeries | None:
        running = self._running
        if not running or self._might_admit():
            return None
        context_tokens, steps = 0, self.config.max_model_len
        for sequence in running:
            if not sequence.decoding:
                return None
            context_tokens += sequence.length
            steps = min(steps, sequence.remaining)
        while steps and self.kv.needed(running, steps) > self.kv.free:
            steps //= 2
        return DecodeSeries(StepWork(0, len(running), context_tokens), steps) if steps else None

    def _might_admit(self) -> bool:
        """Whether the head of the queue could be admitted beside what runs; False only if that
        stays so until a running sequence finishes."""
        config, running = self.config, len(self._running)
        if not self._waiting or running >= config.max_num_seqs:
            return False
        tokens = min(self._waiting[0].length, config.max_num_batched_tokens - running)
        return tokens > 0 and self.kv.fits(tokens)

    # -- parts ---------------------------------------------------------------------------------

    def _receive_arrivals(self, now_s: float) -> bool:
        """Queue what has arrived; whether anything has."""
        if not self._future or _arrival_s(self._future[0]) > now_s:
            return False
        arrived = bisect.bisect_right(self._future, now_s, key=_arrival_s)
        self._waiting.extend(self._future[:arrived])
        del self._future[:arrived]
        return True

    def _schedule_running(self, scheduled: list[tuple[Sequence, int]]) -> int:
        budget = self.config.max_num_batched_tokens
        for sequence in self._running:  # preemption pops from the end, never what is scheduled
            tokens = min(sequence.length - sequence.computed, budget)
            if not tokens or not self._make_room(sequence, sequence.computed + tokens):
                break
            scheduled.append((sequence, tokens))
            budget -= tokens
        return budget

    def _schedule_waiting(self, scheduled: list[tuple[Sequence, int]], budget: int) -> int:
        while self._waiting and budget and len(self._running) < self.config.max_num_seqs:
            sequence = self._waiting[0]
            cached = self.kv.cached_tokens(sequence)
            tokens = min(sequence.length - cached, budget)
            if not self.kv.fits(cached + tokens):
                break
            sequence.cached = sequence.computed = cached
            self.kv.hold_prefix(sequence)  # before room is made, which could evict it
            self.kv.allocate(sequence, cached + tokens)
            sequence.running = True
            self._running.append(self._waiting.popleft())
            scheduled.append((sequence, tokens))
            budget -= tokens
        return budget

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        while not self.kv.allocate(sequence, tokens):
            victim = self._running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self._stats.on_preemption()

    def _release(self, sequence: Sequence) -> None:
        self.kv.release(sequence)
        sequence.computed = 0
        sequence.running = sequence.decoding = False

    def _work(self, scheduled: list[tuple[Sequence, int]]) -> StepWork:
        prefill_tokens = decode_sequences = context_tokens = 0
        attention_s = 0.0
        for sequence, tokens in scheduled:
            if sequence.decoding:
                decode_sequences += 1
                context_tokens += sequence.length
            else:
                prefill_tokens += tokens
                attention_s += self._chunk_attention_s(tokens, sequence.computed)
        return StepWork(prefill_tokens, decode_sequences, context_tokens, attention_s)

    def _emit(self, sequence: Sequence, t_s: float) -> TokenEvent:
        request = sequence.request
        index = sequence.length - request.prompt_tokens
        if index == 0:
            self._stats.on_prompt(tokens=request.prompt_tokens, cached_tokens=sequence.cached)
            self._stats.on_first_token(ttft_s=t_s - request.arrival_s)
            sequence.first_token_s = t_s
        else:
            self._stats.on_token(itl_s=t_s - sequence.last_token_s)
        sequence.last_token_s = t_s
        sequence.length += 1
        sequence.decoding = True
        timings = self._finish(sequence) if index + 1 == request.output_tokens else None
        return TokenEvent(request.request_id, index, t_s, timings)

    def _finish(self, sequence: Sequence) -> RequestTimings:
        request = sequence.request
        del self._sequences[request.request_id]
        self._running.remove(sequence)
        self._release(sequence)
        e2e_s = sequence.last_token_s - request.arrival_s
        decode_s, tokens = sequence.last_token_s - sequence.first_token_s, request.output_tokens - 1
        self._stats.on_finish(e2e_s=e2e_s, tpot_s=decode_s / tokens if tokens else None)
        return RequestTimings(
            request_id=request.request_id,
            arrival_s=request.arrival_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            ttft_s=sequence.first_token_s - request.arrival_s,
            e2e_s=e2e_s,
        )


def _arrival_s(sequence: Sequence) -> float:
    return sequence.request.arrival_s

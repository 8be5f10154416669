"""Latencies under slowdowns of the phases, relative to default clocks at the same load.

TPOT. A decoding sequence meets steps with prefill (time t_p) at a rate l a second, however long its
own steps (t_d) are, and gets a token from each step:
    TPOT = t_d / (1 - l (t_p - t_d)).
Slower tokens keep more sequences in the batch, which slow the step: with g the relative growth of a
decode step per relative growth of the others in the batch, t_d = t_d0 h_d (1 + g (r - 1)), r being
the ratio of TPOT itself (Little's law); iterated to its fixed point.

TTFT. The rest of the decode step under way, own prefill, waiting behind other prefills as in M/G/1
(Pollaczek-Khinchine, with prefill utilisation u), and what is lost while the clock rises:
    TTFT = d t_d/2 + s + u s c / (2 (1 - u)) + lag,  c = E[t_p²]/E[t_p]²,
d the share of time in decode steps, s the time of a prompt's own steps. The clock is there L after
the prompt: until then it advances at the clock before, so that `lag = L' (1 - h_p(f_p) / h_p(f))`.
L' is L for a prompt that finds the engine empty, else what is left of L once the decode step under
way is over.

E2E is both, in their shares. All arguments may be arrays of one shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agft_ray.policy.phases.load import Load

ROUNDS = 4
MAX_RATIO = 3.0
"""Predicted ratios are cut there."""


@dataclass(frozen=True, slots=True)
class Slowdowns:
    """Of a plan, or of many plans at once."""

    prefill: np.ndarray
    decode: np.ndarray
    decode_lag: np.ndarray
    """Share of the time lost while the clock rises from decode's to prefill's."""
    idle_lag: np.ndarray
    """The same from the clock of an empty engine."""


@dataclass(frozen=True, slots=True)
class Ratios:
    """Predicted latencies relative to default clocks."""

    ttft: np.ndarray
    tpot: np.ndarray
    e2e: np.ndarray


class LatencyModel:
    """Predicts ratios at one load."""

    def __init__(self, load: Load, switch_s: float) -> None:
        self._load = load
        step_s = load.decode_step_s * load.decode_slowdown
        self._lags = left_of_switch_s(step_s, switch_s), switch_s
        self._rate = load.interference / max(load.prefill_step_s * load.prefill_slowdown, 1e-9)
        one = np.ones(1)
        self._tpot_0 = self._tpot_s(one, one, one)
        zero = np.zeros(1)
        default = Slowdowns(one, one, zero, zero)
        self._ttft_0 = self._ttft_s(default)
        seen = np.full(1, load.prefill_slowdown), np.full(1, load.decode_slowdown)
        self._seen = self._raw(Slowdowns(*seen, zero, zero))
        self._others = 1.0 / float(self._seen.e2e[0])

    @property
    def seen(self) -> Ratios:
        """Of what was measured of late, at its mean slowdowns."""
        return self._seen

    def ratios(self, slowdowns: Slowdowns) -> Ratios:
        """TTFT, TPOT and E2E under these slowdowns."""
        return self._raw(slowdowns)

    def _raw(self, slowdowns: Slowdowns) -> Ratios:
        ratio = np.ones(np.broadcast(slowdowns.prefill, slowdowns.decode).shape)
        for _ in range(ROUNDS):
            tpot_s = self._tpot_s(slowdowns.prefill, slowdowns.decode, ratio)
            ratio = np.minimum(tpot_s / self._tpot_0, MAX_RATIO)
        ttft = np.minimum(self._ttft_s(slowdowns) / self._ttft_0, MAX_RATIO)
        share = self._ttft_share()
        return Ratios(ttft, ratio, share * ttft + (1.0 - share) * ratio)

    def _ttft_share(self) -> float:
        load = self._load
        if load.e2e_s <= 0:
            return 0.0
        return min(1.0, load.ttft_s / load.e2e_s)

    def _tpot_s(self, prefill: np.ndarray, decode: np.ndarray, ratio: np.ndarray) -> np.ndarray:
        load = self._load
        step_s = load.decode_step_s * decode * (1.0 + load.growth * (ratio - 1.0))
        extra_s = load.prefill_step_s * prefill - step_s
        return np.asarray(step_s / np.maximum(1.0 - self._rate * extra_s, 0.05))

    def _ttft_s(self, slowdowns: Slowdowns) -> np.ndarray:
        load = self._load
        own_s = load.prompt_s * slowdowns.prefill
        utilization = np.minimum(load.prefill / load.prefill_slowdown * slowdowns.prefill, 0.95)
        waiting_s = own_s * load.prefill_spread * utilization / (2.0 * (1.0 - utilization))
        rest_s = load.decode * load.decode_step_s * slowdowns.decode / 2.0
        decode_s, idle_s = self._lags
        # No more than the whole step can run at the clock before.
        lag_s = load.decode * _lost_s(decode_s, own_s, slowdowns.decode_lag)
        lag_s = lag_s + load.idle * _lost_s(idle_s, own_s, slowdowns.idle_lag)
        return np.asarray(np.maximum(own_s + waiting_s + rest_s + lag_s, 1e-9))


def _lost_s(time_s: float, step_s: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """What a step of `step_s` at its own clock loses if it is at another for `time_s` at first."""
    whole_s = step_s / np.maximum(1.0 - lost, 1e-3)
    return np.asarray(np.minimum(time_s, whole_s) * lost)


def left_of_switch_s(step_s: float, switch_s: float) -> float:
    """What is left of a change on average, once the step under way is over in which it began."""
    if step_s <= 0:
        return switch_s
    if switch_s < step_s:
        return switch_s**2 / (2.0 * step_s)
    return switch_s - step_s / 2.0

"""What tuning changed, at equal work: requests of the same lengths, replicas with the same load.

A router gives roles other requests, so their plain means differ by more than their clocks. Weights
give both roles the mean lengths of all requests together, and as many of each tenth of them
(calibration, Deville and Särndal, JASA 87, 1992). A weighted mean is then that of a regression on
the lengths, linear in each tenth but for a step; percentiles are weighted alike. Energy is compared
by replica and block of time in the same way, at the mean rates of prompt and output tokens of all.

Intervals are of a bootstrap over blocks of time, in which both roles are drawn together: requests
that wait for one another are not independent, blocks that are longer than requests nearly are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from agft_ray.replay.result import RequestRow
from agft_ray.replay.timeline import Interval, growth
from agft_ray.results.spread import Spread, t_quantile

BLOCK_S = 30.0
"""Simulated. Nearly all requests of a conversation are answered within it."""
MIN_BLOCKS = 10
"""From which on blocks tell how much they differ."""
RESAMPLES, SEED = 200, 0
PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
MIN_BEYOND = 10
"""Requests of each role beyond a percentile that is compared."""
MIN_MATCHED = 20
"""Values from which on how they go with work is known; fewer are compared as they are."""
TENTHS, MIN_FOR_TENTHS = np.arange(1, 10) / 10, 180
"""Fewer requests of a role are matched by their mean lengths alone."""

Latencies = Mapping[str, Callable[[RequestRow], float | None]]
"""Those to compare: by name, how to have it of a request."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What is compared of one role: values with their work, each in a block of time."""

    work: np.ndarray
    """(n, k): prompt tokens, output tokens, and in which tenth of them requests are."""
    values: np.ndarray
    """(n,), in ascending order where percentiles are asked for."""
    blocks: np.ndarray
    """(n,): which one."""
    weights: np.ndarray
    """(n,): what each stands for, all alike for requests, its duration for a rate."""

    def weighted(self, draws: np.ndarray, work: np.ndarray) -> np.ndarray:
        """Weights (n,) under which the mean work is `work`; blocks count as often as drawn. A few
        may be below 0, far from there."""
        weights = np.asarray(self.weights * draws[self.blocks])
        total = weights.sum()
        if not total or len(self.values) < MIN_MATCHED:
            return weights
        centred = self.work - self.mean_work(draws)
        spread = (weights[:, None] * centred).T @ centred / total
        off = np.linalg.pinv(spread) @ (work - self.mean_work(draws))
        return np.asarray(weights * (1.0 + centred @ off))

    def mean_work(self, draws: np.ndarray) -> np.ndarray:
        """The mean work (k,), blocks counting as often as drawn."""
        weights = self.weights * draws[self.blocks]
        return np.asarray(weights @ self.work / max(float(weights.sum()), 1e-12))


@dataclass(frozen=True, slots=True)
class Pair:
    """The tuned and the held-out sample of one figure."""

    tuned: Sample
    holdout: Sample

    def ratios(self, draws: np.ndarray, percentiles: Mapping[str, float]) -> dict[str, float]:
        """Tuned by holdout at equal work: of the mean, and of percentiles by name."""
        both = (self.tuned, self.holdout)
        totals = [float((each.weights * draws[each.blocks]).sum()) for each in both]
        means = [each.mean_work(draws) for each in both]
        work = (totals[0] * means[0] + totals[1] * means[1]) / max(sum(totals), 1e-12)
        tuned, holdout = (_statistics(each, draws, work, percentiles) for each in both)
        return {name: tuned[name] / holdout[name] for name in tuned if holdout[name]}


def _statistics(
    sample: Sample, draws: np.ndarray, work: np.ndarray, percentiles: Mapping[str, float]
) -> dict[str, float]:
    weights = sample.weighted(draws, work)
    total = float(weights.sum())
    if not total:
        return dict.fromkeys(("mean", *percentiles), np.nan)
    mean = float(weights @ sample.values) / total
    weights = np.maximum(weights, 0.0)  # a cumulative sum does not fall
    middles = (np.cumsum(weights) - weights / 2.0) / weights.sum()
    at = {name: float(np.interp(q, middles, sample.values)) for name, q in percentiles.items()}
    return {"mean": mean} | at


@dataclass(frozen=True, slots=True)
class Figures:
    """All that is compared of a replay."""

    latencies: dict[str, Pair]
    energy: Pair | None
    """Powers in W, at rates of tokens per second; None if the server does not tell energy."""
    blocks: int

    def changes_percent(self) -> dict[str, Spread]:
        """By the names of `Group.comparable`; those for which there are too few requests are left
        out, and intervals if there are too few blocks."""
        estimate = self._ratios(np.ones(self.blocks))
        if self.blocks < MIN_BLOCKS:
            return {name: Spread(1, 100 * (ratio - 1), None) for name, ratio in estimate.items()}
        rng = np.random.default_rng(SEED)
        even = np.full(self.blocks, 1.0 / self.blocks)
        drawn = [self._ratios(rng.multinomial(self.blocks, even)) for _ in range(RESAMPLES)]
        t = t_quantile(self.blocks - 1)
        changes = {}
        for name, ratio in estimate.items():
            error = float(np.nanstd([each.get(name, np.nan) for each in drawn], ddof=1))
            changes[name] = Spread(self.blocks, 100 * (ratio - 1), 100 * t * error)
        return changes

    def _ratios(self, draws: np.ndarray) -> dict[str, float]:
        ratios: dict[str, float] = {}
        for name, pair in self.latencies.items():
            found = pair.ratios(draws, _percentiles_of(pair))
            ratios |= {f"{name}.{statistic}": ratio for statistic, ratio in found.items()}
        if self.energy is not None and (energy := self._energy_ratio(self.energy, draws)):
            ratios["energy_per_output_token_j"] = energy
            if (e2e := ratios.get("e2e_s.mean")) is not None:
                ratios["edp_per_output_token_j_s"] = energy * e2e
        return ratios

    def _energy_ratio(self, pair: Pair, draws: np.ndarray) -> float | None:
        """Of the powers at the same rates of tokens, which is that of the energies per token; in a
        short run of the latter as they are."""
        if self.blocks >= MIN_BLOCKS:
            return pair.ratios(draws, {}).get("mean")
        (tuned_j, tuned), (holdout_j, holdout) = (
            (float(each.weights @ each.values), float(each.weights @ each.work[:, 1]))
            for each in (pair.tuned, pair.holdout)
        )
        return tuned_j / tuned / (holdout_j / holdout) if tuned and holdout_j and holdout else None


def _percentiles_of(pair: Pair) -> dict[str, float]:
    """Those beyond which each role has enough requests."""
    fewest = min(len(pair.tuned.values), len(pair.holdout.values))
    return {name: q for name, q in PERCENTILES.items() if fewest >= needed(q)}


def needed(percentile: float) -> int:
    """How many requests a percentile takes."""
    return round(MIN_BEYOND / (1.0 - percentile))


def figures_of(
    rows: Mapping[str, Sequence[RequestRow]],
    intervals: Mapping[str, Sequence[Interval]],
    latencies: Latencies,
    *,
    roles: tuple[str, str],
    started_s: float,
    duration_s: float,
) -> Figures:
    """By role its answered requests and its replicas' sightings; `roles` is tuned, then holdout.

    Where an answer does not state its tokens, requests are compared whatever their lengths.
    """
    blocks = max(1, int(duration_s / BLOCK_S))

    def block(t_s: float) -> int:
        return min(max(int(t_s / BLOCK_S), 0), blocks - 1)

    pairs = {}
    for name, value in latencies.items():
        samples = [_requests(rows[role], value, block) for role in roles]
        if all(len(sample.values) for sample in samples):
            pairs[name] = Pair(*_by_tenths(samples))
    cells = [_powers(intervals[role], started_s, block) for role in roles]
    energy = Pair(*cells) if all(len(cell.values) for cell in cells) else None
    return Figures(pairs, energy, blocks)


def _requests(
    rows: Iterable[RequestRow],
    value: Callable[[RequestRow], float | None],
    block: Callable[[float], int],
) -> Sample:
    found = [
        (latency_s, row.prompt_tokens or 0, row.output_tokens or 0, block(row.arrival_s))
        for row in rows
        if (latency_s := value(row)) is not None
    ]
    table = np.array(sorted(found), dtype=float).reshape(-1, 4)
    return Sample(table[:, 1:3], table[:, 0], table[:, 3].astype(int), np.ones(len(table)))


def _by_tenths(samples: Sequence[Sample]) -> list[Sample]:
    """With above which tenths of all requests' lengths each is, if there are enough."""
    if min(len(sample.values) for sample in samples) < MIN_FOR_TENTHS:
        return list(samples)
    edges = np.quantile(np.concatenate([sample.work for sample in samples]), TENTHS, axis=0)
    return [
        replace(sample, work=np.hstack([sample.work, *(sample.work > edge for edge in edges)]))
        for sample in samples
    ]


def _powers(
    intervals: Iterable[Interval], started_s: float, block: Callable[[float], int]
) -> Sample:
    """A replica's mean power in each block, with the rates at which it had tokens to compute."""
    cells: dict[tuple[str, int], np.ndarray] = {}
    for interval in intervals:
        before, after = interval
        at = block((before.t_s + after.t_s) / 2.0 - started_s)
        names = ("energy_t_s", "energy_j", "prompt_tokens", "generation_tokens")
        grown = np.array([growth(interval, name) for name in names])
        cells[after.replica, at] = cells.get((after.replica, at), np.zeros(4)) + grown
    kept = {key: cell for key, cell in cells.items() if cell[0] > 0}
    table = np.array(list(kept.values())).reshape(-1, 4)
    seconds = table[:, 0]
    blocks = np.array([at for _, at in kept], dtype=int)
    return Sample(table[:, 2:] / seconds[:, None], table[:, 1] / seconds, blocks, seconds)

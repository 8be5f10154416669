"""What the policy `agft` does with a window: learn, rule out, refine, converge, start again."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from agft_ray.policy.agft.config import AgftConfig, AgftState
from agft_ray.policy.agft.drift import PageHinkley
from agft_ray.policy.agft.linucb import LinUcb
from agft_ray.policy.agft.verdict import Verdict, verdict
from agft_ray.policy.experience import Experience
from agft_ray.policy.statistics import FEATURES, Source, features_of, part_of, validate
from agft_ray.types import DEFAULT_CLOCKS_KEY, Arm, Outcome

NOISE_MEMORY = 64
"""Windows over which the noise of the rewards is averaged."""
MIN_NOISE_VARIANCE = 0.05**2
OUTLIER_SIGMAS = 4.0
"""A single prediction error counts for at most so many standard deviations."""
CONTEXT_MEMORY = 20
"""Windows over which the load is averaged."""
JUDGED_VISITS = 5
"""A clock that was not extremely bad in so many windows is not pruned any more."""
EDGE_SHARE = 0.8
"""A best clock further out than this share of the refined grid's reach is at its edge."""


class AgftLearner:
    """The regression, the state, and all that changes them. Arms are keyed by MHz."""

    def __init__(self, config: AgftConfig) -> None:
        self.config = config
        self._validated: Experience | None = None
        self.bandit = LinUcb(
            features=FEATURES,
            ridge=config.ridge,
            slope_ridge=config.slope_ridge,
            forgetting=config.forgetting,
            borrow_windows=config.borrow_windows,
            borrow_span_mhz=config.grid_step_mhz / 2,
        )
        self.state = AgftState(
            baseline_left=config.baseline_windows,
            prior_windows=config.prior_windows,
            drift=self._fresh_drift(),
        )

    def _fresh_drift(self) -> PageHinkley:
        return PageHinkley(self.config.drift_tolerance, self.config.drift_threshold)

    def allowed(self, keys: Iterable[int]) -> list[int]:
        """Those of the arms that are not pruned, dropped, or slower than one under suspicion."""
        state = self.state
        lowest = max(self._floor_mhz() + 1, max(state.suspects, default=0))
        ruled_out = {*state.pruned, *state.dropped}
        return [
            key
            for key in keys
            if key == DEFAULT_CLOCKS_KEY or (key >= lowest and key not in ruled_out)
        ]

    def _floor_mhz(self) -> int:
        return max(self.state.floor_mhz, self.state.prior_floor_mhz)

    def alpha(self) -> float:
        """The exploration weight: decays with the windows learned, varied by the seed."""
        config, windows = self.config, self.state.windows
        decayed = config.alpha * config.alpha_decay**windows
        generator = np.random.default_rng([config.seed, windows])
        return self.noise() * max(decayed, config.alpha_floor) * generator.uniform(0.5, 1.5)

    def noise(self) -> float:
        """Standard deviation of a window's reward around its prediction."""
        return math.sqrt(self.state.noise_variance)

    def learn(self, outcome: Outcome) -> None:
        """Learn from one window that is evidence; raises `ValueError` on bad features."""
        x, reward, state = features_of(outcome.context), outcome.reward, self.state
        requested, key = key_of(outcome.requested), self._credited(outcome)
        well_known = self.bandit.count(key) >= self.config.elimination_windows
        surprise = self.bandit.surprise(key, x, reward)
        gain = reward - float(x @ self.bandit.baseline)
        self.bandit.learn(key, x, reward)
        self._follow_load(x)
        if well_known and self._drifts(surprise, exploited=key == requested):
            self._relearn()
            return
        counted = self._count_window(requested, key)
        self._judge_measured(key)
        if state.anchor_mhz is not None:
            state.recent = [*state.recent, (key, gain)][-self.config.convergence_window :]
        overdue = state.windows - self.config.refine_after
        if counted and overdue >= 0 and overdue % self.config.refine_interval == 0:
            self._refine(x)
        if not state.converged and self._has_converged():
            state.converged = True
            state.prior_windows = self.config.prior_windows
            state.drift = self._fresh_drift()

    def _follow_load(self, x: np.ndarray) -> None:
        weight = 1 / min(CONTEXT_MEMORY, 1 + sum(self.state.visits.values()))
        pairs = zip(self.state.context, x.tolist(), strict=True)
        self.state.context = [mean + weight * (value - mean) for mean, value in pairs]

    def _credited(self, outcome: Outcome) -> int:
        """The arm a reward belongs to: the one requested if the observed clock is near it."""
        requested, observed = key_of(outcome.requested), key_of(outcome.arm)
        near = abs(requested - observed) <= self.config.grid_step_mhz / 2
        return requested if near else observed

    def _count_window(self, requested: int, key: int) -> bool:
        """Count visits, drop a clock that is never what is observed; True if the window is one of
        those after the sweep. Windows at default clocks are not: they may be a holdout's.
        """
        state = self.state
        counted = key != DEFAULT_CLOCKS_KEY and (
            state.anchor_mhz is not None or key in state.visits
        )
        state.windows += counted
        if key == DEFAULT_CLOCKS_KEY and state.baseline_left > 0:
            state.baseline_left -= 1
        for arm in {requested, key}:
            state.visits[arm] = state.visits.get(arm, 0) + 1
        if requested == key:
            state.mismatches.pop(requested, None)
        elif requested != DEFAULT_CLOCKS_KEY:
            state.mismatches[requested] = state.mismatches.get(requested, 0) + 1
            if state.mismatches[requested] >= self.config.max_mismatches:
                state.dropped[requested] = key
        return counted

    def _judge_measured(self, key: int) -> None:
        """Judge the clock just measured, and anew those under suspicion."""
        state = self.state
        recent = {key} if state.visits[key] <= JUDGED_VISITS else set()
        for clock in sorted(recent.union(state.suspects)):
            self._judge(clock, confirmed=state.visits.get(clock, 0) >= 2)

    def _judge(self, clock: int, *, confirmed: bool, by_prior: bool = False) -> None:
        """Compare a clock with the best and apply the verdict, unless it is ruled out by now."""
        if clock <= self._floor_mhz():
            return
        rival, gap, error = self._lag(clock)
        found = verdict(
            gap=gap,
            error=error,
            clock_mhz=clock,
            rival_mhz=rival,
            extreme_edp_ratio=self.config.extreme_edp_ratio,
            confirmed=confirmed,
        )
        self._apply(found, clock, by_prior=by_prior)

    def _apply(self, found: Verdict, clock: int, *, by_prior: bool) -> None:
        """A floor found by a prior is kept apart: the next prior replaces it."""
        state = self.state
        state.suspects = [other for other in state.suspects if other != clock]
        match found:
            case Verdict.KEEP:
                pass
            case Verdict.SUSPECT:
                state.suspects.append(clock)
            case Verdict.PRUNE:
                if clock not in state.pruned:
                    state.pruned = [*state.pruned, clock]
            case Verdict.FLOOR if by_prior:
                state.prior_floor_mhz = clock
            case Verdict.FLOOR:
                state.floor_mhz = clock

    def _lag(self, key: int) -> tuple[int, float, float]:
        """Clock of the best arm at this one's mean load, by how much (in reward), and the error.

        Default clocks as the best arm stand for the highest clock known. The error includes that
        of the load's slopes, as the two were measured under other loads.
        """
        bandit = self.bandit
        x = bandit.mean_context(key)
        keys = [*self.allowed(k for k in bandit.keys if k != key), key]
        prediction = bandit.predict(x, keys)
        own, best = len(keys) - 1, int(np.argmax(prediction.means))
        load_width = bandit.load_width(x - bandit.mean_context(keys[best]))
        width = math.hypot(prediction.widths[own], prediction.widths[best], load_width)
        gap = float(prediction.means[best] - prediction.means[own])
        return keys[best] or max(keys), gap, self.config.sigmas * self.noise() * width

    def _drifts(self, surprise: float, *, exploited: bool) -> bool:
        """Follow the noise; while exploiting, test whether the prediction errors have a mean."""
        state, limit = self.state, OUTLIER_SIGMAS
        scaled = max(-limit, min(limit, surprise / self.noise()))
        state.noise_windows = min(state.noise_windows + 1, NOISE_MEMORY)
        state.noise_variance *= 1.0 + (scaled**2 - 1.0) / state.noise_windows
        state.noise_variance = max(state.noise_variance, MIN_NOISE_VARIANCE)
        return state.converged and exploited and state.drift.add(scaled)

    def _relearn(self) -> None:
        """Start again, from little more than the noise and the load."""
        old, config = self.state, self.config
        self.bandit.discount(config.relearn_windows)
        self.state = AgftState(
            baseline_left=config.relearn_windows,
            prior_windows=config.relearn_windows,
            drift=self._fresh_drift(),
            noise_variance=old.noise_variance,
            noise_windows=old.noise_windows,
            context=old.context,
            relearnings=old.relearnings + 1,
        )

    def _refine(self, x: np.ndarray) -> None:
        """Choose the clock to refine around; once converged, only leave the edge of the grid."""
        state, config = self.state, self.config
        keys = self.allowed(k for k in self.bandit.keys if k)
        if not keys:
            return
        optimistic = state.windows >= config.mature_after and not state.converged
        weight = self.alpha() if optimistic else -self.noise()
        prediction = self.bandit.predict(x if optimistic else np.array(state.context), keys)
        anchor = keys[int(np.argmax(prediction.means + weight * prediction.widths))]
        if state.converged and state.anchor_mhz is not None:
            if abs(anchor - state.anchor_mhz) <= EDGE_SHARE * config.refine_span_mhz:
                return
            state.converged, state.recent = False, []
        state.anchor_mhz = anchor

    def _has_converged(self) -> bool:
        """The best arm and its neighbours had most of the last windows, and the gain over default
        clocks did not rise significantly from their first half to their second."""
        recent, config = self.state.recent, self.config
        if len(recent) < config.convergence_window:
            return False
        best = self.best_key()
        near = [abs(key - best) <= config.grid_step_mhz / 2 for key, _ in recent]
        gains, half = [gain for _, gain in recent], len(recent) // 2
        rise = np.mean(gains[half:]) - np.mean(gains[:half])
        return bool(
            np.mean(near) >= config.convergence_share
            and rise <= config.sigmas * self.noise() / math.sqrt(half / 2)
        )

    def best_key(self) -> int:
        """The arm in play with the best expected reward at the recent mean load."""
        anchor, span = self.state.anchor_mhz, self.config.refine_span_mhz
        near = (k for k in self.bandit.keys if anchor is None or abs(k - anchor) <= span)
        keys = [DEFAULT_CLOCKS_KEY, *self.allowed(k for k in near if k)]
        means = self.bandit.predict(np.array(self.state.context), keys).means
        return keys[int(np.argmax(means))]

    def merge(self, prior: Experience) -> None:
        """Take a prior, and what it rules out; raises `PriorError`, changing nothing.

        Where own evidence about an arm contradicts the prior, the prior is set aside: so it is
        taken again and again, and the same object is validated once.
        """
        if prior is not self._validated:
            validate(prior, features=FEATURES)
            self._validated = prior
        error, arms = self.config.sigmas * self.noise(), range(len(prior.arms_mhz))
        kept = [k for k in arms if not self.bandit.contradicts(prior, k, error=error)]
        prior = part_of(prior, kept)
        state = self.state
        self.bandit.merge(prior, max_windows=state.prior_windows)
        if self._trusts_prior():
            state.prior_floor_mhz = 0
            for clock in sorted(prior.arms_mhz):
                self._judge(clock, confirmed=True, by_prior=True)

    def knows(self, key: int) -> bool:
        """Whether the prior is trusted and knows enough of an arm to leave it out of the sweep."""
        known = self.bandit.count(key, Source.PRIOR) >= self.config.known_windows
        return known and self._trusts_prior()

    def _trusts_prior(self) -> bool:
        """Not while relearning: what others know may have stopped being true as well."""
        return self.state.prior_windows >= self.config.prior_windows


def key_of(arm: Arm) -> int:
    """An arm as the key of its statistics."""
    return DEFAULT_CLOCKS_KEY if arm is None else arm

"""The policy `agft_reference`: the reference implementation of AGFT, its flaws included."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from agft_ray.config import StrictModel
from agft_ray.policy.arms import at_or_below, nearest
from agft_ray.policy.reference.bandit import (
    EMPTY_FEATURES,
    FEATURES,
    Normaliser,
    ReferenceArm,
    Vector,
    alpha,
    predict,
    raw_features,
    reward_of,
)
from agft_ray.policy.reference.space import (
    cascade,
    first_grid,
    historically_bad,
    is_extreme,
    predictive_anchor,
    refined_grid,
    statistical_anchor,
)
from agft_ray.policy.solo import SoloPolicy, SoloState
from agft_ray.types import Context, Decision, Outcome, Window

BASELINE_WINDOWS, BASELINE_SHARE = 10, 0.9
EXTREME_ROUNDS = 60
HISTORICAL_FROM, HISTORICAL_INTERVAL = 30, 20
REFINE_FROM, REFINE_INTERVAL = 80, 10
MATURE_ROUNDS = 100
CONVERGENCE_ACTIONS, CONVERGENCE_TOP, CONVERGENCE_SHARE = 100, 3, 0.6
DEGRADATION_WINDOWS, DEGRADATION_RATIO = 50, 1.3
IDLE_MHZ = 210
MAX_EMPTY_WINDOWS = 2
"""The third empty window in a row is idleness, in which the reference does not learn."""


class Place(enum.StrEnum):
    """What a window of a round is for."""

    SETTLE = "settle"
    """The first one after a choice: the reference sleeps for 1.3 s."""
    REWARD = "reward"
    THIRD = "third"
    """While learning, another one, for the sampler."""
    STATE = "state"
    """The context of the next choice, still under this clock."""


REFERENCE_WINDOW_S = 0.8
"""Length of the reference's windows: with the tuner's `window_s` at that, a round takes about as
long as there (3.9 s while learning, 3.1 s while exploiting)."""


class AgftReferenceConfig(StrictModel):
    """Settings of the policy `agft_reference`: none; its constants are the reference's."""

    name: Literal["agft_reference"] = "agft_reference"
    """The policy."""


class ReferenceState(SoloState):
    """What the policy remembers. Arms are keyed by MHz."""

    baseline_edps: list[float] = Field(default_factory=list)
    """EDPs at default clocks, J s; the first ten are the baseline for ever."""
    rounds: int = 0
    """Updates of the bandit."""
    feedbacks: int = 0
    """Those of them while learning."""
    normaliser: Normaliser = Field(default_factory=Normaliser)
    context: Vector = Field(default_factory=lambda: [0.0] * FEATURES)
    """z-scores of the last state window."""
    place: Place = Place.SETTLE
    """What the next window is for; a clock is chosen only before the first of a round."""
    held: int | None = None
    """The clock of this round."""
    arms: dict[int, ReferenceArm] = Field(default_factory=dict)
    pruned: list[int] = Field(default_factory=list)
    space: list[int] = Field(default_factory=list)
    """The refined list; empty: the first grid."""
    checked: int = 0
    """The round of the last historical check."""
    actions: list[int] = Field(default_factory=list)
    """The last 100 arms."""
    recent_edps: list[float] = Field(default_factory=list)
    """Their EDPs, J s."""
    exploiting: bool = False
    relearnings: int = 0
    end_s: float | None = None
    """End of the last window that came."""


class AgftReferencePolicy(SoloPolicy[ReferenceState]):
    """AGFT as published (github.com/SusCom-Lab/AGFT at 35172ce), as the yardstick for `agft`.

    Written from a description of its behaviour in EDP mode; nothing is copied. Kept at the
    policy's level: no intercept, so that at the mean load every arm predicts 0 (F1); degradation
    only flips the phase, and 100 old actions flip it back (F3); windows without tokens train
    reward 0 and EDP 0.0, and count as excellent in refinement (F8, see below); contexts and
    rewards confounded with the clock and the load, and nothing forgotten (F10); a window of
    +-150 MHz around a noisy anchor that replaces the space, pruning without return, convergence
    by counts of choices (F14); EDP from TPOT alone (F15); no cost of switching (F16).

    Not reproduced, as they are the loop's: incompatible, lost or mislabelled metrics (F4, F5,
    F9), clocks taken as failed or left locked (F6, F7), energy from averaged power (F11), the SLO
    and memory-clock modes (F12, F13), forgetting on restart (F2), unbounded histories and clocks
    the GPU does not support (F16).

    Our windows come one after another, so a round of the reference is made of several: one that
    settles, one for the reward, one more for the sampler while learning, one for the next context
    (under the clock before, as there). What differs: gauges are means over the window, not
    averages of its last samples; energy is the counter's. The loop hands over no windows without
    tokens: their number is inferred from the gap between two that do come, so rejected and
    throttled windows count as empty too, and with more than two in a row the engine counts as idle
    (there: three without running requests). Windows at default clocks that it did not choose
    (cooldown) end the round and teach nothing but features.
    """

    name = "agft_reference"

    def __init__(self, config: AgftReferenceConfig | None = None) -> None:
        super().__init__(config or AgftReferenceConfig(), ReferenceState())

    # -- choice --------------------------------------------------------------------------------

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        """See `Policy.select`; the context is ours, of the last window learned from."""
        state = self.state
        if not arms:
            return Decision(None, "no arms")
        if len(state.baseline_edps) < BASELINE_WINDOWS:
            return Decision(None, "baseline")
        if state.place is not Place.SETTLE and state.held in arms:
            return Decision(state.held, "hold")
        available = self._available(arms)
        if not available:
            return Decision(None, "no arms")
        if not state.space:
            for arm in reversed(available):
                if arm not in state.arms:
                    return Decision(arm, "sweep")
        known = [state.arms.get(arm) or ReferenceArm() for arm in available]
        means, widths = predict(known, state.context)
        if state.exploiting:
            return Decision(available[int(np.argmax(means))], "exploit")
        return Decision(available[int(np.argmax(means + alpha(state.rounds) * widths))], "learn")

    def _available(self, arms: Sequence[int]) -> list[int]:
        """The action space, ascending."""
        supported, state = sorted(arms), self.state
        if state.space:
            space = sorted({nearest(supported, clock) for clock in state.space})
        else:
            space = first_grid(supported)
        return [arm for arm in space if arm not in state.pruned]

    def select_idle(self, arms: Sequence[int]) -> Decision:
        """See `Policy.select_idle`."""
        return Decision(at_or_below(arms, IDLE_MHZ) if arms else None, "idle")

    # -- learning ------------------------------------------------------------------------------

    def _learn(self, outcome: Outcome) -> None:
        state, window = self.state, outcome.window
        empty = self._empty_windows(window)
        for _ in range(min(empty, MAX_EMPTY_WINDOWS)):
            self._take(outcome.requested, EMPTY_FEATURES, 0.0)
        if empty > MAX_EMPTY_WINDOWS:
            state.place, state.held = Place.STATE, outcome.requested
        self._take(outcome.requested, raw_features(window), window.edp_j_s or 0.0)
        state.end_s = window.end_s

    def _empty_windows(self, window: Window) -> int:
        """How many windows were withheld between the last one that came and this one."""
        if self.state.end_s is None or window.duration_s <= 0:
            return 0
        return max(0, int((window.start_s - self.state.end_s) / window.duration_s + 0.1))

    def _take(self, clock: int | None, raw: Sequence[float], edp_j_s: float) -> None:
        """Use one window for what its place in the round says; an EDP of 0.0 means no tokens."""
        state = self.state
        measuring = len(state.baseline_edps) < BASELINE_WINDOWS
        if clock is None or measuring:
            state.context, state.place = state.normaliser.add(raw), Place.SETTLE
            if clock is None and measuring and edp_j_s > 0:
                state.baseline_edps = [*state.baseline_edps, edp_j_s]
            return
        place = state.place if clock == state.held else Place.SETTLE
        state.held = clock
        if place is Place.SETTLE:
            state.place = Place.REWARD
        elif place is Place.REWARD:
            state.place = Place.STATE if state.exploiting else Place.THIRD
            self._reward(clock, edp_j_s)
        elif place is Place.THIRD:
            state.place = Place.STATE
            self._feedback(clock, state.normaliser.add(raw))
            self._finish_round()
        else:
            state.place, state.context = Place.SETTLE, state.normaliser.add(raw)

    def _reward(self, clock: int, edp_j_s: float) -> None:
        """Update the bandit with a reward window."""
        state = self.state
        baseline_j_s = BASELINE_SHARE * sum(state.baseline_edps) / BASELINE_WINDOWS
        reward = reward_of(edp_j_s, baseline_j_s) if edp_j_s > 0 else 0.0
        arm = state.arms.setdefault(clock, ReferenceArm())
        arm.learn(state.context, reward, edp_j_s)
        state.rounds += 1
        state.actions = [*state.actions, clock][-CONVERGENCE_ACTIONS:]
        state.recent_edps = [*state.recent_edps, edp_j_s][-2 * DEGRADATION_WINDOWS :]
        if state.rounds <= EXTREME_ROUNDS and is_extreme(arm):
            self._prune([clock])
        if state.exploiting:
            self._finish_round()

    def _feedback(self, clock: int, context: Sequence[float]) -> None:
        """Count a learning round; from the 80th on, refine the space after every tenth."""
        state = self.state
        state.feedbacks += 1
        overdue = state.feedbacks - REFINE_FROM
        if overdue < 0 or overdue % REFINE_INTERVAL:
            return
        known = self._known()
        if state.rounds < MATURE_ROUNDS:
            anchor = statistical_anchor(known, clock)
        else:
            anchor = predictive_anchor(known, context, state.rounds)
        if anchor is not None:
            state.space = refined_grid(anchor, min(state.arms), max(state.arms))

    def _finish_round(self) -> None:
        state = self.state
        due = state.rounds - state.checked >= HISTORICAL_INTERVAL
        if state.rounds >= HISTORICAL_FROM and due:
            state.checked = state.rounds
            self._prune(historically_bad(self._known()))
        self._switch_phase()

    def _known(self) -> dict[int, ReferenceArm]:
        """The visited arms of the present space; after the sweep, all of the first grid."""
        state = self.state
        low, high = (min(state.space), max(state.space)) if state.space else (0, max(state.arms))
        return {
            clock: arm
            for clock, arm in sorted(state.arms.items())
            if low <= clock <= high and clock not in state.pruned
        }

    def _prune(self, triggers: Sequence[int]) -> None:
        state = self.state
        for trigger in triggers:
            gone = cascade(trigger, list(self._known()), max(state.arms))
            state.pruned = sorted({*state.pruned, *gone})

    def _switch_phase(self) -> None:
        """Converge when three arms have had 60 of 100 choices; relearn when EDP rose by 30 %."""
        state = self.state
        if state.exploiting:
            half = DEGRADATION_WINDOWS
            before, after = state.recent_edps[:-half], state.recent_edps[-half:]
            worse = sum(after) > DEGRADATION_RATIO * sum(before)
            if len(before) == half and worse:
                state.exploiting = False
                state.relearnings += 1
            return
        top = Counter(state.actions).most_common(CONVERGENCE_TOP)
        share = sum(count for _, count in top) / CONVERGENCE_ACTIONS
        state.exploiting = state.rounds >= MATURE_ROUNDS and share >= CONVERGENCE_SHARE

    def status(self) -> dict[str, Any]:
        """Figures for people."""
        state = self.state
        return {
            "phase": self._phase(),
            "best_arm_mhz": Counter(state.actions).most_common(1)[0][0] if state.actions else None,
            "windows": state.rounds,
            "pruned": len(state.pruned),
            "relearnings": state.relearnings,
        }

    def _phase(self) -> str:
        if len(self.state.baseline_edps) < BASELINE_WINDOWS:
            return "baseline"
        return "exploit" if self.state.exploiting else "learn"

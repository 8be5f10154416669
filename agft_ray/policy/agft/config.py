"""Settings and state of the policy `agft`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agft_ray.config import Count, NonNegative, Positive, Share, StrictModel
from agft_ray.policy.agft.drift import PageHinkley
from agft_ray.policy.statistics import FEATURES


class AgftConfig(StrictModel):
    """Settings of the policy `agft`. Rewards are log ratios of EDP, with noise of about 0.1."""

    name: Literal["agft"] = "agft"
    """The policy."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Varies the exploration weight by up to half from window to window (randomised UCB, Vaswani
    et al. 2020), so that replicas with one prior do not all try the same clock at once."""

    baseline_windows: Count = 10
    """Windows at default clocks to begin with, less those that a prior knows."""
    grid_step_mhz: Annotated[int, Field(ge=15)] = 90
    """Step of the first search over the whole range, as in AGFT. Clocks closer than half of it
    count as one where a verdict needs many windows."""
    known_windows: Positive = 0.5
    """The first sweep leaves out a clock of which a prior knows so many windows: one, if it is
    not half forgotten. LinUCB visits again what is uncertain."""

    ridge: Positive = 0.3
    """Lambda of LinUCB: an arm differs from default clocks by noise / sqrt(ridge) = 0.18 per unit
    of a feature, a priori."""
    slope_ridge: Positive = 0.01
    """Ridge of the load's common slopes: noise / sqrt(slope_ridge) = 1 per unit, a priori."""
    alpha: Positive = 3.0
    """Exploration weight after the sweep, in standard deviations of the noise."""
    alpha_decay: Annotated[float, Field(gt=0, lt=1)] = 0.97
    """Factor of the exploration weight per window; a tenth is left after 76 windows."""
    alpha_floor: NonNegative = 0.2
    """Lowest exploration weight while learning, in the same unit."""
    forgetting: Annotated[float, Field(gt=0.9, le=1)] = 0.998
    """Discount of own evidence per window: half of it is forgotten in 346 windows."""
    borrow_windows: NonNegative = 2.0
    """Weight, in windows, of what an untried clock takes over from the nearest explored one."""
    prior_windows: Positive = 30.0
    """Highest weight of a prior per clock: own experience outvotes it in as many windows."""

    extreme_edp_ratio: Annotated[float, Field(gt=1)] = 1.6
    """A clock with so many times the best EDP, twice measured, is not visited again."""
    sigmas: Positive = 3.0
    """Standard errors by which a clock must be worse to be ruled out."""
    elimination_windows: Positive = 3.0
    """Windows without which a clock is not ruled out for being merely worse than the best."""
    max_mismatches: Count = 3
    """Windows in a row with another clock than requested before a clock is dropped."""

    refine_after: Count = 20
    """Windows after the sweep before the grid is refined around the best clock."""
    refine_interval: Count = 20
    """Windows between two choices of the clock to refine around."""
    refine_span_mhz: Annotated[int, Field(ge=15)] = 150
    """The refined grid reaches so far below and above it, as in AGFT."""
    mature_after: Count = 100
    """Windows after which that clock is chosen optimistically at the current load, not
    pessimistically at the mean load."""
    convergence_window: Annotated[int, Field(ge=10)] = 40
    """Windows over which convergence is judged."""
    convergence_share: Share = 0.6
    """Share of them that went to the best clock and those closer than half a grid step."""

    drift_tolerance: NonNegative = 0.5
    """Page-Hinkley tolerance in standard deviations of the noise."""
    drift_threshold: Positive = 12.0
    """Page-Hinkley threshold in the same unit. A shift by 2 is found in 8 windows; by Siegmund's
    approximation a false alarm comes once in some 250,000 windows of independent noise."""
    relearn_windows: Count = 3
    """What is left of any clock's evidence, in windows, when relearning starts."""

    @model_validator(mode="after")
    def _prior_can_replace_baseline(self) -> AgftConfig:
        if self.prior_windows < max(self.baseline_windows, self.known_windows):
            raise ValueError(
                f"prior_windows {self.prior_windows:g} must be at least baseline_windows and "
                f"known_windows, or no prior could shorten the start; raise it"
            )
        return self


class AgftState(BaseModel):
    """What the policy remembers besides the regression. Arms are keyed by MHz."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    baseline_left: int
    """Windows at default clocks still to come."""
    prior_windows: float
    """Weight of a prior per clock at present."""
    drift: PageHinkley
    windows: int = 0
    """Windows learned since the sweep."""
    visits: dict[int, int] = {}
    """Windows per arm since (re)learning started."""
    suspects: list[int] = []
    """Clocks that look extreme so far: the sweep visits them twice, and none below them."""
    pruned: list[int] = []
    floor_mhz: int = 0
    """Clocks up to this one are pruned, by own experience."""
    prior_floor_mhz: int = 0
    """The same by the latest prior."""
    mismatches: dict[int, int] = {}
    dropped: dict[int, int] = {}
    """Clocks that never come true, and what was observed instead."""
    anchor_mhz: int | None = None
    """The clock the grid is refined around."""
    recent: list[tuple[int, float]] = []
    """Arm and gain over default clocks of the last windows on the refined grid."""
    converged: bool = False
    noise_variance: float = 0.01
    noise_windows: int = 4
    """Weight of that variance in windows; at first it is an assumption worth a few."""
    context: Annotated[list[float], Field(min_length=FEATURES, max_length=FEATURES)] = [
        1.0,
        *[0.0] * (FEATURES - 1),
    ]
    """Exponentially weighted mean of the features."""
    relearnings: int = 0

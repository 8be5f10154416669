"""Adding experience of several replicas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agft_ray.errors import PriorError
from agft_ray.policy.experience import Experience
from agft_ray.policy.statistics import FEATURES


def add(experiences: Sequence[Experience]) -> Experience:
    """The sum of experience, arm by arm, over the union of arms (ascending).

    Sums of windows add exactly: training on the result equals training on all windows together.
    Commutative and associative; nothing summed is no arms at all. The parts are taken as validated
    (`policy.statistics.validate`); raises `PriorError` if they differ in the number of features.
    """
    sizes = {experience.grams.shape[-1] for experience in experiences} or {FEATURES}
    if len(sizes) > 1:
        raise PriorError(f"experience of {sorted(sizes)} features cannot be added; use one schema")
    arms = sorted({arm for experience in experiences for arm in experience.arms_mhz})
    rows = {arm: row for row, arm in enumerate(arms)}
    d = sizes.pop()
    total = Experience(
        tuple(arms), np.zeros(len(arms)), np.zeros((len(arms), d, d)), np.zeros((len(arms), d))
    )
    for part in experiences:
        at = [rows[arm] for arm in part.arms_mhz]
        total.counts[at] += part.counts
        total.grams[at] += part.grams
        total.responses[at] += part.responses
    return total

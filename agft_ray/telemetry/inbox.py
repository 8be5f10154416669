"""Where an engine's pushed statistics wait for the loop."""

from __future__ import annotations

import bisect
import collections
import operator

from agft_ray.errors import StaleMetricsError
from agft_ray.types import EngineSample

CAPACITY = 1024


class EngineInbox:
    """The newest engine samples of one replica; written by pushes, read by the loop.

    Safe with one writer and one reader thread: samples are frozen and the deque's operations are
    atomic.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._samples: collections.deque[EngineSample] = collections.deque(maxlen=capacity)

    def push(self, sample: EngineSample) -> None:
        """Keep a sample; one that is older than the newest (late delivery) is dropped."""
        if not self._samples or sample.t_s > self._samples[-1].t_s:
            self._samples.append(sample)

    def latest(self, now_s: float, max_age_s: float) -> EngineSample:
        """The newest sample; raises `StaleMetricsError` if there is none younger than that."""
        if not self._samples:
            raise StaleMetricsError("the engine has pushed no statistics yet")
        sample = self._samples[-1]
        if now_s - sample.t_s > max_age_s:
            age_s = now_s - sample.t_s
            raise StaleMetricsError(
                f"the engine's newest statistics are {age_s:.1f} s old, the limit is {max_age_s} s"
            )
        return sample

    def is_idle(self, now_s: float, max_age_s: float) -> bool:
        """Whether the engine is known to be empty; statistics that are missing or older are not."""
        try:
            return self.latest(now_s, max_age_s).is_idle
        except StaleMetricsError:
            return False

    def since(self, t_s: float) -> list[EngineSample]:
        """All samples taken at or after `t_s`, oldest first."""
        samples = tuple(self._samples)
        return list(samples[bisect.bisect_left(samples, t_s, key=_t_s) :])


_t_s = operator.attrgetter("t_s")

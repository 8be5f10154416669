"""The best of a grid of plans of three clocks by a few score runs: coarse to fine, and pure.

A plan is a point: where its prefill, decode and idle clocks lie on their ascending axes. The last
place of the idle axis is no clock but the driver's default governor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations, product

Point = tuple[int, int, int]
"""Places on the axes of prefill, decode and idle."""
Score = Callable[[Sequence[Point]], Sequence[float]]
"""The less, the better; infinite for what breaks a bound."""
IDLE_SCAN = 16
"""At most about so many lower idle clocks are tried at once."""


def search(score: Score, sizes: Point) -> Point | None:
    """The point with the least score of a grid of this size, None if none is finite.

    From the highest clocks it descends among neighbours at a distance (26, and the default governor
    in place of their idle clocks), slides along the border of the bounds where none of them is
    better, and goes on at half the distance, trusting that higher clocks keep what lower ones keep.
    It ends where no neighbour on the grid itself is better, all having been asked. That is no proof
    that nothing is: a p99 is no steady function of a clock.
    """
    return _Search(score, sizes).run()


def _at(point: Point, axis: int, place: int) -> Point:
    prefill, decode, idle = (place if axis == i else point[i] for i in range(3))
    return prefill, decode, idle


@dataclass(slots=True)
class _Line:
    """Bisection along an axis: a bound is broken below `low`, none from `high` on, if at all."""

    base: Point
    axis: int
    low: int
    high: int

    @property
    def middle(self) -> Point:
        """To be asked next."""
        return _at(self.base, self.axis, (self.low + self.high) // 2)

    @property
    def lowest(self) -> Point:
        """The lowest that may keep the bounds."""
        return _at(self.base, self.axis, self.high)

    def narrow(self, *, is_broken: bool) -> None:
        """By what was found in the middle."""
        place = (self.low + self.high) // 2
        if is_broken:
            self.low = min(place + 1, self.high)
        else:
            self.high = place

    def is_narrow(self, distance: int) -> bool:
        return self.high - self.low < distance


class _Search:
    def __init__(self, score: Score, sizes: Point) -> None:
        self._score = score
        self._top = (sizes[0] - 1, sizes[1] - 1, sizes[2] - 2)
        self._governor = sizes[2] - 1
        self._seen: dict[Point, float] = {}

    def run(self) -> Point | None:
        prefill, decode, _ = self._top
        self._ask([(prefill, decode, 0), (prefill, decode, self._governor)])
        if self._is_broken((prefill, decode, 0)):
            self._ask(self._idle_scan((prefill, decode, self._governor)))
        if self._is_broken(self._best()):
            return None
        # A quarter of the longest axis, as a power of two.
        distance = 1 << max((max(self._top) + 1) // 4, 1).bit_length() - 1
        while distance:
            self._descend(distance)
            distance //= 2
        return self._best()

    def _descend(self, distance: int) -> None:
        while True:
            before = self._best()
            self._ask(self._neighbours(before, distance))
            if self._best() == before:
                self._slide(before, distance)
            if self._best() == before:
                return

    def _ask(self, points: Iterable[Point]) -> None:
        new = [point for point in dict.fromkeys(points) if point not in self._seen]
        if new:
            self._seen.update(zip(new, self._score(new), strict=True))

    def _best(self) -> Point:
        """Of equals the lowest clocks, whatever the order they were asked in."""
        return min(self._seen, key=lambda point: (self._seen[point], point))

    def _is_broken(self, point: Point) -> bool:
        return math.isinf(self._seen[point])

    def _neighbours(self, centre: Point, distance: int) -> list[Point]:
        steps = (-distance, 0, distance)
        idle = centre[2]
        idles = {idle, self._governor}
        if idle == self._governor:
            idles |= {0, self._top[2]}
        else:
            idles |= {self._clipped(2, idle + step) for step in steps}
        found = [
            (self._clipped(0, centre[0] + a), self._clipped(1, centre[1] + b), c)
            for a, b, c in product(steps, steps, sorted(idles))
            if distance == 1 or c != self._governor or c == idle or a == b == 0
        ]
        return found if distance == 1 else [p for p in found if not self._is_hopeless(p)]

    def _clipped(self, axis: int, place: int) -> int:
        return min(max(place, 0), self._top[axis])

    def _is_hopeless(self, point: Point) -> bool:
        """No clock is higher than in a plan that breaks a bound."""
        return any(
            math.isinf(score) and self._is_below(point, other)
            for other, score in self._seen.items()
        )

    def _is_below(self, point: Point, other: Point) -> bool:
        if self._governor in (point[2], other[2]) and point[2] != other[2]:
            return False
        return all(a <= b for a, b in zip(point, other, strict=True))

    def _slide(self, centre: Point, distance: int) -> None:
        """Along the border of the bounds: a step of one clock for as many of another as it buys."""
        self._ask(self._idle_scan(centre))
        axes = range(2 if centre[2] == self._governor else 3)
        lines = [
            _Line(place, axis, 0, self._top[axis])
            for moved, axis in permutations(axes, 2)
            for step in (-distance, distance)
            if (place := _at(centre, moved, self._clipped(moved, centre[moved] + step))) != centre
        ]
        while lines:
            self._ask([line.middle for line in lines if self._guess(line.middle) is None])
            for line in lines:
                line.narrow(is_broken=bool(self._guess(line.middle)))
            self._ask([line.lowest for line in lines if line.is_narrow(distance)])
            lines = [line for line in lines if not line.is_narrow(distance)]

    def _guess(self, point: Point) -> bool | None:
        """Whether it breaks a bound, if that is known or follows from plans lower or higher."""
        if point in self._seen:
            return self._is_broken(point)
        if self._is_hopeless(point):
            return True
        known = (o for o in self._seen if not self._is_broken(o))
        return False if any(self._is_below(other, point) for other in known) else None

    def _idle_scan(self, centre: Point) -> list[Point]:
        """Lower idle clocks, evenly: they cost less, and a p99 may allow them by chance."""
        stride = max(1, self._governor // IDLE_SCAN)
        return [(*centre[:2], idle) for idle in range(0, centre[2], stride)]

"""What an option takes, looked up when it is listed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import get_args


class Names:
    """Choices that help and completions list; whether another value will do is found out later.

    They are looked up when they are listed, so that no other command waits for the imports.
    """

    def __init__(self, look_up: Callable[[], Iterable[str]]) -> None:
        self._look_up = look_up

    def __iter__(self) -> Iterator[str]:
        return iter(self._look_up())

    def __contains__(self, value: object) -> bool:
        return True


def scenario_values(field: str) -> Iterable[str]:
    """What a scenario takes as the value of this field."""
    from agft_ray.study.scenario import Scenario

    annotation = Scenario.model_fields[field].annotation
    named = [each for each in get_args(annotation) if get_args(each)]  # of `Literal[...] | None`
    return get_args(named[0] if named else annotation)

"""Policies as they are named on the command line: `fixed:1230`, `agft:alpha=2,seed=3`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import yaml

from agft_ray.config import StrictModel, parse
from agft_ray.errors import ConfigError
from agft_ray.policy.registry import PolicyConfig

DEFAULT = "default"
FRONTIER, BEST_STATIC = "frontier", "best_static"
ORACLE_PAIR, LOWER_BOUND = "oracle_pair", "lower_bound"
SEARCHES = {
    FRONTIER: "every fixed clock on the grid of --clock-step-mhz",
    BEST_STATIC: "the fixed clock with the lowest EDP, in hindsight",
    ORACLE_PAIR: "the best constant pair of clocks within the latency bounds, in hindsight",
    LOWER_BOUND: "energy of every step at its best clock, queues ignored",
}


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy by its name on the command line; `settings` is None for what is searched for."""

    label: str
    settings: StrictModel | None

    @property
    def is_step_governor(self) -> bool:
        """It chooses before every step, not once a window."""
        return type(self.settings) in step_governors().values()


def fixed(sm_clock_mhz: int) -> PolicySpec:
    """One clock always."""
    return parse_policy(f"fixed:{sm_clock_mhz}")


def parse_policy(text: str) -> PolicySpec:
    """A policy's name, after a colon its settings, comma-separated as `key=value`.

    `fixed:1230` and `pair:1500/1230` are short for their clocks. Raises `ConfigError` listing what
    there is for an unknown name, and naming each setting that is wrong.
    """
    name, colon, rest = text.partition(":")
    if name in SEARCHES:
        if colon:
            raise ConfigError(f"--policy {text}", [f"{name}: takes no settings, leave them out"])
        return PolicySpec(text, None)
    known = window_policies() | step_governors()
    if name not in known:
        raise ConfigError(f"--policy {text}", [_unknown(name, [*known, *SEARCHES])])
    values = _settings(name, rest, text) if colon else {}
    model = known[name]
    return PolicySpec(text, parse(model, {"name": name} | values, source=f"--policy {text}"))


def window_policies() -> dict[str, type[StrictModel]]:
    """Settings classes of the policies that choose once a window, by name."""
    return _named(PolicyConfig)


def step_governors() -> dict[str, type[StrictModel]]:
    """Settings classes of the governors that choose before every step, by name."""
    return {}


def _named(union: Any) -> dict[str, type[StrictModel]]:
    members = get_args(get_args(union)[0])
    return {model.model_fields["name"].default: model for model in members}


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"there is no policy {name!r}{hint} Choose one of: {', '.join(known)}"


def _settings(name: str, text: str, source: str) -> dict[str, Any]:
    if name == "fixed" and text.isdecimal():
        return {"sm_clock_mhz": int(text)}
    return parse_settings(text, source=f"--policy {source}")


def parse_settings(text: str, *, source: str) -> Mapping[str, Any]:
    """`key=value,key=value`, each value as YAML reads it; else raises `ConfigError`."""
    settings: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not (key.strip() and equals):
            raise ConfigError(source, [f"{part!r}: must be KEY=VALUE, as in alpha=2"])
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(source, [f"{key}: {value!r} is not a value"]) from None
    return settings


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0..9`, `0,3,5`, or both: `0..3,7`. Raises `ConfigError` for anything else or repeats."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if not first.isdecimal() or (dots and not last.isdecimal()):
            raise ConfigError(
                "--seed", [f"{part!r}: must be a whole number from 0, or a range like 0..9"]
            )
        seeds.extend(range(int(first), int(last if dots else first) + 1))
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError("--seed", [f"{text!r}: names no seed, or one of them twice"])
    return tuple(seeds)

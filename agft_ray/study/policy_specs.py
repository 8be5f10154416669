"""Policies as they are named on the command line: `fixed:1230`, `agft:alpha=2,seed=3`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

import yaml

from agft_ray.config import StrictModel, parse
from agft_ray.errors import ConfigError
from agft_ray.policy.baselines.fixed import FixedConfig
from agft_ray.policy.baselines.pair import PairConfig
from agft_ray.policy.imported import ImportedConfig, entry_points
from agft_ray.policy.registry import BuiltinConfig, GovernorConfig
from agft_ray.results.labels import BEST_STATIC, BEST_STEPS, FRONTIER, ORACLE_PAIR
from agft_ray.settings import SloConfig

GOVERNOR_CONFIGS = (GovernorConfig,)
"""Settings classes of what chooses before every step."""
SEARCHES = {
    FRONTIER: "every fixed clock on the grid of --clock-step-mhz",
    BEST_STATIC: "the fixed clock with the lowest EDP, in hindsight",
    ORACLE_PAIR: "the best clocks of prefill, decode and idle within the bounds, in hindsight",
    BEST_STEPS: "the steps of default clocks, each at its best clock; queues ignored",
}

SHORT_FORMS = {
    "fixed": "fixed:1230",
    "pair": "pair:1500/1230 (prefill/decode) or pair:1500/1230/210",
}


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy by its name on the command line; `settings` is None for what is searched for."""

    label: str
    settings: StrictModel | None


def is_governor(settings: StrictModel) -> TypeGuard[GovernorConfig]:
    """Whether these are a step governor's, which chooses before every step."""
    return isinstance(settings, GOVERNOR_CONFIGS)


def fixed(sm_clock_mhz: int) -> PolicySpec:
    """One clock always."""
    return PolicySpec(f"fixed:{sm_clock_mhz}", FixedConfig(sm_clock_mhz=sm_clock_mhz))


def pair(
    prefill_mhz: int, decode_mhz: int, idle: int | Literal["lowest", "default"] = "lowest"
) -> PolicySpec:
    """Constant clocks for prefill and decode, and one while empty."""
    settings = PairConfig(
        prefill_sm_clock_mhz=prefill_mhz, decode_sm_clock_mhz=decode_mhz, idle_sm_clock_mhz=idle
    )
    ending = "" if idle == "lowest" else f"/{idle}"
    return PolicySpec(f"pair:{prefill_mhz}/{decode_mhz}{ending}", settings)


def parse_policy(text: str, slo: SloConfig | None = None) -> PolicySpec:
    """A policy's name, after a colon its settings, comma-separated as `key=value`.

    `fixed:1230`, `pair:1500/1230` and `pair:1500/1230/210` are short for their clocks. A policy
    with latency bounds among its settings takes those of `slo` that are not given.
    `my_pkg.mod:MyPolicy:key=value` is a policy from outside. Raises `ConfigError` listing what
    there is for an unknown name, and naming each setting that is wrong.
    """
    name, colon, rest = text.partition(":")
    if name in SEARCHES:
        if colon:
            raise ConfigError(f"--policy {text}", [f"{name}: takes no settings, leave them out"])
        return PolicySpec(text, None)
    known = policies()
    if name not in known and (rest.partition(":")[0].isidentifier() or name in entry_points()):
        return _imported(text)
    if name not in known:
        raise ConfigError(f"--policy {text}", [_unknown(name, [*known, *SEARCHES])])
    model = known[name]
    given = _settings(name, rest, text) if colon else {}
    values = {"name": name} | _bounds(model, slo) | given
    try:
        return PolicySpec(text, parse(model, values, source=f"--policy {text}"))
    except ConfigError as error:
        raise ConfigError(error.source, [_with_way_out(p) for p in error.problems]) from None


def _imported(text: str) -> PolicySpec:
    """`my_pkg.mod:MyPolicy` or an entry point's name, after another colon its settings."""
    source = f"--policy {text}"
    where, _, rest = text.partition(":")
    values: dict[str, Any] = {"name": where}
    if where not in entry_points():
        name, _, rest = rest.partition(":")
        values = {"class": f"{where}:{name}"}
    given = parse_settings(rest, source=source) if rest else {}
    values |= {"settings": given} if "class" in values else given
    return PolicySpec(text, parse(ImportedConfig, values, source=source))


def policies() -> dict[str, type[StrictModel]]:
    """Settings classes of all policies and step governors, by name."""
    configs = (*get_args(get_args(BuiltinConfig)[0]), *GOVERNOR_CONFIGS)
    return {model.model_fields["name"].default: model for model in configs}


def _bounds(model: type[StrictModel], slo: SloConfig | None) -> dict[str, float]:
    """The settings `ttft_slo_s` and `tpot_slo_s`, where the policy has them, by the SLO."""
    bounds = {} if slo is None else {"ttft_slo_s": slo.ttft_s, "tpot_slo_s": slo.tpot_s}
    return {k: v for k, v in bounds.items() if v is not None and k in model.model_fields}


def _with_way_out(problem: str) -> str:
    """A bound that is missing can be given with the SLO."""
    for name in ("tpot", "ttft"):
        if problem.startswith(f"{name}_slo_s: required"):
            return f"{problem}; give --slo-{name} S"
    return problem


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"there is no policy {name!r}{hint} Choose one of: {', '.join(known)}"


def _settings(name: str, text: str, source: str) -> dict[str, Any]:
    if name == "fixed" and text.isdecimal():
        return {"sm_clock_mhz": int(text)}
    if name == "pair" and (clocks := _pair_clocks(text)):
        return clocks
    if name in SHORT_FORMS and "=" not in text:
        problem = f"{text!r}: must be in whole MHz, as in {SHORT_FORMS[name]}"
        raise ConfigError(f"--policy {source}", [problem])
    return parse_settings(text, source=f"--policy {source}")


def _pair_clocks(text: str) -> dict[str, Any]:
    """`1500/1230`, `1500/1230/210` or `1500/1230/default` as settings; nothing for other text."""
    names = ("prefill_sm_clock_mhz", "decode_sm_clock_mhz", "idle_sm_clock_mhz")
    parts = text.split("/")
    numbers = parts[:2] if parts[2:] == ["default"] else parts
    if len(parts) not in (2, 3) or not all(part.isdecimal() for part in numbers):
        return {}
    word = {} if numbers == parts else {"idle_sm_clock_mhz": "default"}
    return dict(zip(names, map(int, numbers), strict=False)) | word


def parse_settings(text: str, *, source: str) -> dict[str, Any]:
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

"""A card and a model that the base profile is not of: what its owner states, and what follows.

Nothing of the base card's identity is taken over silently: it is stated, derived from what is
stated, or kept because somebody said so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agft_ray.calibration.card_model import ModelFacts, with_model
from agft_ray.config import Count, NonNegative, Positive, Share, StrictModel, load_yaml, parse
from agft_ray.errors import ConfigError
from agft_ray.simulation.engine_config import PROFILE_BLOCK_TOKENS
from agft_ray.simulation.profiles import GpuProfile, ModelProfile, parse_gpu_profile

IDENTITY = ("product", "clocks", "cap_w", "kv_blocks", "host_ms")
"""What is the base card's own, or its machine's: stated, derived or kept, never inherited."""

ACTIVATIONS_GIB = 1.5
"""Of one GPU, beside weights and KV cache: what vLLM takes with an 8B model."""
GROUP_ACTIVATIONS_GIB = 2.5
"""Of one GPU of several, with the buffers in which they talk."""

_GIB = 2**30
_WAYS = {
    "product": "the card's name, as `nvidia-smi -L` gives it",
    "clocks": "min_sm_clock_mhz, max_sm_clock_mhz and sm_clock_step_mhz, as `nvidia-smi -q -d "
    "SUPPORTED_CLOCKS` lists them",
    "cap_w": "the power limit of one GPU, in W",
    "kv_blocks": "memory_mib of one GPU, or kv_cache_tokens as vLLM prints them when it starts",
    "host_ms": "the host's time per step, or a load test, which measures it",
}


class Card(StrictModel):
    """A file of facts about one's own card; what is absent must be kept by name."""

    product: str | None = None
    """The name NVML gives."""
    memory_mib: Count | None = None
    """Of one GPU, as nvidia-smi gives it."""
    memory_share: Share = 0.9
    """vLLM's gpu_memory_utilization."""
    kv_cache_tokens: Count | None = None
    """Of the group, as vLLM prints when it starts; better than what follows from memory."""
    cap_w: Positive | None = None
    """Power limit of one GPU."""
    min_sm_clock_mhz: Count | None = None
    max_sm_clock_mhz: Count | None = None
    sm_clock_step_mhz: Count | None = None
    idle_sm_clock_mhz: Count | None = None
    """At default clocks, while loaded and empty."""
    host_ms: NonNegative | None = None
    """Scheduling and launching per step."""
    model: ModelFacts | None = None
    """Of a model that the base does not have."""


@dataclass(frozen=True, slots=True)
class OwnBase:
    """The base with what is known of one's own card, and where its numbers come from."""

    profile: GpuProfile
    notes: dict[str, str]
    """Dotted path -> comment for the file."""


def load_card(path: Path) -> Card:
    """The facts of a file; raises `ConfigError` with every problem found."""
    return parse(Card, load_yaml(path), source=str(path))


def own_base(
    base: GpuProfile, model: str, card: Card, keep: Sequence[str], *, measures_host: bool
) -> OwnBase:
    """The base made one's own, with one model, before anything is fitted.

    Args:
        keep: names in `IDENTITY` that may stay the base card's; `all` is every one.
        measures_host: the measurements determine the host's time.

    Raises `ConfigError` naming all that is neither stated nor kept, or crosses other facts.
    """
    stated = {name for name, is_stated in _stated(card).items() if is_stated}
    kept = set(IDENTITY) - stated if "all" in keep else set(keep)
    profile, notes = with_model(base, model, card.model)
    problems = list(_missing(card, kept, base, profile.models[model], measures_host=measures_host))
    problems += _half_stated(card)
    if "kv_blocks" in kept and model not in base.models:
        problems.append(
            f"--keep kv_blocks: {base.name} has none for {model}; state in a --card file "
            f"{_WAYS['kv_blocks']}"
        )
    if problems:
        raise ConfigError("calibrate", problems)
    values = profile.model_dump()
    for name, paths in _kept_paths(model).items():
        for path in paths if name in kept else ():
            notes[path] = f"kept from {base.name} (--keep), not measured"
    _state_card(values, notes, card)
    if card.max_sm_clock_mhz is not None:
        _scale_clocks(values, notes, card, base)
    _state_model(values, notes, model, card, base)
    changed = {path for path in notes if not notes[path].startswith("kept")}
    values["ranges"] = {
        path: interval
        for path, interval in base.ranges.items()
        if path not in changed and _is_of(path, model, base)
    }
    return OwnBase(parse_gpu_profile(values, f"{base.name} as --card has it"), notes)


def _is_of(path: str, model: str, base: GpuProfile) -> bool:
    return not path.startswith("models.") or (
        model in base.models and path.startswith(f"models.{model}.")
    )


def _stated(card: Card) -> dict[str, bool]:
    clocks = (card.min_sm_clock_mhz, card.max_sm_clock_mhz, card.sm_clock_step_mhz)
    return {
        "product": card.product is not None,
        "clocks": None not in clocks,
        "cap_w": card.cap_w is not None,
        "kv_blocks": card.memory_mib is not None or card.kv_cache_tokens is not None,
        "host_ms": card.host_ms is not None,
    }


def _missing(
    card: Card, kept: set[str], base: GpuProfile, model: ModelProfile, *, measures_host: bool
) -> Iterator[str]:
    inherited = {
        "product": base.product,
        "clocks": f"{base.min_sm_clock_mhz}..{base.max_sm_clock_mhz} MHz",
        "cap_w": f"{base.power.cap_w:g}",
        "kv_blocks": f"{model.kv_blocks}, of its memory",
        "host_ms": f"{model.host_ms:g}, of its machine",
    }
    for name, is_stated in _stated(card).items():
        if is_stated and name in kept:
            yield f"--keep {name}: the --card file states it; leave out one of them"
        elif not is_stated and name not in kept and not (name == "host_ms" and measures_host):
            yield (
                f"{name}: would be {base.name}'s ({inherited[name]}), and is not measured; state "
                f"in a --card file {_WAYS[name]}; or accept it with --keep {name}"
            )


def _half_stated(card: Card) -> Iterator[str]:
    clocks = {
        "min_sm_clock_mhz": card.min_sm_clock_mhz,
        "max_sm_clock_mhz": card.max_sm_clock_mhz,
        "sm_clock_step_mhz": card.sm_clock_step_mhz,
    }
    absent = [name for name, value in clocks.items() if value is None]
    if 0 < len(absent) < 3:
        yield f"{', '.join(absent)}: missing in the --card file; the three clocks go together"
    if card.idle_sm_clock_mhz is not None and len(absent) == 3:
        yield "idle_sm_clock_mhz: needs min_, max_sm_clock_mhz and sm_clock_step_mhz beside it"
    if card.kv_cache_tokens is not None and card.memory_mib is not None:
        yield "memory_mib and kv_cache_tokens: give one of them; the tokens are measured"


def _kept_paths(model: str) -> dict[str, tuple[str, ...]]:
    return {
        "product": ("product",),
        "clocks": ("min_sm_clock_mhz", "max_sm_clock_mhz", "sm_clock_step_mhz"),
        "cap_w": ("power.cap_w",),
        "kv_blocks": (f"models.{model}.kv_blocks",),
        "host_ms": (f"models.{model}.host_ms",),
    }


def _state_card(values: dict[str, Any], notes: dict[str, str], card: Card) -> None:
    for name in ("product", "min_sm_clock_mhz", "max_sm_clock_mhz", "sm_clock_step_mhz"):
        if (stated := getattr(card, name)) is not None:
            values[name] = stated
            notes[name] = "stated (--card)"
    if card.cap_w is not None:
        values["power"]["cap_w"] = card.cap_w
        notes["power.cap_w"] = "stated (--card)"


def _scale_clocks(
    values: dict[str, Any], notes: dict[str, str], card: Card, base: GpuProfile
) -> None:
    """Clocks at which the base's formulas hold, at the same share of the card's highest."""
    low, high = values["min_sm_clock_mhz"], values["max_sm_clock_mhz"]
    step = values["sm_clock_step_mhz"]
    note = f"{base.name}'s share of the highest clock, not measured"

    def scaled(clock: int) -> int:
        near = low + round((clock * high / base.max_sm_clock_mhz - low) / step) * step
        return int(min(max(near, low), high))

    idle = card.idle_sm_clock_mhz
    values["governor"]["idle_sm_clock_mhz"] = idle or scaled(base.governor.idle_sm_clock_mhz)
    notes["governor.idle_sm_clock_mhz"] = "stated (--card)" if idle else note
    for name in ("knee_sm_clock_mhz", "reference_sm_clock_mhz"):
        values["power"][name] = scaled(values["power"][name])
        notes[f"power.{name}"] = note
    for model, of_model in values["models"].items():
        of_model["reference_sm_clock_mhz"] = scaled(of_model["reference_sm_clock_mhz"])
        notes[f"models.{model}.reference_sm_clock_mhz"] = note


def _state_model(
    values: dict[str, Any], notes: dict[str, str], model: str, card: Card, base: GpuProfile
) -> None:
    of_model = values["models"][model]
    path = f"models.{model}"
    if card.host_ms is not None:
        of_model["host_ms"] = card.host_ms
        notes[f"{path}.host_ms"] = "stated (--card)"
    if card.kv_cache_tokens is not None:
        of_model["kv_blocks"] = max(card.kv_cache_tokens // PROFILE_BLOCK_TOKENS, 1)
        notes[f"{path}.kv_blocks"] = "stated (--card): kv_cache_tokens / 16"
    elif card.memory_mib is not None:
        of_model["kv_blocks"] = kv_blocks(
            card.memory_mib,
            share=card.memory_share,
            tensor_parallel=of_model["tensor_parallel"],
            weights_bytes=of_model["weights_bytes"],
            kv_bytes_per_token=of_model["kv_bytes_per_token"],
        )
        notes[f"{path}.kv_blocks"] = (
            f"derived: {card.memory_share:g} x {card.memory_mib} MiB less weights and activations"
        )


def kv_blocks(
    memory_mib: int,
    *,
    share: float = 0.9,
    tensor_parallel: int,
    weights_bytes: int,
    kv_bytes_per_token: int,
) -> int:
    """KV blocks of 16 tokens that fit beside the weights, on all GPUs of the group.

    Of each GPU `share x memory - weights - activations`. Raises `ConfigError` if none fits.
    """
    activations_gib = ACTIVATIONS_GIB if tensor_parallel == 1 else GROUP_ACTIVATIONS_GIB
    taken = weights_bytes / tensor_parallel + activations_gib * _GIB
    free = (share * memory_mib * 2**20 - taken) * tensor_parallel
    blocks = int(free // (kv_bytes_per_token * PROFILE_BLOCK_TOKENS))
    if blocks < 1:
        raise ConfigError(
            "calibrate",
            [
                f"memory_mib: {memory_mib} on each of {tensor_parallel} GPUs leaves no room for KV "
                f"cache: weights and activations take {taken / 2**20:.0f} MiB of each, of "
                f"{share * memory_mib:.0f}; state more memory, or a tensor_parallel of more GPUs"
            ],
        )
    return blocks

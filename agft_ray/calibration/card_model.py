"""A model that a base profile does not have, from its facts and the base's nearest model."""

from __future__ import annotations

from typing import Any

from agft_ray.config import Count, StrictModel
from agft_ray.errors import ConfigError
from agft_ray.simulation.profiles import GpuProfile, ModelProfile, parse_gpu_profile


class ModelFacts(StrictModel):
    """What a model's configuration says."""

    tensor_parallel: Count = 1
    layers: Count
    weights_bytes: Count
    """Of all GPUs together: parameters times bytes of each."""
    kv_bytes_per_token: Count
    """2 x layers x KV heads x head dimension x bytes."""


def with_model(
    base: GpuProfile, model: str, facts: ModelFacts | None
) -> tuple[GpuProfile, dict[str, str]]:
    """The base with this one model, and a comment for each number that is not the base's.

    A model that the base lacks begins at the times of its nearest one: reading weights and
    computing go with the weights on each GPU, attention with the KV bytes of a layer; of the same
    model on more or fewer GPUs, prefill attention and what all-reduces send do, too.

    Raises `ConfigError` for a model of which nothing is known, or whose facts are not the base's.
    """
    if facts is None:
        if model not in base.models:
            known = ", ".join(sorted(base.models))
            raise ConfigError(
                "calibrate",
                [
                    f"--model: {model!r} is none of {base.name}'s ({known}); state its layers, "
                    "weights_bytes, kv_bytes_per_token and tensor_parallel under `model` in a "
                    "--card file"
                ],
            )
        return base.model_copy(update={"models": {model: base.models[model]}}), {}
    if model in base.models:
        _check_same(base, model, facts)
        return base.model_copy(update={"models": {model: base.models[model]}}), {}
    like = _nearest(base, facts)
    values = _scaled(base.models[like], facts)
    path = f"models.{model}"
    scaled = f"scaled from {like} of {base.name}, not measured"
    notes = {f"{path}.{name}": scaled for name in _SCALED if values[name]}
    notes |= {
        f"{path}.attention.{name}": scaled
        for name, value in values["attention"].items()
        if value != getattr(base.models[like].attention, name)
    }
    notes |= {f"{path}.{name}": "stated (--card)" for name in ModelFacts.model_fields}
    ranges = {key: ends for key, ends in base.ranges.items() if not key.startswith("models.")}
    profile = base.model_dump() | {"models": {model: values}, "ranges": ranges}
    return parse_gpu_profile(profile, f"{base.name} with {model}"), notes


_SCALED = ("weights_ms", "token_ms", "head_ms", "all_reduce_ms", "all_reduce_token_ms")


def _check_same(base: GpuProfile, model: str, facts: ModelFacts) -> None:
    known = base.models[model]
    problems = [
        f"model.{name}: {stated} is not {base.name}'s {getattr(known, name)} for {model}; leave "
        "`model` out, or give --model a name of its own"
        for name, stated in facts.model_dump().items()
        if stated != getattr(known, name)
    ]
    if problems:
        raise ConfigError("calibrate", problems)


def _share_bytes(model: ModelProfile | ModelFacts) -> float:
    return model.weights_bytes / model.tensor_parallel


def _nearest(base: GpuProfile, facts: ModelFacts) -> str:
    """Of as many GPUs if there is one, then of the nearest size on each."""

    def distance(name: str) -> tuple[bool, float]:
        model = base.models[name]
        ratio = _share_bytes(model) / _share_bytes(facts)
        return (model.tensor_parallel > 1) != (facts.tensor_parallel > 1), max(ratio, 1 / ratio)

    return min(base.models, key=distance)


def _scaled(like: ModelProfile, facts: ModelFacts) -> dict[str, Any]:
    values = like.model_dump() | facts.model_dump()
    weights = _share_bytes(facts) / _share_bytes(like)
    for name in _SCALED[:3]:
        values[name] = _rounded(values[name] * weights)
    mine, others = (
        model.kv_bytes_per_token / model.layers / model.tensor_parallel for model in (facts, like)
    )
    same = (facts.layers, facts.kv_bytes_per_token) == (like.layers, like.kv_bytes_per_token)
    # The KV bytes say how many KV heads a GPU has; how many others only where it is one model.
    sharded = ("context_us", "prefill_pair_us", "prefill_token_us") if same else ("context_us",)
    values["attention"] = {
        name: _rounded(value * mine / others) if name.endswith(sharded) else value
        for name, value in values["attention"].items()
    }
    if facts.tensor_parallel == 1:
        return values | {"all_reduce_ms": 0.0, "all_reduce_token_ms": 0.0, "spinning_activity": 0.0}
    layers = facts.layers / like.layers
    values["all_reduce_ms"] = _rounded(values["all_reduce_ms"] * layers)
    sent = _sent(facts.tensor_parallel) / (_sent(like.tensor_parallel) or 1.0)
    values["all_reduce_token_ms"] = _rounded(values["all_reduce_token_ms"] * layers * sent)
    return values


def _sent(tensor_parallel: int) -> float:
    """What each GPU sends in an all-reduce, in activations of a token."""
    return 2.0 * (tensor_parallel - 1) / tensor_parallel


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")

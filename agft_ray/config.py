"""Settings: pydantic models at the edge, YAML loading, every problem reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agft_ray.errors import ConfigError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

ModelT = TypeVar("ModelT", bound="StrictModel")


class StrictModel(BaseModel):
    """Base of every settings model: unknown keys, NaN, infinity and coercions are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def parse(model: type[ModelT], data: object, *, source: str) -> ModelT:
    """Validate `data` into `model`; raises `ConfigError` with every problem found."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(source, problems_of(error, model)) from None


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line a problem, as 'field: rule, got value'."""
    return [_problem(item, model) for item in error.errors(include_url=False)]


def _problem(item: Mapping[str, Any], model: type[BaseModel]) -> str:
    field = _place(item["loc"], model) or "settings"
    if item["type"] == "extra_forbidden":
        return f"{field}: unknown setting{_did_you_mean(item['loc'], model)}"
    if item["type"] == "missing":
        return f"{field}: required, and missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{field}: {message}"
    return f"{field}: {message[:1].lower()}{message[1:]}, got {item['input']!r}"


def _place(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The field as the user has written it: without the names of a union's members."""
    known = {*_field_names(model)}
    parts = [part for part in loc[:-1] if isinstance(part, int) or part in known]
    return ".".join(str(part) for part in [*parts, *loc[-1:]])


def _did_you_mean(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    others = [name for name in _field_names(model) if name != loc[-1]]
    close = difflib.get_close_matches(str(loc[-1]), others, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _field_names(model: type[BaseModel]) -> list[str]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(name)
        names.extend(_nested_field_names(field.annotation))
    return names


def _nested_field_names(annotation: object) -> Iterable[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _field_names(annotation)
    arguments = getattr(annotation, "__args__", ())
    return [name for argument in arguments for name in _nested_field_names(argument)]


def load_yaml(path: str | Path) -> Any:
    """The content of a YAML file; raises `ConfigError` if it cannot be read or parsed."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), ["is not UTF-8 text"]) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            str(path), [f"is not valid YAML: {' '.join(str(error).split())}"]
        ) from None

"""A person's own policy, from outside this package: by import path, or by entry point."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agft_ray.config import StrictModel, problems_of
from agft_ray.policy.base import Policy

GROUP = "agft_ray.policies"
"""Entry points of this group are policies: their name is the policy's, their object its class."""


class ImportedConfig(StrictModel):
    """`{class: "my_pkg.mod:MyPolicy", settings: {...}}`, or `{name: entry_point, ...}`.

    A class with a pydantic model `Settings` is given one, made of `settings`; any other class is
    given them as keyword arguments. It is imported, and built once, when the settings are read.
    """

    model_config = ConfigDict(populate_by_name=True)

    class_path: str = Field(alias="class", pattern=r"^[\w.]+:\w+$")
    """Where the class is: 'package.module:Class'."""
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """Under which experience is shared: the import path."""
        return self.class_path

    @model_validator(mode="before")
    @classmethod
    def _by_entry_point(cls, values: Any) -> Any:
        """`name` and what else there is, as class and settings."""
        if not isinstance(values, dict) or "name" not in values:
            return values
        rest = {key: value for key, value in values.items() if key != "name"}
        return {"class": entry_points()[values["name"]], "settings": rest}

    @model_validator(mode="after")
    def _builds(self) -> ImportedConfig:
        self.build()
        return self

    def build(self) -> Policy:
        """A fresh policy; raises `ValueError` saying what is wrong with the class or settings."""
        found = self._class()
        model = getattr(found, "Settings", None)
        try:
            if isinstance(model, type) and issubclass(model, BaseModel):
                return cast(Policy, found(model.model_validate(self.settings)))
            return cast(Policy, found(**self.settings))
        except ValidationError as error:
            problems = "; ".join(problems_of(error, cast(type[BaseModel], model)))
            raise ValueError(f"settings of {self.class_path}: {problems}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings of {self.class_path}: {error}") from None

    def _class(self) -> Any:
        module, _, name = self.class_path.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"class {self.class_path!r} cannot be imported: {error}; install its package on "
                "every node, or put it on PYTHONPATH"
            ) from None
        if not (isinstance(found, type) and Policy in found.__mro__):
            raise ValueError(f"class {self.class_path!r} must be derived of agft_ray.Policy")
        if missing := sorted(getattr(found, "__abstractmethods__", ())):
            raise ValueError(f"class {self.class_path!r} lacks {' and '.join(missing)}")
        return found


@functools.cache
def entry_points() -> dict[str, str]:
    """Import paths of the policies that installed packages offer, by name."""
    return {each.name: each.value for each in importlib.metadata.entry_points(group=GROUP)}


def is_imported(values: object) -> bool:
    """Whether settings are of a policy from outside."""
    if isinstance(values, ImportedConfig):
        return True
    if not isinstance(values, dict):
        return False
    return bool({"class", "class_path"} & values.keys()) or values.get("name") in entry_points()

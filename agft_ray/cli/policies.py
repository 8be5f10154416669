"""The command `agft-ray policies`: which there are, and what may be set of each."""

from __future__ import annotations

import argparse
import difflib
import inspect
import sys
from typing import TYPE_CHECKING, Any

from agft_ray.config import StrictModel
from agft_ray.errors import ConfigError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(commands: Commands) -> None:
    """Add it to the parser; a command returns its exit status."""
    policies = commands.add_parser(
        "policies",
        help="list the policies, or the settings of one",
        description="Policies run on live replicas and in `simulate`; step governors and what is "
        "searched for in hindsight in `simulate` only.",
    )
    policies.add_argument("name", nargs="?", help="show its settings")
    policies.set_defaults(command=_policies)


def _policies(arguments: argparse.Namespace) -> int:
    from agft_ray.policy.imported import entry_points
    from agft_ray.settings import TunerConfig
    from agft_ray.study.policy_specs import SEARCHES, is_governor, policies

    known, default = policies(), TunerConfig().policy.name
    if arguments.name is not None:
        if arguments.name not in known:
            raise ConfigError("policies", [_unknown(arguments.name, known)])
        return _show(known[arguments.name])
    for name, model in known.items():
        kind = "step governor: " if is_governor(model.model_construct()) else ""
        kind = "the default: " if name == default else kind
        print(f"{name:<16} {kind}{_summary(model)}")
    for name, path in entry_points().items():
        print(f"{name:<16} of another package: {path}")
    for name, what in SEARCHES.items():
        print(f"{name:<16} search: {what}")
    print("MODULE:CLASS     a policy of your own, see docs/policies.md")
    return 0


def _show(model: type[StrictModel]) -> int:
    print(model.__doc__ and inspect.cleandoc(model.__doc__))
    for name, field in model.model_fields.items():
        if name == "name":
            continue
        default = "required" if field.is_required() else f"default {_default(field)}"
        print(f"\n{name}  ({default})")
        if field.description:
            print(f"    {' '.join(field.description.split())}")
    return 0


def _default(field: Any) -> str:
    return str(field.get_default(call_default_factory=True))


def _summary(model: type[StrictModel]) -> str:
    """What the policy does, in a line: of its module, or of the room that it has for itself."""
    name = model.model_fields["name"].default
    module = sys.modules[model.__module__]
    room = sys.modules[module.__name__.rpartition(".")[0]]
    lines = [(inspect.getdoc(each) or "").partition("\n")[0] for each in (module, room)]
    line = next((line for line in lines if f"`{name}`: " in line), lines[0])
    line = line.partition(f"`{name}`: ")[2] or line
    return line[:1].upper() + line[1:]


def _unknown(name: str, known: dict[str, type[StrictModel]]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{name!r}: {hint}there are: {', '.join(known)}"

"""Pages of the site that are made from the code: settings, metrics, API; and those from elsewhere
in the repository.
"""

import enum
import inspect
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import agft_ray
from agft_ray.actors import tuner_metrics
from agft_ray.gpu.config import NvmlGpuConfig, SimulatedGpuConfig, ZeusdGpuConfig
from agft_ray.serve.llm.config import LlmAppConfig, LlmDpAppConfig, LlmPdAppConfig
from agft_ray.serve.simulated.config import AppConfig
from agft_ray.settings import SloConfig, TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.study.policy_specs import policies

WORDS: dict[Any, str] = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    list: "list",
    tuple: "list",
    dict: "mapping",
}
ROOT = Path(__file__).parents[1]
SETTINGS = {
    "Tuner (`tuner`, `user_config`)": [TunerConfig, SloConfig],
    "Simulated application (`agft_ray.serve:build_app`)": [AppConfig, EngineConfig],
    "GPUs (`gpu`)": [SimulatedGpuConfig, NvmlGpuConfig, ZeusdGpuConfig],
    "Applications of `ray.serve.llm`": [LlmAppConfig, LlmDpAppConfig, LlmPdAppConfig],
    "Policies (`policy`) and step governors": [*policies().values()],
}
TAKEN_IN = {
    "deployments/guard/README.md": "guard",
    "deployments/kuberay/README.md": "kuberay",
    "CHANGELOG.md": "changes",
}
"""Pages from elsewhere in the repository."""
ELSEWHERE = {
    "build_app": "The same as `build_simulated_app`.",
    "build_openai_app": "See [vLLM](../vllm.md). It needs vLLM.",
}


def write(source: Path) -> None:
    """Write all of them into `generated/`."""
    folder = source / "generated"
    folder.mkdir(exist_ok=True)
    pages = {"settings": settings(), "metrics": metrics(), "api": api()}
    for path, name in TAKEN_IN.items():
        pages[name] = (ROOT / path).read_text()
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text)


def settings() -> str:
    """Every setting with its type, default and meaning, from the pydantic models."""
    parts = ["# Settings reference\n\nMade from the models that check the files.\n"]
    for title, models in SETTINGS.items():
        parts.append(f"## {title}\n")
        parts += [_model(model) for model in models]
    return "\n".join(parts)


def _model(model: type[BaseModel]) -> str:
    name = model.model_fields["name"].default if "name" in model.model_fields else None
    lines = [f"### {name or model.__name__}\n", f"{inspect.getdoc(model) or ''}\n"]
    for field, info in model.model_fields.items():
        if field == "name":
            continue
        default = "required" if info.is_required() else f"default `{_default(info)}`"
        line = f"**`{info.alias or field}`**: {_type(info.annotation)}, {default}{_rule(info)}"
        meaning = " ".join((info.description or "").split())
        lines.append(f"{line}\\\n{meaning}" if meaning else line)
        lines.append("")
    return "\n".join(lines)


def _default(info: FieldInfo) -> object:
    value = info.get_default(call_default_factory=True)
    if isinstance(value, enum.Enum):
        value = value.value
    return value if not hasattr(value, "model_fields") else type(value).__name__


def _type(annotation: object) -> str:
    """In words: 'number, or none', or what may be written."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(parts[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in parts)
    if origin in (Union, UnionType):
        kinds = dict.fromkeys(_type(part) for part in parts if part is not type(None))
        is_long = len(kinds) > 3 or any("several kinds" in kind for kind in kinds)
        words = "one of several kinds, see below" if is_long else " or ".join(kinds)
        return f"{words}, or none" if type(None) in parts else words
    if annotation in WORDS:
        return WORDS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a block, `{annotation.__name__}`"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " or ".join(f"`{each.value}`" for each in annotation)
    return f"{WORDS.get(origin, 'value')}"


def _rule(info: FieldInfo) -> str:
    bounds = {"gt": ">", "ge": "at least", "lt": "<", "le": "at most"}
    rules = [
        f"{words} {getattr(each, key):g}"
        for each in info.metadata
        for key, words in bounds.items()
        if getattr(each, key, None) is not None
    ]
    return f", {' and '.join(rules)}" if rules else ""


def metrics() -> str:
    """Every metric that a tuner exports, from the code."""
    lines = [
        "# Metrics reference\n",
        "Ray exports them on each node's metrics port. Labels: "
        + ", ".join(f"`{tag}`" for tag in tuner_metrics.TAGS)
        + ".\n",
        "| metric | kind | meaning |\n|---|---|---|",
    ]
    lines += [f"| `ray_{n}` | gauge | {what} |" for n, what in tuner_metrics.GAUGES.items()]
    lines += [
        f"| `ray_{n}_total` | counter | {what} |" for n, what in tuner_metrics.COUNTERS.items()
    ]
    return "\n".join(lines) + "\n"


def api() -> str:
    """The public names, from their docstrings."""
    parts = ["# Python API\n\nAll of these are imported from `agft_ray`.\n"]
    for name in agft_ray.__all__:
        if name in ELSEWHERE:
            parts.append(f"## {name}\n\n{ELSEWHERE[name]}\n")
            continue
        found = getattr(agft_ray, name)
        kind = "autoclass" if inspect.isclass(found) else "autofunction"
        shows_members = kind == "autoclass" and not hasattr(found, "model_fields")
        options = "\n   :members:" if shows_members else ""
        directive = f".. {kind}:: {found.__module__}.{found.__qualname__}{options}"
        parts.append(f"## {name}\n\n```{{eval-rst}}\n{directive}\n```\n")
    return "\n".join(parts)


def point_links_into_the_site(app: object, name: str, source: list[str]) -> None:
    """Links to files of the repository lead to their page here, or are told as names."""
    here = "" if name.startswith("generated/") else "generated/"
    text = source[0]
    for path, page in TAKEN_IN.items():
        below = re.escape(path.removeprefix("deployments/"))
        text = re.sub(rf"\]\((?:\.\./)+(?:deployments/)?{below}", f"]({here}{page}.md", text)
    if here == "":
        text = re.sub(r"\]\((?:\.\./)*docs/", "](../", text)
    to_code = r"\[([^]]*)\]\((?!http|#)[^)]*?\.(?:py|yaml|service)\)"
    source[0] = re.sub(to_code, r"\1", text)

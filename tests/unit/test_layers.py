"""Rooms import only from rooms below them, no files import in a circle, and heavy packages stay
where they belong.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import agft_ray

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "agft_ray"

# Lowest first. Rooms on one line may import each other; their files may not import in a circle.
ROOMS = [
    {"types", "errors", "clock"},
    {"config", "files"},
    {"telemetry"},
    {"workloads"},
    {"simulation"},
    {"policy", "policy.baselines", "policy.reference", "policy.agft", "policy.phases"},
    {"priors", "testing"},
    {"gpu.nvml", "gpu.zeusd", "gpu.base", "gpu.config"},
    {"gpu.safety"},
    {"gpu"},
    {"settings"},
    {"switch"},
    {"pressure", "fail_safe", "clock_timer", "clock_standing", "clock_control", "tuner"},
    {"virtual"},
    {"results"},
    {"study"},
    {"replay"},
    {"report"},
    {"calibration"},
    {"doctor"},
    {"actors"},
    {"serve", "serve.vllm", "serve.simulated", "serve.llm"},
    {"bench"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
CORE_PACKAGES = {"agft_ray", "numpy", "pydantic", "yaml"}
MAY_IMPORT_RAY = {"actors", "serve", "bench"}
MAY_IMPORT = {
    "pynvml": {"agft_ray.gpu.nvml.backend"},
    "vllm": {"agft_ray.serve.vllm.plugin", "agft_ray.bench.vllm_engine"},
}
MAY_NAME_MODULES_LATE = {"agft_ray", "agft_ray.serve", "agft_ray.serve.llm"}
"""Packages whose names are imported when first used (PEP 562)."""
MAY_COMPUTE_NAMES = MAY_NAME_MODULES_LATE | {"agft_ray.policy.imported"}
"""The last one imports what a person's settings name."""


class Import(NamedTuple):
    """One module that a file imports, and where."""

    module: str
    line: int
    is_top_level: bool


def module_of(path, package=PACKAGE):
    """`agft_ray.gpu.base` of a file; a package's `__init__` is the package."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files_of(package=PACKAGE):
    return {module_of(path, package): path for path in sorted(package.rglob("*.py"))}


def typing_only(tree):
    """Nodes that only the type checker runs."""
    return {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for branch in node.body
        for inner in ast.walk(branch)
    }


def imports(source, modules):
    """Every import of a file: statements, and text that names one of our modules."""
    tree = ast.parse(source)
    skipped, top = typing_only(tree), {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        is_top = id(node) in top
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, is_top)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield Import("." * node.level, node.lineno, is_top)
                continue
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(inner if inner in modules else node.module, node.lineno, is_top)
                if node.module == "agft_ray" and inner not in modules:
                    yield Import(f"agft_ray:{alias.name}", node.lineno, is_top)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for word in node.value.split():
                named = word.partition(":")[0].strip("'\"`,;")
                if named in modules and named != "agft_ray" and is_code(node.value):
                    yield Import(named, node.lineno, False)
        elif is_computed_import(node):
            yield Import("?", node.lineno, False)


def is_computed_import(node):
    """Whether a module is imported whose name is no literal, nor one that begins with another
    package's, as f"ray.{rest}" does."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")):
        return False
    name = node.args[0]
    if isinstance(name, ast.JoinedStr):
        name = name.values[0]
    text = name.value if isinstance(name, ast.Constant) else ""
    return not text or (name is not node.args[0] and not text.startswith("ray."))


def is_code(text):
    """Whether text is a module's name and no more, or lines like 'plugin = module:name'."""
    return len(text.split()) == 1 or " = agft_ray." in text


def room_of(module):
    """The narrowest room that a module of ours is in."""
    name = module.removeprefix("agft_ray.")
    while name not in LEVEL:
        assert "." in name, f"{module}: has no room; give it one in ROOMS"
        name = name.rpartition(".")[0]
    return name


def problems(package=PACKAGE):
    """Every import that may not be, as file:line and the reason."""
    modules = files_of(package)
    for module, path in modules.items():
        source = path.read_text()
        lines = source.splitlines()
        for each in imports(source, modules):
            if why := problem(module, each):
                where = f"{path.relative_to(package.parent)}:{each.line}"
                yield f"{where}: {why}: {lines[each.line - 1].strip()}"


def problem(module, each):
    first = each.module.partition(".")[0].partition(":")[0]
    room = "" if module == "agft_ray" else room_of(module).partition(".")[0]
    if each.module.startswith("."):
        return "absolute imports only"
    if each.module == "?":
        return "" if module in MAY_COMPUTE_NAMES else "the module's name is computed"
    if each.module.startswith("agft_ray:"):
        return "" if each.module.endswith(":__version__") else "import it from its own module"
    if first == "agft_ray":
        if "agft_ray" in (module, each.module) or each.module == module:
            return ""
        here, there = room_of(module), room_of(each.module)
        return "" if LEVEL[there] <= LEVEL[here] else f"{here} may not import {there}"
    if first == "ray":
        return "" if room in MAY_IMPORT_RAY else f"{room} may not import ray"
    if first in MAY_IMPORT:
        return "" if module in MAY_IMPORT[first] else f"only {MAY_IMPORT[first]} import {first}"
    known = first in sys.stdlib_module_names or first in CORE_PACKAGES
    heavy = each.is_top_level and not known and room not in MAY_IMPORT_RAY
    return "imported at module level, and not of the core" if heavy else ""


def circles(package=PACKAGE):
    """Files that import one another, each circle as 'a -> b -> a'."""
    modules = files_of(package)
    graph = {
        module: {i.module for i in imports(path.read_text(), modules)} & modules.keys() - {module}
        for module, path in modules.items()
        if module not in MAY_NAME_MODULES_LATE
    }
    done, found = set(), []

    def visit(module, trail):
        if module in trail:
            found.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def test_imports_point_downwards():
    found = list(problems())
    assert not found, "\n".join(found)


def test_no_files_import_in_a_circle():
    found = circles()
    assert not found, "\n".join(found)


PLANTED = [
    ("from agft_ray.tuner import Tuner", "telemetry may not import tuner"),
    ("from agft_ray import tuner", "telemetry may not import tuner"),
    ("from agft_ray import attach_tuner", "import it from its own module"),
    ("import agft_ray.gpu.safety.lease", "telemetry may not import gpu.safety"),
    ("def f():\n    import agft_ray.study.run", "telemetry may not import study"),
    ("import importlib\nimportlib.import_module('agft_ray.tuner')", "may not import tuner"),
    ("import importlib\nimportlib.import_module('agft_' + 'ray')", "name is computed"),
    ("HOME = 'agft_ray.serve.vllm.plugin:TunerStatLogger'", "may not import serve.vllm"),
    ("from . import windows", "absolute imports only"),
    ("import ray", "telemetry may not import ray"),
    ("import vllm", "import vllm"),
    ("import scipy", "not of the core"),
]


@pytest.mark.parametrize(("source", "reason"), PLANTED)
def test_a_planted_upward_import_is_found_and_its_line_printed(source, reason, tmp_path):
    package = planted(tmp_path, telemetry_planted=source)
    (found,) = problems(package)
    assert reason in found
    assert found.startswith("agft_ray/telemetry/planted.py:")
    assert found.endswith(source.splitlines()[-1].strip())


def test_a_planted_circle_is_found_inside_a_room_and_by_string(tmp_path):
    package = planted(
        tmp_path,
        telemetry_a="def f():\n    from agft_ray.telemetry import b",
        telemetry_b="HOME = 'agft_ray.telemetry.a:f'",
    )
    (found,) = circles(package)
    assert found.count("agft_ray.telemetry.a") == 2 or found.count("agft_ray.telemetry.b") == 2
    assert not list(problems(package))


def planted(tmp_path, **files):
    """A package that has every module of ours, empty, and these files besides."""
    package = tmp_path / "agft_ray"
    for path in files_of().values():
        copy = package / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    for name, source in files.items():
        room, _, stem = name.partition("_")
        (package / room / f"{stem}.py").write_text(source)
    return package


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "gpu/safety").glob("*.py")), ids=lambda p: p.stem
)
def test_safety_needs_the_standard_library_only(path):
    heavy = "('numpy', 'pydantic', 'yaml', 'rich', 'pynvml', 'ray')"
    code = f"import sys, {module_of(path)}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_loop_imports_without_ray():
    code = "import sys; sys.modules['ray'] = None; import agft_ray.tuner, agft_ray.study.study"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, agft_ray; print([m for m in ('numpy', 'pydantic') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_public_names_are_there():
    assert "Tuner" not in agft_ray.__all__
    for name in agft_ray.__all__:
        assert getattr(agft_ray, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(agft_ray, "nonsense")  # noqa: B009


NAMED_BY_USERS = [
    "agft_ray.serve:build_app",
    "agft_ray.cli:main",
    "agft_ray.gpu.restore:main",
]
NAMED_BY_USERS_OF_VLLM = [
    "agft_ray.serve.llm:TunedLLMServer",
    "agft_ray.serve:build_openai_app",
    "agft_ray.serve:build_dp_openai_app",
    "agft_ray.serve:build_pd_openai_app",
]


@pytest.mark.parametrize("names", [NAMED_BY_USERS, NAMED_BY_USERS_OF_VLLM])
def test_what_users_name_in_yaml_and_on_the_command_line_is_there(names):
    if names is NAMED_BY_USERS_OF_VLLM:
        pytest.importorskip("vllm")
    pairs = [name.split(":") for name in names]
    code = f"import importlib\nfor m, n in {pairs}: getattr(importlib.import_module(m), n)"
    subprocess.run([sys.executable, "-c", code], check=True)

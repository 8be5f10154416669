"""Each layer imports only from layers below it, and heavy packages stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "agft_ray"

# Lowest first; modules on one line may import each other.
LAYERS = [
    {"types", "errors", "clock"},
    {"config", "files"},
    {"telemetry"},
    {"workloads"},
    {"simulation"},
    {"policy"},
    {"priors"},
    {"gpu"},
    {"settings"},
    {"clock_control", "tuner"},
    {"virtual"},
    {"replay", "results"},
    {"study"},
    {"report"},
    {"calibration"},
    {"doctor"},
    {"actors"},
    {"serve"},
    {"bench"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
CORE_PACKAGES = {"numpy", "pydantic", "yaml"}
MAY_IMPORT_RAY = {"actors", "serve", "bench"}
MAY_IMPORT_NVML = {"gpu/nvml/backend.py"}
MAY_IMPORT_VLLM = {"serve/vllm/plugin.py"}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported(tree):
    """(module, is at module level) of every import that is not for the type checker only."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield node.module, id(node) in top


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    layer = layer_of(path)
    if layer in {"__init__", "__main__"}:
        return
    for module, at_top in imported(ast.parse(path.read_text())):
        first, *rest = module.split(".")
        if first == "agft_ray" and rest:
            assert LEVEL[rest[0]] <= LEVEL[layer], f"{layer} may not import {module}"
        if first == "ray":
            assert layer in MAY_IMPORT_RAY, f"{layer} may not import {module}"
        if first == "pynvml":
            assert str(path.relative_to(PACKAGE)) in MAY_IMPORT_NVML, f"{path} imports pynvml"
            continue
        if first == "vllm":
            assert str(path.relative_to(PACKAGE)) in MAY_IMPORT_VLLM, f"{path} imports vllm"
        known = first in sys.stdlib_module_names or first in CORE_PACKAGES | {"agft_ray"}
        if at_top and layer not in MAY_IMPORT_RAY:
            assert known, f"{layer} imports {module} at module level"


def test_every_module_has_a_layer():
    assert {layer_of(path) for path in FILES} - {"__init__"} <= set(LEVEL)


@pytest.mark.parametrize("module", ["agft_ray", "agft_ray.gpu.safety.guard"])
def test_light_modules_import_nothing_heavy(module):
    code = (
        f"import sys, {module}; "
        "print([m for m in ('numpy', 'pydantic', 'yaml', 'ray') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_loop_imports_without_ray():
    code = "import sys; sys.modules['ray'] = None; import agft_ray.tuner, agft_ray.study.study"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_few_and_there():
    import agft_ray

    assert len(agft_ray.__all__) <= 10
    for name in agft_ray.__all__:
        assert getattr(agft_ray, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(agft_ray, "nonsense")  # noqa: B009

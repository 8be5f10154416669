"""The wheel, with its base dependencies alone in an empty environment: no Ray, no extras."""

import json
import shutil
import subprocess
import sys

import pytest

COMMANDS = {
    "version": (["--version"], 0, "agft-ray 0."),
    "simulate": (["simulate", "--duration", "60", "--policy", "fixed:1230"], 0, "fixed:1230"),
    "validate": (["validate", "simulated.yaml"], 0, "valid. 3 replicas"),
    "config": (["config", "show", "llm_h100"], 0, "TunedLLMServer"),
    "policies": (["policies"], 0, "agft_reference"),
    "status of nothing": (["status"], 2, "needs the extra 'serve'"),
    "doctor": (["doctor"], 1, "NVML"),
}


@pytest.fixture(scope="module")
def bare(request, tmp_path_factory):
    """The folder of the commands of such an environment."""
    root, folder = request.config.rootpath, tmp_path_factory.mktemp("bare")
    source, environment = folder / "source", folder / "environment"
    shutil.copytree(root / "agft_ray", source / "agft_ray")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run([sys.executable, *wheel], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (built,) = folder.glob("*.whl")
    into = [*pip, "--python", str(environment / "bin" / "python")]
    install = [*into, "install", "--constraint", str(root / "constraints.txt"), str(built)]
    subprocess.run([sys.executable, *install], check=True)
    shutil.copy(root / "configs" / "simulated.yaml", folder)
    return environment / "bin"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_core_runs_without_extras(bare, name):
    arguments, status, words = COMMANDS[name]
    result = subprocess.run(
        [str(bare / "agft-ray"), *arguments],
        cwd=bare.parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == status, result.stderr
    assert words in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_the_wheel_holds_types_and_profiles(bare):
    code = (
        "import agft_ray, json, pathlib; from agft_ray.simulation.profiles import bundled_profiles;"
        "here = pathlib.Path(agft_ray.__file__).parent;"
        "print(json.dumps([(here / 'py.typed').exists(), list(bundled_profiles())]))"
    )
    result = subprocess.run(
        [str(bare / "python"), "-c", code], capture_output=True, text=True, check=True
    )
    is_typed, profiles = json.loads(result.stdout)
    assert is_typed
    assert "rtx_a6000" in profiles

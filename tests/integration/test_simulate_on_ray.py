"""`agft-ray simulate --ray` on a real cluster gives what this machine's cores give."""

import json
import os
import sys
from pathlib import Path

import pytest
from cluster_script import results_of

from agft_ray.cli.app import main

pytestmark = pytest.mark.ray
ARGUMENTS = [
    *("simulate", "--workload", "conversation", "--rate", "0.5", "--duration", "120"),
    *("--seed", "0,1", "--policy", "fixed:1230", "--policy", "agft"),
]


def test_the_same_seeds_give_the_same_results(tmp_path):
    on_ray = results_of(__file__, tmp_path, 300)
    assert main([*ARGUMENTS, "--jobs", "1", "--json", str(tmp_path / "here.json")]) == 0
    here = json.loads((tmp_path / "here.json").read_text())
    assert len(here["runs"]) == 6
    assert on_ray == here


if __name__ == "__main__":
    os.environ["RAY_ADDRESS"] = "local"
    sys.exit(main([*ARGUMENTS, "--ray", "--json", str(Path(sys.argv[1]) / "results.json")]))

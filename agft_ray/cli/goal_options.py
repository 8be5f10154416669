"""What `agft-ray simulate` asks of policies: an objective, bounds, a weight of energy."""

from __future__ import annotations

import argparse
from typing import Any

from agft_ray.cli.names import Names, scenario_values


def add_goal_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--objective",
        choices=Names(lambda: scenario_values("objective")),
        metavar="NAME",
        help="what a tuner lowers: %(choices)s; default: the policy's own",
    )
    parser.add_argument(
        "--bound",
        type=float,
        default=0.10,
        metavar="SHARE",
        help="how much longer latencies may be than at default clocks, default: 0.1",
    )
    for name in ("ttft", "tpot", "e2e"):
        parser.add_argument(
            f"--slo-{name}", type=float, metavar="S", help=f"bound on {name.upper()} instead"
        )
    parser.add_argument(
        "--slo-statistic",
        choices=["mean", "p99"],
        default="mean",
        help="what of them policies and oracle_pair keep within those, default: mean",
    )
    parser.add_argument(
        "--energy-weight",
        metavar="FILE",
        help="rows of time and weight, what energy counts for; the first is of the run's start",
    )


def goal_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a scenario takes of them."""
    source = arguments.energy_weight
    return {
        "objective": arguments.objective,
        "bound": arguments.bound,
        "slo": {
            "ttft_s": arguments.slo_ttft,
            "tpot_s": arguments.slo_tpot,
            "e2e_s": arguments.slo_e2e,
            "statistic": arguments.slo_statistic,
        },
        "energy_weight": source and {"source": source},
    }

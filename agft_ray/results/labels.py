"""How runs are named that mean the same in every study: the baseline, and what is searched for."""

DEFAULT = "default"
FRONTIER, BEST_STATIC = "frontier", "best_static"
ORACLE_PAIR, BEST_STEPS = "oracle_pair", "best_steps"
HOLDOUT = "holdout"
"""The role of replicas that are kept at default clocks."""

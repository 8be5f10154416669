"""How our actors are found: names and the namespace."""

from __future__ import annotations

NAMESPACE = "agft_ray"
AGGREGATOR = "experience_aggregator"


def scraper_name(node_id: str) -> str:
    """The name of a node's metrics scraper."""
    return f"metrics_scraper-{node_id}"

"""One actor a node that reads the node's metrics agent for all tuners of that node."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from agft_ray.actors.background import background_actor
from agft_ray.actors.names import NAMESPACE, scraper_name
from agft_ray.telemetry.ray_metrics import ReplicaSeries, parse

INTERVAL_VARIABLE = "RAY_metrics_report_interval_ms"
DEFAULT_REPORT_INTERVAL_S = 10.0
FLOOR_REPORT_INTERVAL_S = 1.0
"""Ray exports no faster than that, whatever it is told."""
TIMEOUT_S = 5.0


def report_interval_s() -> float:
    """How often Ray exports metrics here: `RAY_metrics_report_interval_ms`, 10 s if unset."""
    text = os.environ.get(INTERVAL_VARIABLE, "")
    if not text:
        return DEFAULT_REPORT_INTERVAL_S
    try:
        return max(FLOOR_REPORT_INTERVAL_S, float(text) / 1000)
    except ValueError:
        raise ValueError(
            f"environment variable {INTERVAL_VARIABLE}={text!r} is not a number of milliseconds"
        ) from None


@dataclass(frozen=True, slots=True)
class Scrape:
    """One reading of a node's agent; `taken_s` is the node's monotonic clock."""

    taken_s: float
    replicas: dict[str, ReplicaSeries]


class MetricsScraper:
    """Reads at most once per report interval, since nothing newer is to be had in between.

    A scrape is about 0.7 MB and 130-190 ms of waiting; it runs in a thread and its lines are
    filtered while they are read.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._interval_s = report_interval_s()
        self._lock = asyncio.Lock()
        self._scrape: Scrape | None = None

    async def read(self, replica: str) -> tuple[float, ReplicaSeries | None]:
        """When the last scrape was taken (monotonic seconds), and the replica's series in it.

        Raises `OSError` if the agent does not answer.
        """
        async with self._lock:
            scrape = self._scrape
            if scrape is None or time.monotonic() - scrape.taken_s >= self._interval_s:
                scrape = self._scrape = await asyncio.to_thread(self._read_agent)
        return scrape.taken_s, scrape.replicas.get(replica)

    def _read_agent(self) -> Scrape:
        taken_s = time.monotonic()
        return Scrape(taken_s, parse(_lines(self._url)))


def _lines(url: str) -> Iterator[str]:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        for line in response:
            yield line.decode("utf-8", "replace")


def get_scraper() -> Any:
    """A handle to this node's scraper, started if there is none.

    It belongs to the tuner that started it and ends with it; the others then start the next.
    """
    node_id = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    return background_actor(
        MetricsScraper,
        node_id=node_id,
        name=scraper_name(node_id),
        namespace=NAMESPACE,
        get_if_exists=True,
        max_concurrency=64,
    ).remote(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")

"""Simulated runs over a Ray cluster: the same jobs and results as on one machine's cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from agft_ray.errors import AgftError
from agft_ray.study.pool import OnProgress, Pool, Report

T = TypeVar("T")
R = TypeVar("R")


def ray_pool() -> Pool:
    """A pool of tasks on the cluster that `RAY_ADDRESS` names, or that this node belongs to.

    Progress is told a whole job at a time. The package and a trace's path must be there on every
    node. Raises `AgftError` without Ray or without a cluster.
    """
    try:
        import ray
    except ImportError:
        raise AgftError("--ray needs Ray: pip install 'agft-ray[serve]', or leave it out") from None
    try:
        ray.init(os.environ.get("RAY_ADDRESS", "auto"), logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AgftError(
            f"--ray: no Ray cluster to be joined ({reason}); start one with `ray start --head`, "
            "set RAY_ADDRESS, or leave --ray out to use this machine's cores"
        ) from None
    return _on_cluster


def _on_cluster(
    work: Callable[[T, Report], R], jobs: Sequence[T], on_progress: OnProgress
) -> Iterator[tuple[int, R]]:
    import ray

    # One CPU each, and again on another node if a node dies: the same job gives the same result.
    task = ray.remote(num_cpus=1, max_retries=3)(_silently)
    numbers = {task.remote(work, job): number for number, job in enumerate(jobs)}
    pending = list(numbers)
    try:
        while pending:
            (done, *_), pending = ray.wait(pending, num_returns=1)
            number, (at_s, result) = numbers[done], _result(done)
            on_progress(number, at_s)
            yield number, result
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _result(reference: Any) -> Any:
    """What the task returned; what it raised is raised as it was, without Ray's wrapping."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None


def _silently(work: Callable[[T, Report], R], job: T) -> tuple[float, R]:
    """The job's last report, and its result."""
    at_s = 0.0

    def report(done: float) -> None:
        nonlocal at_s
        at_s = done

    result = work(job, report)
    return at_s, result

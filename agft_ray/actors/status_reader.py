"""What the tuners of a running Ray cluster say of themselves, read from outside."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

from agft_ray.actors.names import AGGREGATOR, NAMESPACE
from agft_ray.errors import AgftError

TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0


def readings(address: str) -> Iterator[list[dict[str, Any]]]:
    """All statuses of the cluster, anew each time they are asked for."""
    import ray
    from ray.exceptions import RayError

    _refuse_dead(address)
    try:
        ray.init(address, namespace=NAMESPACE, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AgftError(
            f"no Ray cluster to be joined at {address!r} ({reason}); start one, name one "
            "with --address HOST:PORT, and where it asks for a token set RAY_AUTH_MODE=token"
        ) from None
    aggregator = None
    while True:
        try:
            # By name: to look must not start one.
            aggregator = aggregator or ray.get_actor(AGGREGATOR, namespace=NAMESPACE)
            found: list[dict[str, Any]] = ray.get(aggregator.statuses.remote(), timeout=TIMEOUT_S)
        except ValueError:
            raise AgftError("no tuner has reported in this cluster yet") from None
        except RayError as error:
            raise AgftError(f"the experience aggregator does not answer: {error}") from None
        yield found


def _refuse_dead(address: str) -> None:
    """Ray would try for many minutes to reach a cluster that is not there."""
    host, colon, port = address.rpartition(":")
    if not colon or "//" in address:
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise AgftError(f"--address: nothing answers at {address!r}: {error}") from None

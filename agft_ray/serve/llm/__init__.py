"""Tuned `ray.serve.llm`: its servers with a tuner beside each replica, and its builders with those.

`server_cls: agft_ray.serve.llm:TunedLLMServer` in a config file. The servers need Ray and vLLM and
are imported when first used; settings and checks need neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agft_ray.serve.llm.servers import (
        TunedDPPDDecodeServer,
        TunedDPPDPrefillServer,
        TunedDPServer,
        TunedLLMServer,
        TunedPDDecodeServer,
        TunedPDPrefillServer,
        TunedServerMixin,
    )

__all__ = [
    "TunedDPPDDecodeServer",
    "TunedDPPDPrefillServer",
    "TunedDPServer",
    "TunedLLMServer",
    "TunedPDDecodeServer",
    "TunedPDPrefillServer",
    "TunedServerMixin",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.servers"), name)

"""Whether the installed vLLM can be read."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


def look_at_vllm() -> tuple[str, bool]:
    """Why the installed vLLM's statistics are not enough to tune by, or ""; and whether it can be
    told to time its steps (by `enable_logging_iteration_details`).

    Never raises, whatever is installed: a replica serves without a tuner just as well.
    """
    try:
        from agft_ray.serve.vllm import plugin as vllm_plugin

        return vllm_plugin.problem(), vllm_plugin.times_steps()
    except Exception as error:
        log.warning("this vLLM's statistics cannot be looked at", exc_info=error)
        return f"this vLLM's statistics are of a form that is not known: {error!r}", False

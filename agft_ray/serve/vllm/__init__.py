"""vLLM's statistics: in process, from its stat loggers, or over HTTP."""

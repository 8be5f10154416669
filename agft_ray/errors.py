"""The error tree. Every error carries its data as arguments, so it survives pickling."""

from __future__ import annotations

from collections.abc import Sequence


class AgftError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(AgftError):
    """Invalid settings. `problems` holds one line a problem: field, value, rule, way out."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        super().__init__(source, tuple(problems))
        self.source = source
        self.problems = tuple(problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{self.source}: {count} problem{'s' if count != 1 else ''}"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


class TraceError(AgftError):
    """A request trace that cannot be read; names the file and, where there is one, the line."""


class DownloadError(AgftError):
    """A file that could not be fetched, or that is not the one it should be."""


class StaleMetricsError(AgftError):
    """The newest values of a metrics source are missing or too old to act on."""


class PriorError(AgftError):
    """Experience or a prior that is malformed or not comparable with ours."""


class GpuError(AgftError):
    """A GPU operation failed."""


class GpuPermissionError(GpuError):
    """This process may not set clocks."""


class GpuNotSupportedError(GpuError):
    """This GPU cannot do that, and trying again will not help."""


class GpuArgumentError(GpuError):
    """The GPU does not offer the clock asked for."""


class LeaseHeldError(GpuError):
    """Another living process has the right to set this GPU's clocks."""


class LeaseLostError(GpuError):
    """Our right to set clocks was taken back while we hung; acquire it anew before writing."""


class GpuLostError(GpuError):
    """The GPU is gone; the engine on it is as well."""


class GpuTransientError(GpuError):
    """The call failed this time; a later one may not."""

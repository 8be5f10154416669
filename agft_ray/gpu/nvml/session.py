"""NVML calls: when to initialise it, what its failures mean, and how to find a GPU in it again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from agft_ray.errors import (
    GpuArgumentError,
    GpuError,
    GpuLostError,
    GpuNotSupportedError,
    GpuTransientError,
    GpuUnavailableError,
)
from agft_ray.gpu.nvml.errors import FUNCTION_NOT_FOUND, INVALID_ARGUMENT, NOT_SUPPORTED, gpu_error
from agft_ray.gpu.nvml.reader import NvmlCalls
from agft_ray.gpu.nvml.thread import NvmlThread

T = TypeVar("T")

# By `nvmlValueType_t`.
_VALUE_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


class NvmlSession:
    """A process's use of NVML through `pynvml`; all but `thread` is to be used on that thread."""

    def __init__(self, pynvml: ModuleType) -> None:
        self.thread = NvmlThread()
        self._pynvml = pynvml
        self._openings = 0
        self._is_open = self._is_suspect = False

    def open(self, gpu: str) -> int:
        """Initialise NVML if need be; returns how often that was done: older handles are void."""
        if self._is_suspect and self._is_open:
            self._is_open = False
            with contextlib.suppress(GpuError):
                self.call("nvmlShutdown", gpu)
        if not self._is_open:
            self.call("nvmlInit", gpu)
            self._is_open, self._is_suspect = True, False
            self._openings += 1
        return self._openings

    def call(self, function: str, gpu: str, *args: object) -> Any:
        """What pynvml's function returns; `gpu` is who to name in errors."""
        try:
            return getattr(self._pynvml, function, self._missing)(*args)
        except self._pynvml.NVMLError as error:
            raise self.failure(error.value, function, gpu) from None

    def failure(self, code: int, function: str, gpu: str) -> GpuError:
        """The error for a return code; a transient one puts the session under suspicion."""
        text = str(self._pynvml.NVMLError(code))
        error = gpu_error(code, function=function, gpu=gpu, text=text)
        self._is_suspect |= isinstance(error, GpuTransientError)
        return error

    def _missing(self, *args: object) -> None:
        raise self._pynvml.NVMLError(FUNCTION_NOT_FOUND)


class HandleCalls:
    """`NvmlCalls` on a handle, for the session's thread."""

    def __init__(self, session: NvmlSession, gpu: str, handle: object) -> None:
        self.gpu = gpu
        self._session, self._handle = session, handle

    def __call__(self, function: str, *args: object) -> Any:
        return self._session.call(function, self.gpu, self._handle, *args)

    def of(self, handle: object) -> HandleCalls:
        """The same for another handle, such as a MIG instance's."""
        return HandleCalls(self._session, self.gpu, handle)

    def field(self, field_id: int) -> tuple[float, int]:
        """A field's value and the time that it belongs to."""
        function = "nvmlDeviceGetFieldValues"
        try:
            field = self(function, [field_id])[0]
        except GpuArgumentError as error:
            raise GpuNotSupportedError(*error.args) from None
        # A driver that does not know the field says so in either way.
        code = NOT_SUPPORTED if field.nvmlReturn == INVALID_ARGUMENT else field.nvmlReturn
        if code:
            raise self._session.failure(code, f"{function}({field_id})", self.gpu)
        return getattr(field.value, _VALUE_MEMBERS[field.valueType]), field.timestamp


class NvmlDevice:
    """One GPU as this process's NVML has it, found by UUID; once it is lost it stays so."""

    def __init__(self, session: NvmlSession, uuid: str, deadline_s: float) -> None:
        self.uuid = uuid
        self._session = session
        self._deadline_s = deadline_s
        self._opening = 0
        self._handle: object = None
        self._lost = ""

    def run(self, name: str, job: Callable[[NvmlCalls], T]) -> T:
        """`job(nvml)`, on the NVML thread; `name` is what to call it in errors.

        Raises `GpuLostError` without asking NVML once it was raised, `GpuUnavailableError` for a
        GPU that was never found, `GpuTransientError` after the deadline, and what `job` raises.
        """
        self.check_not_lost()
        name = f"{name} of {self.uuid}"
        return self._session.thread.call(self._run, job, deadline_s=self._deadline_s, name=name)

    def check_not_lost(self) -> None:
        """Raise `GpuLostError` again if it ever was."""
        if self._lost:
            raise GpuLostError(self._lost)

    def _run(self, job: Callable[[NvmlCalls], T]) -> T:
        try:
            return job(HandleCalls(self._session, self.uuid, self._current_handle()))
        except GpuLostError as error:
            self._lost = str(error)
            raise
        except GpuUnavailableError as error:
            if self._handle is None:
                raise
            self._lost = str(error)
            raise GpuLostError(self._lost) from None

    def _current_handle(self) -> object:
        opening = self._session.open(self.uuid)
        if opening != self._opening:
            self._handle = self._session.call("nvmlDeviceGetHandleByUUID", self.uuid, self.uuid)
            self._opening = opening
        return self._handle

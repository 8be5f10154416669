"""A FAKE libnvidia-ml.so.1 and its controller, for tests on machines without a GPU.

Put this directory on the path first: `sys.path.insert(0, str(ROOT / "tests" / "fake_nvml"))`. Then

    library_dir = build(tmp_path)
    fake = FakeNvml(tmp_path / "gpus", gpus=2)
    subprocess.run([...], env={**os.environ, **fake.env(library_dir)})    # another process, or
    load(library_dir); monkeypatch.setenv(ENV, str(fake.path))            # this one

The GPUs are in the file, so they survive every process; `fake.gpu(0)` looks at and changes them
from outside, as an administrator or an accident would. The structures and the physics repeat
those of fake_nvml.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENV = "AGFT_FAKE_NVML"
"""The environment variable that names the state file; without it there is no driver."""

LIBRARY = "libnvidia-ml.so.1"
MAX_GPUS = 8
SM_CLOCKS_MHZ = tuple(range(210, 1981, 15))
MEMORY_CLOCK_MHZ = 2619
POWER_LIMITS_W = (200.0, 700.0)
"""The lowest limit, and the highest, which is also the default."""

GROUPS = ["energy", "power", "reasons", "clock", "info", "read", "handle", "set", "reset", "any"]
"""Functions that are counted, delayed and failed together. "handle" finds a GPU, "set" locks
clocks and sets the power limit, "reset" unlocks, "info" is any other read, "read" stands for all
reads, "any" for everything. Of one GetFieldValues call, counted once as "read", "energy" and
"power" concern the single fields."""

_PAGE = 4096
_MAGIC = b"fake_nvml 1"
_IDLE, _POWER_CAP = 0x1, 0x4


def build(directory: str | os.PathLike[str], *, old_driver: bool = False) -> Path:
    """Put the library in a folder of `directory`, which is the one for LD_LIBRARY_PATH.

    A copy of what was compiled once for all: each folder's library has its own count of inits.
    `old_driver` makes a variant without event reasons, power fields (185, 186) and
    nvmlDeviceGetTemperatureV. Skips the test if there is no C compiler.
    """
    library_dir = Path(directory, "nvml-old" if old_driver else "nvml").absolute()
    library = library_dir / LIBRARY
    if not library.exists():
        compiled = _compiled(old_driver)
        library_dir.mkdir(parents=True, exist_ok=True)
        with _replacing(library) as temporary:
            shutil.copyfile(compiled, temporary)
    return library_dir


def _compiled(old_driver: bool) -> Path:
    """The library of this source and these flags, compiled unless it is in the cache."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        import pytest

        pytest.skip("no C compiler to build the fake NVML with")
    # -Bsymbolic: two variants in one process do not call each other's functions
    linking = ["-shared", "-fPIC", f"-Wl,-Bsymbolic,-soname,{LIBRARY}"]
    command = [compiler, "-std=gnu11", "-O1", *linking, *(["-DOLD_DRIVER"] if old_driver else [])]
    source = Path(__file__).with_suffix(".c")
    content = source.read_bytes() + repr(command).encode()
    library = _cache() / f"{hashlib.sha256(content).hexdigest()[:32]}.so"
    if not library.exists():
        with _replacing(library) as temporary:
            subprocess.run([*command, "-o", temporary, source], check=True)
    return library


def _cache() -> Path:
    """A directory of this user's that nobody else can write to: tests load what lies there."""
    cache = Path(tempfile.gettempdir(), f"agft-fake-nvml-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        cache.mkdir(mode=0o700)
    found = cache.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{cache} must be a directory of this user's, mode 0700: remove it")
    return cache


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end: no other process sees half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    yield temporary
    temporary.replace(path)


def load(library_dir: Path) -> ctypes.CDLL:
    """Load the library into this process, so that `dlopen("libnvidia-ml.so.1")` finds it.

    The first one loaded, fake or real, stays the one found by that name as long as the process
    lives: use child processes, or `use_in_pynvml`, for another variant.
    """
    return ctypes.CDLL(str(library_dir / LIBRARY))


def use_in_pynvml(library_dir: Path | None) -> None:
    """Make this process's pynvml use that variant, or (None) search for a library anew."""
    import pynvml

    pynvml.nvmlLib = None if library_dir is None else load(library_dir)
    pynvml._nvmlGetFunctionPointer_cache.clear()
    pynvml._nvmlLib_refcount = 0


def power_w(sm_clock_mhz: float, busy: float = 1.0) -> float:
    """Power of the fake GPU: 60 W + 0.12 mW/MHz² * clock² when busy, 50 W idle."""
    return 60 + 0.00012 * sm_clock_mhz * sm_clock_mhz if busy else 50.0


class _Group(ctypes.Structure):
    _fields_ = (
        ("calls", ctypes.c_uint64),
        ("code", ctypes.c_int64),
        ("after", ctypes.c_int64),
        ("times", ctypes.c_int64),
        ("delay_s", ctypes.c_double),
    )


class _Header(ctypes.Structure):
    _fields_ = (("magic", ctypes.c_char * 16), ("gpus", ctypes.c_uint64), ("init", _Group))


class _Range(ctypes.Structure):
    _fields_ = (("min_mhz", ctypes.c_uint32), ("max_mhz", ctypes.c_uint32))


class _Gpu(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_char * size) for name, size in (("uuid", 80), ("name", 96))),
        ("bus_id", ctypes.c_char * 32),
        *((name, ctypes.c_double) for name in ("busy", "settle_s", "counter_update_s")),
        *((name, ctypes.c_double) for name in ("energy_j", "counter_j")),
        *((name, ctypes.c_int64) for name in ("t_ns", "counter_realtime_us", "change_ns")),
        ("applied", _Range),
        ("locked", _Range),
        ("event_reasons", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("forced_mhz", "clamp_steps", "counter_stuck")),
        ("power_limit_mw", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("mig_mode", "mig_pending")),
        *((name, ctypes.c_uint32) for name in ("persistence_mode", "virtualization_mode")),
        *((name, ctypes.c_uint32) for name in ("temperature_c", "reserved")),
        ("groups", _Group * len(GROUPS)),
    )
    energy_j: float
    t_ns: int
    change_ns: int

    def uncapped_sm_clock_mhz(self) -> int:
        if self.forced_mhz:
            return int(self.forced_mhz)
        if not self.applied.max_mhz:
            return SM_CLOCKS_MHZ[-1 if self.busy else 0]
        asked = self.applied.max_mhz if self.busy else self.applied.min_mhz
        index: int = sum(mhz <= asked for mhz in SM_CLOCKS_MHZ) - 1 - self.clamp_steps
        return SM_CLOCKS_MHZ[max(index, 0)]

    def sm_clock_mhz(self) -> int:
        mhz: int = self.uncapped_sm_clock_mhz()
        while mhz > SM_CLOCKS_MHZ[0] and power_w(mhz, self.busy) * 1000 > self.power_limit_mw:
            mhz -= 15
        return mhz

    def advance(self) -> None:
        """Bring the energy to the present, and the counter to its last update."""
        now_ns = time.monotonic_ns()
        update_ns = now_ns - now_ns % int(self.counter_update_s * 1e9)
        if update_ns > self.t_ns:
            self._integrate_changes(update_ns)
            if not self.counter_stuck:
                self._show_energy(update_ns)
        self._integrate_changes(now_ns)

    def set_energy(self, energy_j: float) -> None:
        self.energy_j = energy_j
        self._show_energy(time.monotonic_ns())

    def _show_energy(self, t_ns: int) -> None:
        self.counter_j = self.energy_j
        self.counter_realtime_us = (time.time_ns() - (time.monotonic_ns() - t_ns)) // 1000

    def _integrate_changes(self, until_ns: int) -> None:
        if 0 < self.change_ns <= until_ns:
            self._integrate(self.change_ns)
            self.applied = self.locked
            self.change_ns = 0
        self._integrate(until_ns)

    def _integrate(self, until_ns: int) -> None:
        if until_ns > self.t_ns:
            power = power_w(self.sm_clock_mhz(), self.busy)
            self.energy_j += power * (until_ns - self.t_ns) * 1e-9
            self.t_ns = until_ns


class _Value:
    """A property that reads and writes the structure's member of the same name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, gpu: FakeGpu, owner: type) -> Any:
        value = getattr(gpu._look(), self.name)
        return value.decode() if isinstance(value, bytes) else value

    def __set__(self, gpu: FakeGpu, value: Any) -> None:
        with gpu._change() as state:
            setattr(state, self.name, value.encode() if isinstance(value, str) else value)


class FakeGpu:
    """One GPU of a `FakeNvml`, seen and changed from outside. Setting counts and logs nothing."""

    uuid = _Value()
    name = _Value()
    bus_id = _Value()
    """The PCI address, "00000000:17:00.0"."""
    busy = _Value()
    """Utilisation 0..1; at 0 the GPU idles at the lowest clock it may."""
    settle_s = _Value()
    """From a lock or reset to its effect; a newer one replaces one that has had none yet."""
    counter_update_s = _Value()
    counter_stuck = _Value()
    """True: the energy counter no longer changes."""
    clamp_steps = _Value()
    """How many supported clocks lower than asked a lock lands."""
    mig_mode = _Value()
    """1 on, 0 off, -1 not supported; `mig_pending` is the mode after the next GPU reset."""
    mig_pending = _Value()
    persistence_mode = _Value()
    virtualization_mode = _Value()
    """0 none, 1 pass-through, 2 vGPU, 3 host of vGPUs."""
    temperature_c = _Value()

    def __init__(self, fake: FakeNvml, index: int) -> None:
        self._fake = fake
        self.index = index

    @property
    def locked_mhz(self) -> tuple[int, int] | None:
        """The locked range (min, max) as asked, also before it takes effect; None: default."""
        locked = self._look().locked
        return (locked.min_mhz, locked.max_mhz) if locked.max_mhz else None

    @locked_mhz.setter
    def locked_mhz(self, range_mhz: tuple[int, int] | None) -> None:
        with self._change() as state:
            state.locked = _Range(*(range_mhz or (0, 0)))
            state.change_ns = state.t_ns + int(state.settle_s * 1e9)

    @property
    def sm_clock_mhz(self) -> int:
        """The effective SM clock; setting it forces it whatever is locked, None lets go."""
        return int(self._look().sm_clock_mhz())

    @sm_clock_mhz.setter
    def sm_clock_mhz(self, forced_mhz: int | None) -> None:
        with self._change() as state:
            state.forced_mhz = forced_mhz or 0

    @property
    def power_w(self) -> float:
        """Power drawn now."""
        state = self._look()
        return power_w(state.sm_clock_mhz(), state.busy)

    @property
    def energy_j(self) -> float:
        """Exact energy now, ahead of the counter; setting it sets the counter as well."""
        return float(self._look().energy_j)

    @energy_j.setter
    def energy_j(self, energy_j: float) -> None:
        with self._change() as state:
            state.set_energy(energy_j)

    @property
    def counter_j(self) -> float:
        """The energy that the counter shows, updated every `counter_update_s`."""
        return float(self._look().counter_j)

    def reset_counter(self) -> None:
        """Start the energy counter from 0, as a reload of the driver does."""
        self.energy_j = 0.0

    @property
    def power_limit_w(self) -> float:
        return float(self._look().power_limit_mw / 1000)

    @power_limit_w.setter
    def power_limit_w(self, limit_w: float) -> None:
        with self._change() as state:
            state.power_limit_mw = round(limit_w * 1000)

    @property
    def event_reasons(self) -> int:
        """Event reasons as NVML shows them; what is set is added to idle (1) and power cap (4)."""
        state = self._look()
        idle = 0 if state.busy else _IDLE
        capped = _POWER_CAP if state.sm_clock_mhz() < state.uncapped_sm_clock_mhz() else 0
        return int(state.event_reasons) | idle | capped

    @event_reasons.setter
    def event_reasons(self, reasons: int) -> None:
        with self._change() as state:
            state.event_reasons = reasons

    def settle(self) -> None:
        """Let a lock or reset that has had no effect yet have it now."""
        with self._change() as state:
            if state.change_ns:
                state.change_ns = state.t_ns
                state.advance()

    def fail(self, group: str, code: int, after: int = 0, times: int | None = None) -> None:
        """Let calls of a group (see `GROUPS`) return the NVML code; code 0 ends that.

        The next `after` calls still succeed; then `times` fail, or (None) all.
        """
        with self._change() as state:
            _script(state.groups[GROUPS.index(group)], code, after, times)

    def delay(self, group: str, seconds: float) -> None:
        """Let every call of a group take so long before it does or fails to do anything.

        It holds no lock meanwhile. Lowering the delay also releases calls that wait already.
        """
        with self._change() as state:
            state.groups[GROUPS.index(group)].delay_s = seconds

    def calls(self, group: str) -> int:
        """How many calls of a group were made so far, failed and waiting ones included."""
        return int(self._look().groups[GROUPS.index(group)].calls)

    def _look(self) -> _Gpu:
        with self._change() as state:
            return state

    @contextlib.contextmanager
    def _change(self) -> Iterator[_Gpu]:
        with self._fake._locked() as fd:
            offset = (1 + self.index) * _PAGE
            state = _Gpu.from_buffer_copy(os.pread(fd, ctypes.sizeof(_Gpu), offset))
            state.advance()
            yield state
            os.pwrite(fd, bytes(state), offset)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One call of a setter. `args`: (min, max) in MHz, (limit in mW,), or () for a reset."""

    t_ns: int
    """On `time.monotonic_ns`."""
    pid: int
    function: str
    uuid: str
    args: tuple[int, ...]
    rc: int


class FakeNvml:
    """The driver and its GPUs. Without the file there is no driver; removing it loses the GPUs."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        gpus: int = 2,
        uuids: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Open the state file; make it if there is none, with GPUs as described (busy, unlocked).

        Raises ValueError for more than 8 GPUs.
        """
        self.path = Path(path).absolute()
        if not self.path.exists():
            self._create()
            for index in range(gpus if uuids is None else len(uuids)):
                self.add_gpu(
                    None if uuids is None else uuids[index], None if names is None else names[index]
                )

    def add_gpu(self, uuid: str | None = None, name: str | None = None) -> FakeGpu:
        """One more GPU, an H100 unless named otherwise."""
        with self._locked() as fd:
            header = _read_header(fd)
            index = header.gpus
            if index >= MAX_GPUS:
                raise ValueError(f"fake NVML: GPU {index} asked, at most {MAX_GPUS} fit: use fewer")
            gpu = _new_gpu(uuid or f"GPU-00000000-fa4e-0000-0000-{index:012d}", index)
            gpu.name = (name or "NVIDIA H100 80GB HBM3").encode()
            os.pwrite(fd, bytes(gpu), (1 + index) * _PAGE)
            header.gpus += 1
            os.pwrite(fd, bytes(header), 0)
        return FakeGpu(self, index)

    def gpu(self, index: int) -> FakeGpu:
        """The GPU of that NVML index; raises IndexError if there is none."""
        if not 0 <= index < len(self):
            raise IndexError(f"fake NVML: GPU {index} asked, there are {len(self)}")
        return FakeGpu(self, index)

    def __len__(self) -> int:
        with self._locked() as fd:
            return int(_read_header(fd).gpus)

    def env(self, library_dir: Path) -> dict[str, str]:
        """What to add to a child's environment so that it finds this driver."""
        paths = [str(library_dir), os.environ.get("LD_LIBRARY_PATH", "")]
        return {ENV: str(self.path), "LD_LIBRARY_PATH": ":".join(filter(None, paths))}

    def fail_init(self, code: int, after: int = 0, times: int | None = None) -> None:
        """Let nvmlInit return the code, as `FakeGpu.fail` does for other functions."""
        with self._change_header() as header:
            _script(header.init, code, after, times)

    def delay_init(self, seconds: float) -> None:
        """Let nvmlInit take so long."""
        with self._change_header() as header:
            header.init.delay_s = seconds

    @property
    def init_calls(self) -> int:
        """How often nvmlInit was called, by whomever."""
        with self._locked() as fd:
            return int(_read_header(fd).init.calls)

    def log(self) -> list[LogEntry]:
        """All calls of setters, failed ones included, in the order of their effects.

        But for a line that was torn by a kill of its writer.
        """
        log = Path(f"{self.path}.log")
        lines = log.read_text().split("\n") if log.exists() else []
        return [_parse(line) for line in lines if line.count(" ") == _LOG_COLUMNS - 1]

    def _create(self) -> None:
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.{time.monotonic_ns()}")
        content = bytes(_Header(magic=_MAGIC)).ljust((1 + MAX_GPUS) * _PAGE, b"\0")
        temporary.write_bytes(content)
        temporary.replace(self.path)

    @contextlib.contextmanager
    def _change_header(self) -> Iterator[_Header]:
        with self._locked() as fd:
            header = _read_header(fd)
            yield header
            os.pwrite(fd, bytes(header), 0)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def _read_header(fd: int) -> _Header:
    return _Header.from_buffer_copy(os.pread(fd, ctypes.sizeof(_Header), 0))


def _new_gpu(uuid: str, index: int) -> _Gpu:
    gpu = _Gpu(
        uuid=uuid.encode(),
        bus_id=f"00000000:{0x17 + index:02X}:00.0".encode(),
        busy=1.0,
        settle_s=0.02,
        counter_update_s=0.1,
        t_ns=time.monotonic_ns(),
        power_limit_mw=round(POWER_LIMITS_W[1] * 1000),
        persistence_mode=1,
        temperature_c=45,
    )
    gpu.set_energy(1000.0)
    return gpu


def _script(group: _Group, code: int, after: int, times: int | None) -> None:
    group.code, group.after, group.times = code, after, times or 0


_LOG_COLUMNS = 6


def _parse(line: str) -> LogEntry:
    t_ns, pid, function, uuid, args, rc = line.split(" ")
    values = () if args == "-" else tuple(int(value) for value in args.split(","))
    return LogEntry(int(t_ns), int(pid), function, uuid, values, int(rc))

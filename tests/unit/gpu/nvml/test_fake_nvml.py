"""The fake NVML behaves as NVML does, for every kind of user, and breaks only as scripted."""

import ctypes
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pynvml
import pytest
from polling import wait_until

sys.path.insert(0, str(Path(__file__).parents[3] / "fake_nvml"))

import fake_nvml
from fake_nvml import ENV, SM_CLOCKS_MHZ, FakeNvml, build, load, power_w, use_in_pynvml

RESET = "nvmlDeviceResetGpuLockedClocks"
SET = "nvmlDeviceSetGpuLockedClocks"


@pytest.fixture(scope="module")
def library_dir(tmp_path_factory):
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeNvml(tmp_path / "gpus")
    monkeypatch.setenv(ENV, str(fake.path))
    return fake


@pytest.fixture
def nvml(fake, library_dir):
    """The unmodified pynvml of this process, on the fake."""
    use_in_pynvml(library_dir)
    pynvml.nvmlInit()
    yield pynvml
    pynvml.nvmlShutdown()
    use_in_pynvml(None)


@pytest.fixture
def handle(nvml):
    return nvml.nvmlDeviceGetHandleByIndex(0)


def run_python(code, fake, library_dir, **options):
    environment = {**os.environ, **fake.env(library_dir)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60, **options
    ).stdout.strip()


def sm_clock_mhz(handle):
    return pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)


# --- who can use it -------------------------------------------------------------------------------


@pytest.fixture
def compilations(tmp_path, monkeypatch):
    """Every compilation from now on, with no library in the cache yet."""
    compile_it, commands = subprocess.run, []

    def run(command, **options):
        commands.append(command)
        return compile_it(command, **options)

    monkeypatch.setattr(fake_nvml.subprocess, "run", run)
    monkeypatch.setattr(fake_nvml.tempfile, "tempdir", str(tmp_path))
    return commands


def test_it_is_compiled_once_a_variant_wherever_it_is_built(tmp_path, compilations):
    for name in ("a", "b", "a"):
        new, old = build(tmp_path / name), build(tmp_path / name, old_driver=True)
        assert (new / "libnvidia-ml.so.1").read_bytes() != (old / "libnvidia-ml.so.1").read_bytes()
    assert len(compilations) == 2
    (cache,) = tmp_path.glob("agft-fake-nvml-*")
    assert cache.stat().st_mode & 0o777 == 0o700
    assert len(list(cache.iterdir())) == 2
    load(tmp_path / "b" / "nvml").nvmlInit_v2()
    assert load(tmp_path / "a" / "nvml").nvmlShutdown() == pynvml.NVML_ERROR_UNINITIALIZED


def test_another_source_is_another_library(tmp_path, compilations, monkeypatch):
    build(tmp_path / "a")
    source = tmp_path / "changed.c"
    source.write_bytes(Path(fake_nvml.__file__).with_suffix(".c").read_bytes() + b"\n")
    monkeypatch.setattr(fake_nvml, "__file__", str(source.with_suffix(".py")))
    build(tmp_path / "b")
    assert len(compilations) == 2


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path, compilations):
    cache = tmp_path / f"agft-fake-nvml-{os.geteuid()}"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(PermissionError, match="0700: remove it"):
        build(tmp_path / "a")
    assert compilations == []


def test_python_and_c_agree_on_the_structure(library_dir):
    size = ctypes.c_size_t.in_dll(load(library_dir), "fake_nvml_gpu_size").value
    assert size == ctypes.sizeof(fake_nvml._Gpu)


def test_pynvml_in_a_subprocess_finds_it_by_name(fake, library_dir):
    code = """if True:
        import pynvml
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(1)
        pynvml.nvmlDeviceSetGpuLockedClocks(handle, 900, 1200)
        print(pynvml.nvmlDeviceGetCount(), pynvml.nvmlDeviceGetName(handle))
    """
    assert run_python(code, fake, library_dir) == "2 NVIDIA H100 80GB HBM3"
    assert fake.gpu(1).locked_mhz == (900, 1200)
    assert fake.gpu(0).locked_mhz is None


def test_preloaded_it_is_found_by_name_in_this_very_process(fake, library_dir):
    code = f"""if True:
        import ctypes, os, sys
        sys.path.insert(0, {str(Path(fake_nvml.__file__).parent)!r})
        from fake_nvml import load
        from pathlib import Path
        load(Path({str(library_dir)!r}))
        import pynvml
        pynvml.nvmlInit()
        count = ctypes.c_uint()
        ctypes.CDLL("libnvidia-ml.so.1").nvmlDeviceGetCount_v2(ctypes.byref(count))
        print(pynvml.nvmlDeviceGetCount(), count.value)
    """
    environment = {**os.environ, ENV: str(fake.path)}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment, text=True).split() == ["2", "2"]


def test_ray_sees_the_gpus(fake, library_dir):
    code = """if True:
        from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as Manager
        print(Manager.get_current_node_num_accelerators())
        print(Manager.get_current_node_accelerator_type())
        from ray.dashboard.modules.reporter.gpu_providers import NvidiaGpuProvider
        for gpu in NvidiaGpuProvider().get_gpu_utilization():
            print(gpu["uuid"], gpu["utilization_gpu"], gpu["power_mw"], gpu["temperature_c"])
    """
    reported = [f"{fake.gpu(index).uuid} 100 {int(power_w(1980) * 1000)} 45" for index in (0, 1)]
    assert run_python(code, fake, library_dir).splitlines() == ["2", "H100", *reported]


def test_without_the_state_file_there_is_no_driver(library_dir, monkeypatch):
    monkeypatch.delenv(ENV, raising=False)
    use_in_pynvml(library_dir)
    try:
        with pytest.raises(pynvml.NVMLError_DriverNotLoaded):
            pynvml.nvmlInit()
    finally:
        use_in_pynvml(None)


def test_without_init_nothing_works(library_dir, fake):
    library = load(library_dir)
    handle = ctypes.c_void_p()
    assert library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) == 1
    assert library.nvmlShutdown() == 1


# --- what it says ---------------------------------------------------------------------------------


def test_gpus_are_found_by_every_address(nvml, fake):
    gpu = fake.gpu(1)
    found = [
        nvml.nvmlDeviceGetHandleByIndex(1),
        nvml.nvmlDeviceGetHandleByUUID(gpu.uuid),
        nvml.nvmlDeviceGetHandleByPciBusId(gpu.bus_id),
        nvml.nvmlDeviceGetHandleByPciBusId(gpu.bus_id[4:].lower()),
    ]
    assert [nvml.nvmlDeviceGetIndex(handle) for handle in found] == [1, 1, 1, 1]
    assert nvml.nvmlDeviceGetUUID(found[0]) == gpu.uuid
    pci = nvml.nvmlDeviceGetPciInfo(found[0])
    assert (pci.busId, pci.busIdLegacy, pci.bus) == (gpu.bus_id, gpu.bus_id[4:], 0x18)
    with pytest.raises(nvml.NVMLError_NotFound):
        nvml.nvmlDeviceGetHandleByUUID("GPU-none")
    with pytest.raises(nvml.NVMLError_InvalidArgument):
        nvml.nvmlDeviceGetHandleByIndex(2)


def test_descriptions(nvml, handle, fake):
    fake.gpu(0).mig_mode = 1
    fake.gpu(0).virtualization_mode = 2
    fake.gpu(0).persistence_mode = 0
    fake.gpu(0).temperature_c = 71
    assert nvml.nvmlDeviceGetMigMode(handle) == [1, 0]
    assert nvml.nvmlDeviceGetVirtualizationMode(handle) == 2
    assert nvml.nvmlDeviceGetPersistenceMode(handle) == 0
    assert nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU) == 71
    assert nvml.nvmlDeviceGetTemperatureV(handle, nvml.NVML_TEMPERATURE_GPU) == 71
    assert nvml.nvmlDeviceGetCudaComputeCapability(handle) == (9, 0)
    assert nvml.nvmlDeviceGetMemoryInfo(handle).total == 80 * 2**30
    assert nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2).total == 80 * 2**30
    assert nvml.nvmlDeviceGetComputeRunningProcesses(handle) == []
    assert nvml.nvmlSystemGetDriverVersion() == "550.54.15"
    fake.gpu(0).mig_mode = -1
    with pytest.raises(nvml.NVMLError_NotSupported):
        nvml.nvmlDeviceGetMigMode(handle)


def test_supported_clocks_descend(nvml, handle):
    memory_mhz = nvml.nvmlDeviceGetSupportedMemoryClocks(handle)
    assert memory_mhz == [2619]
    supported = nvml.nvmlDeviceGetSupportedGraphicsClocks(handle, memory_mhz[0])
    assert supported == list(reversed(SM_CLOCKS_MHZ))
    with pytest.raises(nvml.NVMLError_NotFound):
        nvml.nvmlDeviceGetSupportedGraphicsClocks(handle, 1000)


# --- clocks, power, energy ------------------------------------------------------------------------


def test_a_lock_takes_effect_after_settling(nvml, handle, fake):
    fake.gpu(0).settle_s = 3600.0
    nvml.nvmlDeviceSetGpuLockedClocks(handle, 1000, 1000)
    assert sm_clock_mhz(handle) == fake.gpu(0).sm_clock_mhz == 1980
    fake.gpu(0).settle()
    assert sm_clock_mhz(handle) == fake.gpu(0).sm_clock_mhz == 990, "the closest supported below"
    assert nvml.nvmlDeviceGetPowerUsage(handle) == int(power_w(990) * 1000)
    fake.gpu(0).settle_s = 0.05
    nvml.nvmlDeviceResetGpuLockedClocks(handle)
    wait_until(lambda: sm_clock_mhz(handle) == 1980)
    assert fake.gpu(0).locked_mhz is None


@pytest.mark.parametrize(
    ("busy", "locked", "clamp_steps", "expected_mhz"),
    [
        (1, None, 0, 1980),
        (0, None, 0, 210),
        (1, (210, 1500), 0, 1500),
        (0, (300, 1500), 0, 300),
        (1, (1, 100), 0, 210),
        (1, (1, 9999), 0, 1980),
        (1, (1200, 1200), 3, 1155),
        (1, (220, 220), 3, 210),
    ],
)
def test_the_clock_that_results(nvml, handle, fake, busy, locked, clamp_steps, expected_mhz):
    gpu = fake.gpu(0)
    gpu.settle_s, gpu.busy, gpu.clamp_steps = 0, busy, clamp_steps
    if locked is not None:
        nvml.nvmlDeviceSetGpuLockedClocks(handle, *locked)
    assert sm_clock_mhz(handle) == gpu.sm_clock_mhz == expected_mhz
    expected_power_w = power_w(expected_mhz, busy)
    assert gpu.power_w == pytest.approx(expected_power_w)
    assert nvml.nvmlDeviceGetPowerUsage(handle) == int(expected_power_w * 1000)
    assert nvml.nvmlDeviceGetCurrentClocksEventReasons(handle) == (0 if busy else 1)


@pytest.mark.parametrize("arguments", [(1200, 900), (0, 0), (0xFFFFFF00, 0xFFFFFF02)])
def test_senseless_locks_are_refused(nvml, handle, fake, arguments):
    with pytest.raises(nvml.NVMLError_InvalidArgument):
        nvml.nvmlDeviceSetGpuLockedClocks(handle, *arguments)
    assert fake.gpu(0).locked_mhz is None
    assert [entry.rc for entry in fake.log()] == [2]


def test_a_power_limit_lowers_the_clock(nvml, handle, fake):
    nvml.nvmlDeviceSetPowerManagementLimit(handle, 300_000)
    gpu = fake.gpu(0)
    assert gpu.power_limit_w == 300
    assert power_w(gpu.sm_clock_mhz) <= 300 < power_w(gpu.sm_clock_mhz + 15)
    assert sm_clock_mhz(handle) == gpu.sm_clock_mhz
    reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    assert reasons == gpu.event_reasons == 4
    low_mw, high_mw = nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)
    assert nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) == high_mw
    for refused_mw in (low_mw - 1, high_mw + 1):
        with pytest.raises(nvml.NVMLError_InvalidArgument):
            nvml.nvmlDeviceSetPowerManagementLimit(handle, refused_mw)
    assert nvml.nvmlDeviceGetPowerManagementLimit(handle) == 300_000


def test_an_administrator_interferes(nvml, handle, fake):
    gpu = fake.gpu(0)
    gpu.settle_s = 0
    nvml.nvmlDeviceSetGpuLockedClocks(handle, 1200, 1200)
    gpu.locked_mhz = (600, 600)
    assert sm_clock_mhz(handle) == 600
    gpu.locked_mhz = None
    assert sm_clock_mhz(handle) == 1980
    gpu.sm_clock_mhz = 345
    gpu.event_reasons = 0x40
    assert sm_clock_mhz(handle) == 345
    assert nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) == 0x40
    gpu.sm_clock_mhz = None
    assert sm_clock_mhz(handle) == 1980


def test_energy_is_the_integral_of_power(nvml, handle, fake):
    gpu = fake.gpu(0)
    gpu.counter_update_s, gpu.settle_s = 0.001, 0.1
    start = gpu._look()
    nvml.nvmlDeviceSetGpuLockedClocks(handle, 600, 600)
    change_ns = gpu._look().change_ns
    time.sleep(0.15)
    end = gpu._look()
    unlocked_s, locked_s = (change_ns - start.t_ns) * 1e-9, (end.t_ns - change_ns) * 1e-9
    expected_j = power_w(1980) * unlocked_s + power_w(600) * locked_s
    assert end.energy_j - start.energy_j == pytest.approx(expected_j)
    energy_mj = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    assert end.energy_j - 1 < energy_mj / 1000 < gpu.energy_j


def read_energy_field(handle):
    field = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION])
    assert field[0].nvmlReturn == 0
    return field[0].timestamp, field[0].value.ullVal


def test_the_counter_is_updated_now_and_then_and_says_when(nvml, handle, fake):
    seen, begin_s = {}, time.monotonic()

    def has_seen_enough():
        seen[read_energy_field(handle)] = True
        return len(seen) == 6

    wait_until(has_seen_enough, timeout_s=30.0, poll_s=0.002)
    assert time.monotonic() - begin_s > 4 * 0.1, "it changes more often than it should"
    updates = list(seen)[1:]
    for (t_us, energy_mj), (next_us, next_mj) in itertools.pairwise(updates):
        periods = (next_us - t_us) / 100_000
        assert periods == pytest.approx(round(periods), abs=0.05)
        power = (next_mj - energy_mj) / (next_us - t_us) * 1000
        assert power == pytest.approx(power_w(1980), rel=0.05)
    assert 0 <= time.time() - updates[-1][0] / 1e6 < 1


def test_the_time_of_an_update_is_not_that_of_the_call(handle, fake):
    period_s = fake.gpu(0).counter_update_s
    time.sleep(1.5 * period_s - time.monotonic() % period_s)
    update_s = read_energy_field(handle)[0] / 1e6 - (time.time() - time.monotonic())
    off_s = (update_s + period_s / 2) % period_s - period_s / 2
    assert off_s == pytest.approx(0, abs=0.005)


def test_counter_stuck_and_reset(nvml, handle, fake):
    gpu = fake.gpu(0)
    gpu.counter_update_s = 0.001
    gpu.counter_stuck = True
    stuck = read_energy_field(handle)
    time.sleep(0.01)
    assert read_energy_field(handle) == stuck
    gpu.counter_stuck = False
    time.sleep(0.01)
    assert read_energy_field(handle) > stuck
    gpu.reset_counter()
    assert nvml.nvmlDeviceGetTotalEnergyConsumption(handle) < 500_000
    assert gpu.counter_j <= gpu.energy_j < 500


def test_power_fields(nvml, handle):
    fields = nvml.nvmlDeviceGetFieldValues(handle, [185, 186, 1])
    assert [field.nvmlReturn for field in fields] == [0, 0, nvml.NVML_ERROR_NOT_SUPPORTED]
    assert {field.value.uiVal for field in fields[:2]} == {int(power_w(1980) * 1000)}


# --- scripted faults ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (1, pynvml.NVMLError_Uninitialized),
        (2, pynvml.NVMLError_InvalidArgument),
        (3, pynvml.NVMLError_NotSupported),
        (4, pynvml.NVMLError_NoPermission),
        (10, pynvml.NVMLError_Timeout),
        (15, pynvml.NVMLError_GpuIsLost),
        (18, pynvml.NVMLError_LibRmVersionMismatch),
        (999, pynvml.NVMLError_Unknown),
    ],
)
def test_codes_become_exceptions_for_one_gpu_only(nvml, handle, fake, code, error):
    fake.gpu(0).fail("set", code)
    with pytest.raises(error):
        nvml.nvmlDeviceSetGpuLockedClocks(handle, 900, 900)
    nvml.nvmlDeviceSetGpuLockedClocks(nvml.nvmlDeviceGetHandleByIndex(1), 900, 900)
    nvml.nvmlDeviceResetGpuLockedClocks(handle)
    assert [fake.gpu(index).locked_mhz for index in (0, 1)] == [None, (900, 900)]


def outcomes(call, count):
    results = []
    for _ in range(count):
        try:
            call()
            results.append(0)
        except pynvml.NVMLError as error:
            results.append(error.value)
    return results


def test_faults_may_begin_late_and_end(nvml, handle, fake):
    fake.gpu(0).fail("power", 10, after=2, times=3)
    assert outcomes(lambda: nvml.nvmlDeviceGetPowerUsage(handle), 7) == [0, 0, 10, 10, 10, 0, 0]
    fake.gpu(0).fail("power", 10)
    assert outcomes(lambda: nvml.nvmlDeviceGetPowerUsage(handle), 3) == [10, 10, 10]
    fake.gpu(0).fail("power", 0)
    assert outcomes(lambda: nvml.nvmlDeviceGetPowerUsage(handle), 1) == [0]
    assert fake.gpu(0).calls("power") == fake.gpu(0).calls("read") == 11


def test_faults_of_whole_groups(nvml, handle, fake):
    gpu = fake.gpu(0)
    reads = [
        lambda: sm_clock_mhz(handle),
        lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle),
        lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        lambda: nvml.nvmlDeviceGetName(handle),
        lambda: nvml.nvmlDeviceGetFieldValues(handle, [83]),
    ]
    gpu.fail("read", 999)
    assert [outcomes(read, 1) for read in reads] == [[999]] * 5
    nvml.nvmlDeviceSetGpuLockedClocks(handle, 900, 900)
    gpu.fail("read", 0)
    gpu.fail("any", 15)
    assert outcomes(lambda: nvml.nvmlDeviceResetGpuLockedClocks(handle), 1) == [15]
    assert outcomes(lambda: nvml.nvmlDeviceGetHandleByUUID(gpu.uuid), 1) == [15]
    assert gpu.locked_mhz == (900, 900)


def test_a_failing_field_leaves_the_others(nvml, handle, fake):
    fake.gpu(0).fail("energy", 3)
    fields = nvml.nvmlDeviceGetFieldValues(handle, [83, 186])
    assert [field.nvmlReturn for field in fields] == [3, 0]
    assert [fake.gpu(0).calls(group) for group in ("energy", "power", "read")] == [1, 1, 1]
    assert fake.gpu(0).calls("any") == 2, "finding the GPU, and this one"


def test_init_faults(nvml, fake):
    calls = fake.init_calls
    fake.fail_init(18, times=1)
    assert outcomes(nvml.nvmlInit, 2) == [18, 0]
    assert fake.init_calls == calls + 2
    nvml.nvmlShutdown()
    fake.delay_init(0.05)
    start_s = time.monotonic()
    nvml.nvmlInit()
    assert time.monotonic() - start_s >= 0.05
    nvml.nvmlShutdown()


def test_a_lost_state_file_is_a_lost_gpu(nvml, handle, fake):
    fake.path.unlink()
    with pytest.raises(nvml.NVMLError_GpuIsLost):
        nvml.nvmlDeviceGetPowerUsage(handle)


def test_a_hanging_call_blocks_nobody_else_and_can_be_released(nvml, handle, fake):
    gpu = fake.gpu(0)
    gpu.delay("set", 3600)
    thread = threading.Thread(
        target=nvml.nvmlDeviceSetGpuLockedClocks, args=(handle, 900, 900), daemon=True
    )
    thread.start()
    wait_until(lambda: gpu.calls("set") == 1)
    nvml.nvmlDeviceGetPowerUsage(handle)
    assert gpu.locked_mhz is None
    gpu.delay("set", 0)
    thread.join(5)
    assert gpu.locked_mhz == (900, 900)


def test_the_log_tells_every_setter_call(nvml, handle, fake):
    fake.gpu(0).fail("set", 4, after=1)
    nvml.nvmlDeviceSetGpuLockedClocks(handle, 900, 1200)
    outcomes(lambda: nvml.nvmlDeviceSetPowerManagementLimit(handle, 300_000), 1)
    nvml.nvmlDeviceResetGpuLockedClocks(handle)
    log = fake.log()
    limit = "nvmlDeviceSetPowerManagementLimit"
    expected = [(SET, (900, 1200), 0), (limit, (300_000,), 4), (RESET, (), 0)]
    assert [(entry.function, entry.args, entry.rc) for entry in log if entry.rc == 0] == [
        expected[0],
        expected[2],
    ]
    assert [(entry.function, entry.args, entry.rc) for entry in log] == expected
    assert {(entry.pid, entry.uuid) for entry in log} == {(os.getpid(), fake.gpu(0).uuid)}
    assert sorted(log, key=lambda entry: entry.t_ns) == log


# --- other drivers, other processes ---------------------------------------------------------------


def test_an_old_driver(nvml, fake, tmp_path):
    use_in_pynvml(build(tmp_path, old_driver=True))
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    with pytest.raises(nvml.NVMLError_FunctionNotFound):
        nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    with pytest.raises(nvml.NVMLError_FunctionNotFound):
        nvml.nvmlDeviceGetTemperatureV(handle, 0)
    assert nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) == 0
    fields = nvml.nvmlDeviceGetFieldValues(handle, [83, 185, 186])
    assert [field.nvmlReturn for field in fields] == [0, 3, 3]


def test_killed_writers_leave_it_usable(fake, library_dir):
    code = """if True:
        import itertools, pynvml
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        for k in itertools.count():
            clock_mhz = 210 + 15 * (k % 118)
            pynvml.nvmlDeviceSetGpuLockedClocks(handle, clock_mhz, clock_mhz)
    """
    gpu = fake.gpu(0)
    environment = {**os.environ, **fake.env(library_dir)}
    for round_number in range(8):
        calls = gpu.calls("set")
        writer = subprocess.Popen([sys.executable, "-c", code], env=environment)
        wait_until(lambda before=calls: gpu.calls("set") > before, timeout_s=20)
        time.sleep(0.001 * round_number)
        writer.send_signal(signal.SIGKILL)
        writer.wait(10)
        low_mhz, high_mhz = gpu.locked_mhz
        assert low_mhz == high_mhz
        assert low_mhz in SM_CLOCKS_MHZ
    logged = len(fake.log())
    assert 0 <= gpu.calls("set") - logged <= 8, "at most the call under way is not in the log"
    run_python(
        "import pynvml as n; n.nvmlInit();"
        "n.nvmlDeviceResetGpuLockedClocks(n.nvmlDeviceGetHandleByIndex(0))",
        fake,
        library_dir,
    )
    assert gpu.locked_mhz is None


def test_concurrent_processes_lose_no_update(fake, library_dir):
    code = """if True:
        import pynvml
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        for _ in range(2000):
            pynvml.nvmlDeviceGetPowerUsage(handle)
    """
    environment = {**os.environ, **fake.env(library_dir)}
    readers = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [reader.wait(30) for reader in readers] == [0, 0, 0]
    assert fake.gpu(0).calls("power") == 6000


# --- the controller -------------------------------------------------------------------------------


def test_the_state_is_kept_when_opened_again(fake):
    fake.gpu(1).locked_mhz = (900, 900)
    again = FakeNvml(fake.path, gpus=5)
    assert len(again) == 2
    assert again.gpu(1).locked_mhz == (900, 900)


def test_gpus_can_be_described_and_added(tmp_path):
    fake = FakeNvml(tmp_path / "gpus", uuids=["GPU-a", "GPU-b"], names=["NVIDIA A", "NVIDIA B"])
    added = fake.add_gpu(uuid="GPU-c")
    assert (added.index, len(fake)) == (2, 3)
    assert [fake.gpu(index).uuid for index in range(3)] == ["GPU-a", "GPU-b", "GPU-c"]
    assert fake.gpu(1).name == "NVIDIA B"
    with pytest.raises(IndexError, match="GPU 3 asked, there are 3"):
        fake.gpu(3)
    for _ in range(5):
        fake.add_gpu()
    with pytest.raises(ValueError, match="at most 8"):
        fake.add_gpu()

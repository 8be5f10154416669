"""From the GPU names of CUDA and Ray to NVML UUIDs; libcuda is a fake, compiled here."""

import shutil
import subprocess
from dataclasses import dataclass

import pytest

from agft_ray.errors import GpuNotSupportedError, GpuUnavailableError
from agft_ray.gpu import identity
from agft_ray.gpu.identity import cuda_uuids, resolve, visible_uuids

A = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
B = "GPU-8932f000-0000-4106-c12f-20bd9faed9f6"
C = "GPU-c7a1e4a2-5b0e-4d4a-9d11-0123456789ab"


@dataclass(frozen=True)
class Listed:
    index: int
    uuid: str | None
    model: str | None = "NVIDIA A100"
    mig_uuids: tuple[str, ...] = ()


ALIKE = [Listed(0, A), Listed(1, B), Listed(2, C)]
UNLIKE = [Listed(0, A), Listed(1, B, "NVIDIA T4")]


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch):
    monkeypatch.setattr(identity, "cuda_uuids", lambda: None)


@pytest.mark.parametrize(
    ("ids", "uuids"),
    [
        ([], ()),
        (["0"], (A,)),
        (["2", "1"], (C, B)),
        ([A], (A,)),
        (["GPU-c"], (C,)),
        (["GPU-8932f9", "0002"], (A, C)),
    ],
)
def test_resolve(ids, uuids):
    assert resolve(ids, ALIKE, pci_bus_order=False) == uuids
    assert resolve(ids, ALIKE, pci_bus_order=True) == uuids


def test_numbers_go_by_nvmls_index_not_by_position():
    assert resolve(["0"], ALIKE[::-1], pci_bus_order=False) == (A,)


def test_numbers_of_unlike_gpus_need_the_pci_order():
    assert resolve(["1", "0"], UNLIKE, pci_bus_order=True) == (B, A)
    with pytest.raises(GpuNotSupportedError) as refusal:
        resolve(["1"], UNLIKE, pci_bus_order=False)
    for words in ("'1'", "NVIDIA A100, NVIDIA T4", "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES"):
        assert words in str(refusal.value)
    assert resolve(["GPU-8932f0"], UNLIKE, pci_bus_order=False) == (B,)


def test_numbers_are_refused_while_a_gpu_does_not_answer():
    # CUDA leaves the broken one out, and so may number those behind it otherwise than NVML.
    devices = [Listed(0, None, None), Listed(1, A), Listed(2, B)]
    for order in (False, True):
        with pytest.raises(GpuNotSupportedError, match="do not answer"):
            resolve(["1"], devices, pci_bus_order=order)
        assert resolve([B], devices, pci_bus_order=order) == (B,)


def test_a_whole_uuid_that_begins_another_is_no_abbreviation():
    devices = [Listed(0, "GPU-fake-1"), Listed(1, "GPU-fake-10")]
    assert resolve(["GPU-fake-1"], devices, pci_bus_order=False) == ("GPU-fake-1",)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (["3"], GpuUnavailableError, "'3' .* has 3"),
        (["GPU-77"], GpuUnavailableError, f"'GPU-77' .*{A}"),
        (["GPU-8932f"], GpuNotSupportedError, f"'GPU-8932f' .*{A}, {B}"),
        (["MIG-1c"], GpuUnavailableError, "'MIG-1c' "),
        ([f"MIG-{A}/1/0", A], GpuNotSupportedError, f"'MIG-{A}/1/0' and '{A}' "),
        (["0", A], GpuNotSupportedError, f"'0' and '{A}' "),
        (["1", "0", "1"], GpuNotSupportedError, "'1' and '1' "),
        ([""], GpuNotSupportedError, "'' "),
        (["-1"], GpuNotSupportedError, "'-1' "),
        (["1.0"], GpuNotSupportedError, r"'1\.0' "),
        (["²"], GpuNotSupportedError, "'²' "),
        (["gpu0"], GpuNotSupportedError, "'gpu0' "),
    ],
)
def test_resolve_refuses(ids, error, words):
    with pytest.raises(error, match=words) as refusal:
        resolve(ids, ALIKE, pci_bus_order=True)
    assert type(refusal.value) is error


def test_nothing_is_there():
    with pytest.raises(GpuUnavailableError, match="has 0"):
        resolve(["0"], [], pci_bus_order=False)
    with pytest.raises(GpuUnavailableError, match="has none"):
        resolve([A], [], pci_bus_order=False)


# -- what a process sees ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [("", ()), ("NoDevFiles", ()), ("1", (B,)), ("2, 0", (C, A)), (f"{B},GPU-c7", (B, C))],
)
def test_visible_uuids_by_the_environment(visible, uuids):
    assert visible_uuids({"CUDA_VISIBLE_DEVICES": visible}, ALIKE) == uuids


def test_unset_means_all_that_answer():
    assert visible_uuids({}, [*UNLIKE, Listed(2, None, None)]) == (A, B)


def test_the_order_comes_from_the_environment():
    environ = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible_uuids(environ, UNLIKE) == (B,)
    for order in ({}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}):
        with pytest.raises(GpuNotSupportedError, match="PCI_BUS_ID"):
            visible_uuids({"CUDA_VISIBLE_DEVICES": "1"} | order, UNLIKE)


def test_cuda_knows_better_than_the_numbers(monkeypatch):
    monkeypatch.setattr(identity, "cuda_uuids", lambda: (B,))
    assert visible_uuids({"CUDA_VISIBLE_DEVICES": "0"}, UNLIKE) == (B,)


@pytest.mark.parametrize("answer", [(A,), (A, C), ()])
def test_an_answer_of_cuda_that_does_not_fit_is_not_taken(monkeypatch, answer):
    # Too few GPUs (it stops at the first bad id), or one NVML does not have (a MIG instance).
    monkeypatch.setattr(identity, "cuda_uuids", lambda: answer)
    with pytest.raises(GpuNotSupportedError, match="'0' may mean another"):
        visible_uuids({"CUDA_VISIBLE_DEVICES": "0,1"}, UNLIKE)


M = "MIG-41b35014-542c-5f72-9c8f-000000000001"


@pytest.mark.parametrize("name", [f"MIG-{A}/1/0", M])
def test_a_mig_instance_is_its_physical_gpu(monkeypatch, name):
    monkeypatch.setattr(identity, "cuda_uuids", lambda: (C,))
    devices = [Listed(0, A, mig_uuids=(M,)), Listed(1, B)]
    assert visible_uuids({"CUDA_VISIBLE_DEVICES": name}, devices) == (A,)


def test_two_instances_of_one_gpu_are_one_gpu():
    assert resolve([f"MIG-{A}/1/0", f"MIG-{A}/2/0"], ALIKE, pci_bus_order=False) == (A,)


# -- CUDA ------------------------------------------------------------------------------------------

FAKE_LIBCUDA = """
/* A fake: GPU i has a UUID of sixteen octets i + 1; the environment says which call fails. */
#include <stdlib.h>
#include <string.h>
static int initialised;
static int result(const char *call) {
    const char *failing = getenv("FAKE_CUDA_FAILS");
    return !initialised ? 3 : failing && !strcmp(failing, call) ? 999 : 0;
}
int cuInit(unsigned flags) { initialised = 1; return result("cuInit") ? 100 : flags != 0; }
int cuDeviceGetCount(int *count) {
    *count = atoi(getenv("FAKE_CUDA_GPUS"));
    return result("cuDeviceGetCount");
}
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 1; return result("cuDeviceGet"); }
int GET_UUID(unsigned char *octets, int device) {
    memset(octets, device, 16);
    return result("uuid");
}
"""


def octets(number):
    return "GPU-{0}{0}{0}{0}-{0}{0}-{0}{0}-{0}{0}-{0}{0}{0}{0}{0}{0}".format(f"{number:02x}")


@pytest.fixture(scope="module", params=["cuDeviceGetUuid", "cuDeviceGetUuid_v2"])
def libcuda(request, tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the fake libcuda with")
    path = tmp_path_factory.mktemp("cuda") / f"{request.param}.so"
    options = ["-shared", "-fPIC", f"-DGET_UUID={request.param}", "-x", "c", "-o", str(path), "-"]
    subprocess.run([compiler, *options], input=FAKE_LIBCUDA, text=True, check=True)
    return str(path)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_cuda_uuids(libcuda, monkeypatch, count):
    monkeypatch.setenv("FAKE_CUDA_GPUS", str(count))
    assert cuda_uuids(libcuda) == tuple(octets(number) for number in range(1, count + 1))


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "uuid"])
def test_cuda_that_fails_says_nothing(libcuda, monkeypatch, call):
    monkeypatch.setenv("FAKE_CUDA_GPUS", "2")
    monkeypatch.setenv("FAKE_CUDA_FAILS", call)
    assert cuda_uuids(libcuda) is None


def test_no_cuda(tmp_path):
    assert cuda_uuids(str(tmp_path / "libcuda.so.1")) is None

"""The zeusd backend, against tests/fake_zeusd.py: a fake, since zeusd could not be built here."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from agft_ray.errors import (
    GpuArgumentError,
    GpuError,
    GpuLostError,
    GpuNotSupportedError,
    GpuPermissionError,
    GpuTransientError,
    GpuUnavailableError,
)
from agft_ray.gpu.nvml.errors import gpu_error
from agft_ray.gpu.zeusd.backend import (
    ZeusdClient,
    ZeusdGpu,
    ZeusdWriter,
    normalised_pci_address,
    resolve_index,
)
from agft_ray.gpu.zeusd.errors import not_answered

TESTS = Path(__file__).parents[3]
sys.path[:0] = [str(TESTS), str(TESTS / "fake_nvml")]

import fake_zeusd  # noqa: E402
from fake_nvml import FakeNvml, build  # noqa: E402
from fake_zeusd import GROUPS, FakeZeusd, MemoryGpu  # noqa: E402

NOBODY = 65534
WRITES = {
    "lock": lambda client: client.lock_sm_clocks(0, 600, 900),
    "reset": lambda client: client.reset_sm_clocks(0),
    "power": lambda client: client.set_power_limit(0, 250),
}
lock = WRITES["lock"]


@pytest.fixture
def folder():
    """A folder with a short path, as Unix sockets need, which any user may search."""
    with tempfile.TemporaryDirectory(prefix="zd") as name:
        os.chmod(name, 0o711)
        yield Path(name)


@pytest.fixture
def path(folder):
    return str(folder / "zeusd.sock")


@pytest.fixture
def zeusd(path):
    with FakeZeusd(path) as zeusd:
        yield zeusd


@pytest.fixture
def client(zeusd):
    return ZeusdClient(zeusd.server_address)


@pytest.fixture
def make_token(folder):
    def make(token="secret", mode=0o640):
        path = folder / "token"
        path.write_text(token)
        path.chmod(mode)
        return str(path)

    return make


@contextlib.contextmanager
def unprivileged():
    """Run as nobody, to whom file modes apply; as ourselves if we are nobody special."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(uid)


@contextlib.contextmanager
def zeusd_process(path, *options, **environment):
    process = subprocess.Popen(
        [sys.executable, TESTS / "fake_zeusd.py", "--socket", path, *options],
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        assert select.select([process.stdout], [], [], 10)[0], "the fake did not start"
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class TestWrites:
    def test_lock_and_reset(self, zeusd, client):
        client.lock_sm_clocks(0, 600, 900)
        assert zeusd.gpus[0].locked_mhz == (600, 900)
        client.reset_sm_clocks(0)
        assert zeusd.gpus[0].locked_mhz is None

    def test_power_limit_in_watts(self, zeusd, client):
        client.set_power_limit(0, 250.5)
        assert zeusd.gpus[0].power_limit_w == 250.5

    def test_they_wait_for_the_outcome_and_name_one_gpu(self, path):
        with FakeZeusd(path, gpus=[MemoryGpu(), MemoryGpu()]) as zeusd:
            ZeusdClient(path).lock_sm_clocks(1, 600, 900)
        route = "/gpu/set_gpu_locked_clocks?gpu_ids=1&min_clock_mhz=600&max_clock_mhz=900"
        assert zeusd.requests == [("POST", f"{route}&block=true", None)]
        assert [gpu.locked_mhz for gpu in zeusd.gpus] == [None, (600, 900)]

    def test_the_writer_is_for_one_gpu(self, path):
        with FakeZeusd(path, gpus=[MemoryGpu(), MemoryGpu()]) as zeusd:
            writer = ZeusdWriter(ZeusdClient(path, "/token"), 1)
            assert writer.target() == {
                "backend": "zeusd",
                "path": path,
                "index": 1,
                "token_path": "/token",
            }
            writer = ZeusdWriter(ZeusdClient(path), 1)
            writer.lock_sm_clocks(600, 900)
            writer.set_power_limit(200)
            assert zeusd.gpus[1] == MemoryGpu(locked_mhz=(600, 900), power_limit_w=200)
            writer.reset_sm_clocks()
            assert zeusd.gpus == [MemoryGpu(), MemoryGpu(power_limit_w=200)]

    def test_chunked_replies(self, zeusd, client):
        zeusd.faults.chunked = True
        assert client.discover().enabled_groups == GROUPS
        client.lock_sm_clocks(0, 600, 900)
        zeusd.gpus[0].failing_code = 3
        with pytest.raises(GpuNotSupportedError, match=f": 400: .*{fake_zeusd.NVML_ERRORS[3][1]}"):
            lock(client)


class TestRefusals:
    @pytest.mark.parametrize(
        ("code", "status", "error"),
        [
            (2, 400, GpuArgumentError),
            (3, 400, GpuNotSupportedError),
            (4, 403, GpuPermissionError),
            (6, 500, GpuTransientError),
            (9, 500, GpuNotSupportedError),
            (10, 500, GpuTransientError),
            (12, 500, GpuNotSupportedError),
            (13, 500, GpuNotSupportedError),
            (15, 500, GpuLostError),
            (16, 500, GpuLostError),
            (17, 500, GpuNotSupportedError),
            (18, 500, GpuNotSupportedError),
            (24, 500, GpuArgumentError),
            (28, 500, GpuUnavailableError),
            (999, 500, GpuTransientError),
        ],
    )
    @pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
    def test_nvml_codes(self, zeusd, client, write, code, status, error):
        zeusd.gpus[0].failing_code = code
        with pytest.raises(error, match=f": {status}: GPU 0: ") as caught:
            write(client)
        assert type(caught.value) is error
        message = str(caught.value)
        assert f"zeusd on {client.socket_path}: POST /gpu/" in message
        assert fake_zeusd.NVML_ERRORS[code][1] in message, "the daemon's own words"
        assert ("CAP_SYS_ADMIN" in message) is (error is GpuPermissionError)
        assert ("restart zeusd" in message) is (code == 18), "the driver was replaced"

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (301, GpuNotSupportedError),
            (400, GpuNotSupportedError),
            (401, GpuPermissionError),
            (403, GpuPermissionError),
            (404, GpuNotSupportedError),
            (405, GpuNotSupportedError),
            (408, GpuTransientError),
            (500, GpuTransientError),
            (502, GpuTransientError),
            (503, GpuTransientError),
        ],
    )
    @pytest.mark.parametrize("body", ["", "plain words", '{"error": "words"}', "[1]", "{}", "\xff"])
    def test_statuses(self, zeusd, client, status, error, body):
        zeusd.faults.reply = (status, body)
        with pytest.raises(error, match=f": {status}: .") as caught:
            lock(client)
        assert type(caught.value) is error

    def test_power_limits_out_of_range(self, client):
        with pytest.raises(GpuArgumentError, match=r"power_limit_mw=99000.*invalid"):
            client.set_power_limit(0, 99)

    def test_unknown_gpu(self, client):
        with pytest.raises(GpuNotSupportedError, match=r"POST /gpu/.*\b3 "):
            client.reset_sm_clocks(3)

    def test_a_query_that_the_daemon_does_not_know(self, client):
        with pytest.raises(GpuNotSupportedError, match="unknown field `watts`"):
            client._write("set_power_limit", 0, watts=3)

    def test_group_off(self, path):
        with FakeZeusd(path, disabled=["gpu-control"]):
            client = ZeusdClient(path)
            for call in [*WRITES.values(), ZeusdClient.check_control]:
                with pytest.raises(GpuNotSupportedError, match="--enable gpu-control"):
                    call(client)

    @pytest.mark.parametrize("code", fake_zeusd.NVML_ERRORS)
    def test_a_code_means_the_same_as_without_the_daemon(self, zeusd, client, code):
        zeusd.gpus[0].failing_code = code
        with pytest.raises(GpuError) as caught:
            lock(client)
        own = gpu_error(code, function="nvmlDeviceSetGpuLockedClocks", gpu="GPU-0", text="")
        assert type(caught.value) is type(own)

    def test_words_of_other_versions_of_its_nvml_binding(self, zeusd, client):
        for words in ("device fell off the bus or has otherwise become inacessible",):
            zeusd.faults.reply = (500, words)
            with pytest.raises(GpuLostError):
                lock(client)

    def test_a_long_explanation_is_cut(self, zeusd, client):
        zeusd.faults.reply = (500, "x" * 100_000)
        with pytest.raises(GpuTransientError) as caught:
            lock(client)
        assert len(str(caught.value)) < 1000


class TestAuthentication:
    """Group on and authentication on; the cells of token missing, wrong, wrong scope, right."""

    @pytest.fixture
    def path(self, folder):
        tokens = {"secret": list(GROUPS), "reader": ["gpu-read"]}
        with FakeZeusd(str(folder / "zeusd.sock"), tokens=tokens) as self.zeusd:
            yield self.zeusd.server_address

    @pytest.mark.parametrize(
        ("token", "words"),
        [
            (None, "401: .*token_path"),
            ("wrong", "401: .*token_path"),
            ("reader", "403: .*'gpu-control'"),
        ],
    )
    @pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
    def test_refused(self, path, make_token, write, token, words):
        client = ZeusdClient(path, make_token(token) if token else "")
        with pytest.raises(GpuPermissionError, match=words):
            write(client)
        assert self.zeusd.gpus == [MemoryGpu()]

    @pytest.mark.parametrize(
        ("token", "words"),
        [(None, "401"), ("wrong", "401"), ("reader", r"has the scopes \[gpu-read\]")],
    )
    def test_check_control_says_so_beforehand(self, path, make_token, token, words):
        client = ZeusdClient(path, make_token(token) if token else "")
        with pytest.raises(GpuPermissionError, match=words):
            client.check_control()

    def test_right(self, path, make_token):
        client = ZeusdClient(path, make_token())
        lock(client)
        client.check_control()
        assert client.whoami_scopes() == GROUPS
        assert self.zeusd.gpus[0].locked_mhz == (600, 900)
        assert self.zeusd.requests[0][2] == "Bearer secret"

    def test_discovery_needs_and_sends_no_token(self, path, make_token):
        discovery = ZeusdClient(path, make_token("x", mode=0o644)).discover()
        assert discovery.auth_required
        assert self.zeusd.requests == [("GET", "/discover", None)]

    def test_a_rotated_token_is_used_at_once(self, path, make_token):
        client = ZeusdClient(path, make_token("old"))
        with pytest.raises(GpuPermissionError):
            lock(client)
        make_token("secret\n")
        lock(client)

    def test_the_token_is_in_no_message(self, path, make_token):
        for token, mode in [("hidden", 0o640), ("hidden", 0o644), ("hidden words", 0o640)]:
            with pytest.raises(GpuPermissionError) as caught:
                lock(ZeusdClient(path, make_token(token, mode)))
            assert "hidden" not in str(caught.value)


def test_without_authentication_there_are_no_scopes(client):
    assert client.whoami_scopes() is None
    client.check_control()


class TestTokenFile:
    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o440, 0o400, 0o660])
    def test_modes_accepted(self, client, make_token, mode):
        lock(ZeusdClient(client.socket_path, make_token(mode=mode)))

    @pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o666, 0o777])
    def test_modes_refused(self, zeusd, client, make_token, mode):
        path = make_token(mode=mode)
        with pytest.raises(GpuPermissionError, match=rf"{path}.*mode {mode:o}.*chmod 640"):
            lock(ZeusdClient(client.socket_path, path))
        assert zeusd.requests == []

    @pytest.mark.parametrize(
        "content", ["", " \n", "two words", "a\r\nX-Evil: 1", "\x00", "é", "x" * 7 + "\x7f"]
    )
    def test_contents_refused(self, zeusd, client, make_token, content):
        path = make_token(content)
        with pytest.raises(GpuPermissionError, match="holds one token"):
            lock(ZeusdClient(client.socket_path, path))
        assert zeusd.requests == []

    def test_missing(self, client, folder):
        with pytest.raises(GpuPermissionError, match="No such file"):
            lock(ZeusdClient(client.socket_path, str(folder / "absent")))

    def test_not_readable(self, client, make_token):
        path = make_token(mode=0o600)
        with unprivileged():
            if os.access(path, os.R_OK, effective_ids=True):
                pytest.skip("not root: the file is our own")
            with pytest.raises(GpuPermissionError, match=r"Permission denied.*may read"):
                lock(ZeusdClient(client.socket_path, path))

    def test_not_a_file(self, client, folder):
        os.mkfifo(folder / "fifo", 0o600)
        for path in (folder / "fifo", folder):
            folder.chmod(0o700)
            with pytest.raises(GpuPermissionError, match="must be a file"):
                lock(ZeusdClient(client.socket_path, str(path)))


class TestNoAnswer:
    def test_no_socket(self, path):
        with pytest.raises(GpuTransientError, match=f"zeusd .*{path} .*No such file"):
            ZeusdClient(path).discover()

    def test_a_killed_daemon_and_its_stale_socket(self, path):
        with zeusd_process(path, "--memory") as process:
            client = ZeusdClient(path)
            lock(client)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert os.path.exists(path)
            with pytest.raises(GpuTransientError, match=f"zeusd .*{path} .*refused"):
                lock(client)
        with zeusd_process(path, "--memory"):
            lock(client)

    def test_a_socket_that_is_not_ours_to_open(self, folder):
        path = str(folder / "closed.sock")
        with FakeZeusd(path, socket_mode=0o600) as zeusd:
            if os.geteuid():
                os.chmod(path, 0)
            with (
                unprivileged(),
                pytest.raises(GpuPermissionError, match=f"{path}.*--socket-permissions 660"),
            ):
                lock(ZeusdClient(path))
        assert zeusd.requests == []

    def test_a_hanging_daemon_is_waited_for_no_longer_than_the_timeout(self, zeusd, client):
        zeusd.faults.delay_s = 60.0
        client = ZeusdClient(client.socket_path, timeout_s=0.2)
        start_s = time.monotonic()
        with pytest.raises(GpuTransientError, match=r"no reply within 0\.2 s"):
            lock(client)
        assert 0.2 <= time.monotonic() - start_s < 20.0

    @pytest.mark.parametrize("chunked", [False, True])
    def test_a_daemon_that_dies_in_mid_reply(self, zeusd, client, chunked):
        zeusd.faults.chunked, zeusd.faults.cut = chunked, True
        with pytest.raises(GpuTransientError, match=r"connection ended after \d+ bytes"):
            client.discover()

    def test_a_reply_that_is_not_http(self):
        error = not_answered("GET /discover", "/socket", 2.0, ValueError("not HTTP/1: 'SSH-2.0'"))
        assert type(error) is GpuTransientError
        assert re.fullmatch(r"zeusd on /socket: GET /discover: .*'SSH-2\.0'", str(error))

    def test_a_path_too_long_for_a_socket(self):
        with pytest.raises(GpuNotSupportedError, match="107 bytes"):
            ZeusdClient("/" + "x" * 107)


class TestDiscovery:
    def test_current(self, client):
        discovery = client.discover()
        assert discovery.gpus == (ZeusdGpu(0, "NVIDIA A40", "0000:01:00.0"),)
        assert discovery.enabled_groups == GROUPS
        assert not discovery.auth_required

    @pytest.mark.parametrize(
        ("shape", "gpu"),
        [("no-pci", ZeusdGpu(0, "NVIDIA A40", None)), ("gpu-ids", ZeusdGpu(0, None, None))],
    )
    def test_older_daemons(self, path, shape, gpu):
        with FakeZeusd(path, shape=shape):
            client = ZeusdClient(path)
            assert client.discover().gpus == (gpu,)
            client.check_control()

    @pytest.mark.parametrize(
        "body", ["", "<html>", "[]", "3", "{}", '{"gpus": [{}]}', '{"gpus": 3}', '{"gpu_ids": []}']
    )
    def test_something_else_than_zeusd(self, zeusd, client, body):
        zeusd.faults.reply = (200, body)
        with pytest.raises(GpuNotSupportedError, match=r"GET /discover.*check socket_path"):
            client.discover()

    def test_no_such_route(self, zeusd, client):
        zeusd.faults.reply = (404, "")
        with pytest.raises(GpuNotSupportedError, match="upgrade"):
            client.discover()


@dataclass(frozen=True)
class Device:
    uuid: str | None
    index: int
    model: str | None
    pci_address: str | None


class TestWhichGpu:
    """The host has an A40 and two L4s; a container may see fewer of them."""

    GPUS = (
        MemoryGpu("NVIDIA A40", "0000:01:00.0"),
        MemoryGpu("NVIDIA L4", "0000:41:00.0"),
        MemoryGpu("NVIDIA L4", "0001:c1:00.0"),
    )

    @pytest.fixture
    def shape(self):
        return "current"

    @pytest.fixture
    def client(self, path, shape):
        with FakeZeusd(path, gpus=list(self.GPUS), shape=shape):
            yield ZeusdClient(path)

    @pytest.mark.parametrize(
        ("address", "expected"),
        [
            ("0000:01:00.0", 0),
            ("00000000:41:00.0", 1),
            ("00000001:C1:00.0", 2),
            ("0001:C1:00.0", 2),
        ],
    )
    def test_by_pci_address(self, client, address, expected):
        found = resolve_index(client, pci_address=address, index=0, model="NVIDIA L4", count=1)
        assert found == expected

    def test_an_address_the_daemon_does_not_have(self, client):
        with pytest.raises(
            GpuNotSupportedError, match=r"0000:c1:00\.0, .*0000:01:00\.0, 0000:41:00\.0"
        ):
            resolve_index(client, pci_address="0000:C1:00.0", index=0, model="NVIDIA A40", count=3)

    @pytest.mark.parametrize("shape", ["current", "no-pci"])
    def test_by_index_where_all_agrees(self, client, shape):
        address = None if shape == "current" else "0000:77:00.0"
        found = resolve_index(client, pci_address=address, index=1, model="NVIDIA L4", count=3)
        assert found == 1

    @pytest.mark.parametrize("shape", ["no-pci"])
    @pytest.mark.parametrize(
        ("index", "model", "count"),
        [(1, "NVIDIA L4", 2), (0, "NVIDIA L4", 3), (3, "NVIDIA L4", 3), (1, None, 3)],
    )
    def test_by_index_only_where_all_agrees(self, client, index, model, count):
        with pytest.raises(GpuNotSupportedError, match=r"do not settle.*upgrade zeusd"):
            resolve_index(client, pci_address=None, index=index, model=model, count=count)

    @pytest.mark.parametrize("shape", ["gpu-ids"])
    @pytest.mark.parametrize("model", ["NVIDIA L4", None])
    def test_never_by_index_without_models(self, client, model):
        with pytest.raises(GpuNotSupportedError, match="upgrade zeusd"):
            resolve_index(client, pci_address=None, index=1, model=model, count=3)

    def test_for_device(self, client):
        devices = [
            Device(None, 0, None, None),
            Device("GPU-b", 1, "NVIDIA L4", "00000001:C1:00.0"),
        ]
        assert ZeusdWriter.for_device(client, "GPU-b", devices).target()["index"] == 2
        with pytest.raises(GpuUnavailableError, match="GPU-c"):
            ZeusdWriter.for_device(client, "GPU-c", devices)

    def test_normalised_addresses(self):
        assert normalised_pci_address("00000000:0A:00.0") == "0000:0a:00.0"
        assert normalised_pci_address("00010000:0a:00.0") == "10000:0a:00.0"


def test_it_is_light():
    """Imported by the clock guard: no module of http.client's weight."""
    code = (
        "import sys, agft_ray.gpu.zeusd.backend;"
        " heavy = {'http.client', 'email', 'ssl', 'dataclasses',"
        " 'inspect', 'numpy', 'pydantic', 'pynvml'}; print(heavy & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=TESTS.parent
    )
    assert result.stdout.strip() == "set()"


def test_an_unprivileged_client_sets_the_clocks_of_the_fake_nvml(path, folder):
    """The whole way: client, daemon process, pynvml, state file."""
    nvml = FakeNvml(folder / "gpus", gpus=2)
    environment = nvml.env(build(folder))
    with zeusd_process(path, **environment):
        client = ZeusdClient(path)
        found = client.discover().gpus[1]
        device = Device("GPU-1", 0, found.model, found.pci_address)
        with unprivileged():
            writer = ZeusdWriter.for_device(client, "GPU-1", [device])
            writer.lock_sm_clocks(900, 900)
        assert [nvml.gpu(i).locked_mhz for i in range(2)] == [None, (900, 900)]
        with unprivileged():
            writer.set_power_limit(350)
            writer.reset_sm_clocks()
        assert nvml.gpu(1).locked_mhz is None
        assert nvml.gpu(1).power_limit_w == 350
        nvml.gpu(1).fail("set", 15)
        with pytest.raises(GpuLostError, match="fallen off the bus"):
            writer.lock_sm_clocks(900, 900)

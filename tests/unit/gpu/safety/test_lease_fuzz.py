"""Whatever lies where a lease's files should be: reset, or refused by name; no crash, no hang."""

import contextlib
import json
import os
import random
import signal
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agft_ray.errors import GpuError, GpuPermissionError, LeaseHeldError
from agft_ray.gpu.safety import record as lease_record
from agft_ray.gpu.safety.lease import force, leases, sweep
from agft_ray.gpu.safety.record import DamagedRecordError, Paths, read_record
from unit.gpu.safety.lease_tools import acquire, lock_clocks, locked_mhz, make_gpu, simulated_target


@pytest.fixture(autouse=True)
def no_hang():
    def hangs(*_):
        raise AssertionError("it hangs")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Thousands of records, and no power cut."""
    monkeypatch.setattr(lease_record.os, "fsync", lambda fd: None)


@pytest.fixture
def path(tmp_path):
    return make_gpu(tmp_path / "gpu.json")


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "leases"


@pytest.fixture
def record(directory, path):
    """A dead owner's record, as bytes."""
    lease = acquire(directory, path)
    lease.abandon()
    return Path(lease.record_path).read_bytes()


@pytest.fixture
def paths(directory):
    return Paths.of(directory, "GPU-0")


def assert_next_owner_resets(directory, path, paths, content):
    Path(paths.record).write_bytes(content)
    lock_clocks(path)
    acquire(directory, path).abandon()
    assert locked_mhz(path) is None, content


def test_a_record_truncated_anywhere(directory, path, paths, record):
    for length in range(len(record)):
        assert_next_owner_resets(directory, path, paths, record[:length])
    kept = [each for each in os.listdir(directory) if ".corrupt-" in each]
    assert len(kept) == 3


def test_a_record_with_flipped_bits(directory, path, paths, record):
    generator = random.Random(1)
    for _ in range(400):
        content = bytearray(record)
        for _ in range(generator.choice([1, 1, 1, 2, 8])):
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        assert_next_owner_resets(directory, path, paths, bytes(content))


def not_ours(path, content):
    path.write_bytes(content)
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 65534, -1)


def a_socket(path, content):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))


def a_link(path, content):
    elsewhere = path.with_name("elsewhere")
    elsewhere.write_bytes(content)
    path.symlink_to(elsewhere)


SPECIAL = {
    "of somebody else": not_ours,
    "a link": a_link,
    "a dangling link": lambda path, content: path.symlink_to("nowhere"),
    "a FIFO": lambda path, content: os.mkfifo(path),
    "a directory": lambda path, content: path.mkdir(),
    "a socket": a_socket,
}
STRANGE = {
    "huge": lambda content: content + b" " * 10_000_000,
    "NaN": lambda content: content.replace(b'"fence": ', b'"fence": NaN, "x": '),
    "deep": lambda content: b"[" * 4000,
    "a list": lambda content: b"[1]",
    "null": lambda content: b"null",
    "not UTF-8": lambda content: b"\xff\xfe",
    "a long number": lambda content: b"1" * 4000,
}


@pytest.mark.parametrize("make", [*SPECIAL, *STRANGE])
def test_a_record_that_is_none_is_set_aside(directory, path, paths, record, make):
    os.unlink(paths.record)
    if make in SPECIAL:
        SPECIAL[make](Path(paths.record), record)
    else:
        Path(paths.record).write_bytes(STRANGE[make](record))
    lock_clocks(path)
    assert leases(directory)[0].damaged
    with pytest.raises(DamagedRecordError):
        read_record(paths)
    acquire(directory, path).release()
    assert locked_mhz(path) is None
    assert sum(".corrupt-" in each for each in os.listdir(directory)) == 1


@pytest.mark.parametrize("make", [*SPECIAL, *STRANGE])
def test_a_record_that_is_none_is_swept_by_its_uuid(directory, paths, record, make):
    os.unlink(paths.record)
    if make in SPECIAL:
        SPECIAL[make](Path(paths.record), record)
    else:
        Path(paths.record).write_bytes(STRANGE[make](record))
    targets = []
    [(uuid, outcome)] = sweep(directory, restore=targets.append)
    assert uuid == "GPU-0"
    assert not isinstance(outcome, Exception)
    assert targets[0]["backend"] == "nvml"
    assert sweep(directory) == []


@pytest.mark.parametrize("make", SPECIAL)
def test_a_lock_that_is_none_is_refused_by_name(directory, path, paths, record, make):
    os.unlink(paths.lock)
    SPECIAL[make](Path(paths.lock), b"")
    lock_clocks(path)
    with pytest.raises(GpuPermissionError, match=rf"GPU-0\.lock must be .*uid {os.geteuid()}\b"):
        acquire(directory, path)
    [(_, outcome)] = sweep(directory)
    assert isinstance(outcome, GpuPermissionError)
    assert not leases(directory)[0].held
    assert locked_mhz(path) == 900
    assert read_record(paths) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"target": None},
        {"target": {}},
        {"target": simulated_target("/x", "GPU-1")},
        {"target": simulated_target("/x\0") | {"path": "a\0b"}},
        {"pid": True},
        {"pid": -1},
        {"pid": 1.5},
        {"fence": 2**62},
        {"fence": None},
        {"owner": 7},
        {"owner": "\x1b[2J"},
        {"create_time": "x"},
        {"guard_pid": "x"},
        {"boot_id": 7},
        {"format": "agft_ray lease 2"},
    ],
)
def test_a_record_of_the_wrong_content_is_damaged_even_with_the_right_checksum(
    directory, paths, record, changes
):
    fields = json.loads(record) | changes
    del fields["crc32"]
    content = lease_record._encode(fields | {"crc32": 0})
    crc32 = lease_record.binascii.crc32(lease_record._encode(fields))
    Path(paths.record).write_bytes(content.replace(b'"crc32": 0', b'"crc32": %d' % crc32))
    with pytest.raises(DamagedRecordError):
        read_record(paths)


def test_a_record_of_our_pid_that_began_at_another_time_is_a_dead_owners(directory, path, paths):
    lease = acquire(directory, path)
    record = read_record(paths)
    lease.abandon()
    lease_record.write_record(paths, record._replace(create_time=record.create_time - 5))
    lock_clocks(path)
    assert not leases(directory)[0].owner_runs
    acquire(directory, path).release()
    assert locked_mhz(path) is None


def test_no_reset_while_the_lock_is_held_whatever_the_record_says(directory, path, paths, record):
    lease = acquire(directory, path)
    lock_clocks(path)
    for content in [record[:50], b"", record.replace(b"GPU-0", b"GPU-1"), record]:
        Path(paths.record).write_bytes(content)
        assert sweep(directory) == []
        with pytest.raises(LeaseHeldError):
            acquire(directory, path)
        assert locked_mhz(path) == 900
    lease.release()


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_bytes_are_a_damaged_record_and_no_bar(directory, record, paths, content):
    Path(paths.record).write_bytes(content)
    Path(paths.bar).write_bytes(content)
    with pytest.raises(DamagedRecordError):
        read_record(paths)
    assert lease_record.barred_s(paths) == 0
    assert leases(directory)[0].damaged


def test_files_of_other_names_are_nobodys_lease(directory, record):
    for name in ("x.json.corrupt-1", "GPU 0.json", "..json", "notes.txt", "é.json"):
        (directory / name).write_bytes(record)
    assert [info.uuid for info in leases(directory)] == ["GPU-0"]


def test_force_copes_with_a_damaged_record(directory, path, paths, record):
    Path(paths.record).write_bytes(b"{")
    targets = []
    force(directory, "GPU-0", restore=targets.append)
    assert targets[0]["backend"] == "nvml"
    with pytest.raises(GpuError, match="barred"):
        acquire(directory, path)

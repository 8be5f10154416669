"""What was learned, kept in a file and read with suspicion."""

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from agft_ray.actors import memory as module
from agft_ray.actors.memory import MAX_FILES, Learned, Memory
from agft_ray.policy.experience import PriorKey

KEY = PriorKey("RTX A6000", "m", 1, "mixed", "none", "edp", 2.0, 1, 1, "agft")
LEARNED = Learned(KEY, 5000, {"schema": 1, "bandit": {"counts": [1, 2.5, 1e300]}})


@pytest.fixture
def memory(tmp_path):
    return Memory(tmp_path / "leases", "app#llm#r1")


def path_of(memory):
    return memory._path


def test_it_remembers(memory, caplog):
    assert memory.load(KEY) is None
    assert memory.save(LEARNED)
    assert memory.load(KEY) == LEARNED
    newer = dataclasses.replace(LEARNED, windows=5001)
    assert memory.save(newer)
    assert memory.load(KEY) == newer
    assert len(list(path_of(memory).parent.iterdir())) == 1
    memory.forget()
    assert memory.load(KEY) is None
    memory.forget()
    assert caplog.records == []


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PriorKey)])
def test_another_key_is_another_thing(memory, field):
    memory.save(LEARNED)
    value = getattr(KEY, field)
    other = f"{value}x" if isinstance(value, str) else value + 1
    assert memory.load(dataclasses.replace(KEY, **{field: other})) is None
    assert memory.load(KEY) == LEARNED


def test_another_replica_does_not_take_it_up(memory, tmp_path):
    memory.save(LEARNED)
    other = Memory(tmp_path / "leases", "app#llm#r2")
    assert other.load(KEY) is None
    path_of(memory).rename(path_of(other))
    assert other.load(KEY) is None


def test_a_file_cut_off_anywhere_is_not_taken_up(memory):
    memory.save(LEARNED)
    whole = path_of(memory).read_bytes()
    for length in range(len(whole)):
        path_of(memory).write_bytes(whole[:length])
        assert memory.load(KEY) is None


def test_a_flipped_bit_anywhere_is_found(memory):
    memory.save(LEARNED)
    whole = path_of(memory).read_bytes()
    for at in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path_of(memory).write_bytes(damaged)
        assert memory.load(KEY) is None


def test_what_is_no_file_of_ours_is_not_read(memory, tmp_path):
    memory.save(LEARNED)
    path = path_of(memory)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert memory.load(KEY) is None
    path.unlink()
    os.mkfifo(path)
    assert memory.load(KEY) is None


def test_too_much_is_neither_written_nor_read(memory, monkeypatch):
    memory.save(LEARNED)
    monkeypatch.setattr(module, "MAX_BYTES", 50)
    assert memory.load(KEY) is None
    assert not memory.save(LEARNED)


def test_as_much_as_allowed_is_kept_and_a_byte_more_is_not(memory, monkeypatch):
    memory.save(LEARNED)
    size = len(path_of(memory).read_bytes().partition(b"\n")[2])
    monkeypatch.setattr(module, "MAX_BYTES", size)
    assert memory.save(LEARNED)
    assert memory.load(KEY) == LEARNED
    monkeypatch.setattr(module, "MAX_BYTES", size - 1)
    assert not memory.save(LEARNED)


@pytest.mark.parametrize(("version", "is_read"), [(1, True), (0, False), (2, False)])
def test_a_file_is_read_in_the_format_of_today_alone(memory, version, is_read):
    memory.save(LEARNED)
    values = {
        "format": version,
        "replica": "app#llm#r1",
        "key": dataclasses.asdict(KEY),
        "windows": LEARNED.windows,
        "policy": LEARNED.policy,
    }
    body = json.dumps(values)
    path_of(memory).write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
    assert memory.load(KEY) == (LEARNED if is_read else None)


def test_a_file_of_another_user_is_not_taken_up(memory, monkeypatch):
    memory.save(LEARNED)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert memory.load(KEY) is None


def test_while_one_save_is_under_way_another_is_not_begun(memory, monkeypatch):
    begun, newer = [], dataclasses.replace(LEARNED, windows=1)

    def slow(descriptor):
        monkeypatch.undo()
        begun.append(pool.submit(memory.save, newer).result(timeout=10))

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(module.os, "fsync", slow)
        assert memory.save(LEARNED)
    assert begun == [False]
    assert memory.load(KEY) == LEARNED
    assert memory.save(LEARNED), "the next one is"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_is_no_json_is_refused_and_the_file_before_it_stays(memory, value):
    memory.save(LEARNED)
    assert not memory.save(dataclasses.replace(LEARNED, policy={"value": value}))
    assert memory.load(KEY) == LEARNED


def test_a_directory_that_cannot_be_made_is_told_once(tmp_path, caplog):
    (tmp_path / "leases").write_text("a file")
    memory = Memory(tmp_path / "leases", "r1")
    for _ in range(3):
        assert not memory.save(LEARNED)
    assert len(caplog.records) == 1
    assert memory.load(KEY) is None


def test_a_directory_that_others_may_write_to_is_not_used(memory, caplog):
    memory.save(LEARNED)
    path_of(memory).parent.chmod(0o777)
    assert not memory.save(LEARNED)
    assert "0700" in caplog.text


def test_files_of_replicas_that_never_come_back_do_not_pile_up(tmp_path):
    for number in range(MAX_FILES + 5):
        memory = Memory(tmp_path / "leases", f"r{number}")
        assert memory.save(LEARNED)
    assert len(list(path_of(memory).parent.iterdir())) == MAX_FILES
    assert memory.load(KEY) == LEARNED

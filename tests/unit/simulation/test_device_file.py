import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agft_ray.errors import ConfigError, GpuLostError
from agft_ray.simulation import device_file
from agft_ray.simulation.device_file import DeviceFile, now_s, request_reset

DESCRIPTION = {
    "uuid": "GPU-0",
    "profile": "rtx_a6000",
    "model": "llama-3.1-8b",
    "speed": 10.0,
    "seed": 3,
    "counter_update_s": 0.1,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gpu.json"


def content(path):
    return json.loads(Path(path).read_text())


def test_the_file_is_private_readable_json_of_one_page(path):
    DeviceFile.create(path, **DESCRIPTION)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == device_file.SIZE
    assert content(path).items() >= DESCRIPTION.items()
    assert content(path)["locked_sm_clock_mhz"] is None
    assert len(path.read_text().splitlines()) > len(DESCRIPTION)
    assert os.listdir(path.parent) == ["gpu.json"]


def test_time_runs_from_creation_at_its_speed(path):
    DeviceFile.create(path, **DESCRIPTION)
    state = content(path)
    before_s, wall_s = now_s(state), time.monotonic()
    assert 0 <= before_s < 10
    time.sleep(0.02)
    assert now_s(state) - before_s == pytest.approx(10 * (time.monotonic() - wall_s), abs=0.1)


def test_creating_it_again_keeps_the_state(path):
    with DeviceFile.create(path, **DESCRIPTION).transaction() as state:
        state["energy_j"] = 12.5
    origin_s = content(path)["origin_s"]
    DeviceFile.create(path, **DESCRIPTION)
    assert (content(path)["energy_j"], content(path)["origin_s"]) == (12.5, origin_s)


def test_another_description_is_refused_naming_every_difference(path):
    DeviceFile.create(path, **DESCRIPTION)
    with pytest.raises(ConfigError) as caught:
        DeviceFile.create(path, **DESCRIPTION | {"speed": 1.0, "seed": 4})
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["speed", "seed"]


def test_a_file_from_before_the_last_boot_is_replaced(path, monkeypatch):
    monkeypatch.setattr(device_file, "_boot_id", lambda: "earlier")
    with DeviceFile.create(path, **DESCRIPTION).transaction() as state:
        state["locked_sm_clock_mhz"] = 900
    monkeypatch.undo()
    DeviceFile.create(path, **DESCRIPTION)
    assert content(path)["locked_sm_clock_mhz"] is None
    assert os.listdir(path.parent) == ["gpu.json"]


def test_a_file_of_something_else_is_never_overwritten(path):
    path.write_text("precious")
    with pytest.raises(ConfigError, match=r"path: taken.*holds something else"):
        DeviceFile.create(path, **DESCRIPTION)
    assert path.read_text() == "precious"


def test_symbolic_links_are_refused(path, tmp_path):
    target = tmp_path / "target.json"
    DeviceFile.create(target, **DESCRIPTION)
    path.symlink_to(target)
    with pytest.raises(ConfigError, match="taken"):
        DeviceFile.create(path, **DESCRIPTION)
    with pytest.raises(GpuLostError, match="symbolic link"):
        request_reset(path)


def test_a_missing_or_damaged_file_is_a_lost_gpu(path):
    with pytest.raises(GpuLostError, match="No such file"):
        request_reset(path)
    path.write_text('{"format": 1')
    with pytest.raises(GpuLostError, match="something else"):
        request_reset(path)


def test_a_description_longer_than_a_page_is_refused(path, tmp_path):
    with pytest.raises(ConfigError, match="shorten paths"):
        DeviceFile.create(path, **DESCRIPTION, history_path=tmp_path / ("x" * 4000))
    assert os.listdir(tmp_path) == []


def test_a_failing_body_changes_nothing_and_frees_the_lock(path):
    shared = DeviceFile.create(path, **DESCRIPTION)

    def fail():
        with shared.transaction() as state:
            state["seed"] = 99
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with shared.transaction() as state:
        assert state["seed"] == 3


def test_transactions_of_threads_exclude_each_other(path):
    shared = DeviceFile.create(path, **DESCRIPTION)

    def count():
        for _ in range(100):
            with shared.transaction() as state:
                state["clock_calls"] += 1

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(path)["clock_calls"] == 400


def test_a_writer_killed_at_any_moment_leaves_a_readable_file_and_no_lock(path):
    shared = DeviceFile.create(path, **DESCRIPTION)
    script = f"""
from agft_ray.simulation.device_file import DeviceFile
shared = DeviceFile({str(path)!r})
while True:
    with shared.transaction() as state:
        state["clock_calls"] += 1
        state["filler"] = "x" * (state["clock_calls"] % 2000)
"""
    for round_ in range(8):
        calls = content(path)["clock_calls"]
        writer = subprocess.Popen([sys.executable, "-c", script])
        deadline_s = time.monotonic() + 5
        while content(path)["clock_calls"] == calls and time.monotonic() < deadline_s:
            time.sleep(0.001)
        time.sleep(0.0007 * round_)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        with shared.transaction() as state:
            assert state["clock_calls"] > calls
            assert len(state["filler"]) == state["clock_calls"] % 2000


def test_request_reset_marks_the_change_to_default_clocks(path):
    shared = DeviceFile.create(path, **DESCRIPTION)
    with shared.transaction() as state:
        state["locked_sm_clock_mhz"] = 900
        state["pending_clock_changes"] = [[-1.0, 1200], [1e9, 900]]
    before_s = now_s(content(path))
    request_reset(path)
    state = content(path)
    due, (at_s, clock) = state["pending_clock_changes"]
    assert due == [-1.0, 1200]
    assert clock is None
    assert before_s <= at_s - device_file.RESET_DELAY_S <= now_s(state)
    assert (state["locked_sm_clock_mhz"], state["clock_calls"]) == (None, 1)


def test_resets_without_end_do_not_fill_the_file(path, monkeypatch):
    DeviceFile.create(path, **DESCRIPTION)
    wall_s = [time.monotonic()]
    monkeypatch.setattr(device_file.time, "monotonic", lambda: wall_s[0])
    for _ in range(500):
        request_reset(path)
        wall_s[0] += 1.0
    assert len(content(path)["pending_clock_changes"]) == 1
    assert content(path)["clock_calls"] == 500


def test_the_module_is_light():
    script = (
        "import sys, agft_ray.simulation.device_file as _;"
        "print(sorted({'numpy', 'pydantic', 'yaml', 'asyncio', 'pathlib'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-S", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(device_file.__file__).parents[2])},
    ).stdout
    assert output.strip() == "[]"

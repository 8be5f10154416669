"""The NVML thread keeps its deadlines whatever NVML does, and recovers."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest

from agft_ray.errors import GpuTransientError
from agft_ray.gpu.nvml.thread import NvmlThread


@pytest.fixture
def thread():
    return NvmlThread()


@pytest.fixture
def hang(thread):
    """Let the thread hang in a call until the event is set; the event is set in the end."""
    event = threading.Event()
    with pytest.raises(GpuTransientError, match=r"^read of GPU-0 did not .* within 0.05 s"):
        thread.call(event.wait, deadline_s=0.05, name="read of GPU-0")
    yield event
    event.set()


def recovered(thread):
    for _ in range(500):
        try:
            return thread.call(lambda: "fine", deadline_s=1.0)
        except GpuTransientError:
            time.sleep(0.002)
    return "stuck"


def test_result_and_arguments(thread):
    assert thread.call(divmod, 7, 2, deadline_s=1.0) == (3, 1)


def test_every_call_runs_on_one_and_the_same_daemon_thread(thread):
    first, second = (thread.call(threading.current_thread, deadline_s=1.0) for _ in range(2))
    assert first is second is not threading.current_thread()
    assert first.daemon


@pytest.mark.parametrize("error", [ValueError, TimeoutError, KeyboardInterrupt, SystemExit])
def test_exceptions_pass_and_the_thread_survives_them(thread, error):
    def fail():
        raise error("as it was")

    with pytest.raises(error, match="as it was"):
        thread.call(fail, deadline_s=1.0)
    assert thread.call(divmod, 7, 2, deadline_s=1.0) == (3, 1)


def test_a_hung_call_returns_within_its_deadline(thread):
    event = threading.Event()
    begin_s = time.monotonic()
    with pytest.raises(GpuTransientError, match=r"^wait .* 0\.1 s"):
        thread.call(event.wait, deadline_s=0.1)
    assert 0.1 <= time.monotonic() - begin_s < 5.0
    event.set()


def test_while_stuck_calls_fail_at_once_and_say_since_when(thread, hang):
    ran = []
    begin_s = time.monotonic()
    for _ in range(100):
        with pytest.raises(GpuTransientError, match=r"read of GPU-0 .*\b\d+\.\d s"):
            thread.call(ran.append, 1, deadline_s=5.0)
    assert time.monotonic() - begin_s < 5.0
    hang.set()
    assert recovered(thread) == "fine"
    assert ran == []


def test_it_recovers_and_a_late_result_is_nobodys(thread, hang):
    hang.set()
    assert recovered(thread) == "fine"
    assert thread.call(lambda: "new", deadline_s=1.0) == "new"


def test_waiting_for_a_turn_counts_towards_the_deadline_and_never_runs_later(thread):
    event, ran = threading.Event(), []
    hung = threading.Thread(target=lambda: thread.call(event.wait, deadline_s=60.0))
    hung.start()
    while thread._running is None:
        time.sleep(0.001)
    begin_s = time.monotonic()
    with pytest.raises(GpuTransientError, match=r"^append .* turn .* 0\.1 s"):
        thread.call(ran.append, 1, deadline_s=0.1)
    assert time.monotonic() - begin_s < 5.0
    event.set()
    hung.join()
    assert recovered(thread) == "fine"
    assert ran == []


def test_concurrent_callers_each_get_their_own_result_one_at_a_time(thread):
    inside, overlaps, results = [], [], {}

    def job(k):
        inside.append(k)
        time.sleep(0.001)
        overlaps.append(len(inside))
        inside.pop()
        return k

    def ask(k):
        results[k] = [thread.call(job, (k, i), deadline_s=60.0) for i in range(10)]

    callers = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == {k: [(k, i) for i in range(10)] for k in range(8)}
    assert set(overlaps) == {1}


def test_a_forked_child_has_a_thread_of_its_own(thread, hang):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(thread.call(lambda: 7, deadline_s=5.0))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_hung_call_does_not_keep_the_interpreter_from_exiting():
    code = (
        "import time; from agft_ray.gpu.nvml.thread import NvmlThread\n"
        "try: NvmlThread().call(time.sleep, 60.0, deadline_s=0.05)\n"
        "except Exception as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True
    )
    assert re.fullmatch(r"sleep .* 0\.05 s\n", result.stdout)
    assert result.stderr == ""

"""Waiting for what happens in another thread or process: the tests' only way to."""

import time


def within(seconds, condition, poll_s=0.005):
    """Whether the condition comes true in time."""
    deadline_s = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(poll_s)
    return True


def wait_until(condition, timeout_s=10.0, what="what was waited for", poll_s=0.005):
    """The condition's value once it is true; fails the test if it is not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"after {timeout_s} s still not: {what}"
        time.sleep(poll_s)
    return value

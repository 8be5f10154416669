"""The switch beside a live engine: what it sends, and that nothing of it harms the replica."""

import pytest

from agft_ray.actors.phase_socket import Doorbell, phase_path
from agft_ray.serve.live_switch import LiveSwitch
from agft_ray.types import Phase


@pytest.fixture
def path(tmp_path):
    return phase_path(tmp_path / "leases", "r")


@pytest.fixture
def bell(path):
    bell = Doorbell()
    bell.listen(path)
    yield bell
    bell.close()


@pytest.fixture
def switch(path):
    switch = LiveSwitch()
    switch.connect(path)
    return switch


def heard(bell):
    return bell.wait(0.0)[1]


def test_only_changes_are_sent(switch, bell):
    switch.on_empty(0.0)
    assert heard(bell) is Phase.IDLE
    switch.on_arrival(1.0)
    assert heard(bell) is Phase.PREFILL
    switch.on_arrival(1.1)
    switch.on_step(1.2, True, 1)
    assert heard(bell) is None
    switch.on_step(1.3, True, 0)
    assert heard(bell) is Phase.DECODE


def test_a_tuner_that_came_later_is_told_with_the_next_push(switch, path):
    switch.on_step(1.0, True, 0)
    bell = Doorbell()
    bell.listen(path)
    assert heard(bell) is None
    switch.repeat()
    assert heard(bell) is Phase.DECODE
    bell.close()


def test_before_it_is_connected_and_without_a_tuner_nothing_happens():
    switch = LiveSwitch()
    switch.on_arrival(0.0)
    switch.on_step(1.0, False, 0)
    switch.repeat()
    assert switch.phase is Phase.DECODE


def test_whatever_breaks_in_it_prompts_have_their_clock_and_nothing_is_raised(switch, bell):
    switch.on_empty(0.0)
    assert heard(bell) is Phase.IDLE
    switch._switch.on_step = lambda *_: 1 / 0
    switch.on_step(1.0, False, 0)
    switch.on_empty(2.0)
    switch.repeat()
    assert heard(bell) is Phase.PREFILL

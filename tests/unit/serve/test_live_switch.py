"""The switch beside a live engine: what it sends, and that nothing of it harms the replica."""

import pytest

from agft_ray.actors.phase_socket import Doorbell
from agft_ray.serve.live_switch import LiveSwitch
from agft_ray.types import Phase


@pytest.fixture
def switch(phases_at):
    switch = LiveSwitch()
    switch.connect(phases_at)
    return switch


def heard(bell):
    told = bell.wait(0.0)[1]
    return told and told.phase


def test_only_changes_are_sent(switch, bell):
    switch.on_empty()
    assert heard(bell) is Phase.IDLE
    switch.on_arrival()
    assert heard(bell) is Phase.PREFILL
    switch.on_arrival()
    switch.on_step(1)
    assert heard(bell) is None
    switch.on_step(0)
    assert heard(bell) is Phase.DECODE


def test_a_tuner_that_came_later_is_told_with_the_next_push(switch, phases_at):
    switch.on_step(0)
    bell = Doorbell()
    bell.listen(phases_at)
    assert heard(bell) is None
    switch.repeat()
    assert heard(bell) is Phase.DECODE
    bell.close()


def test_what_is_repeated_is_no_news_and_the_same_phase_again_is(switch, bell):
    switch.on_step(0)
    assert heard(bell) is Phase.DECODE
    switch.repeat()
    assert heard(bell) is None
    switch.on_arrival()
    switch.on_step(0)
    assert heard(bell) is Phase.DECODE


def test_before_it_is_connected_and_without_a_tuner_nothing_happens():
    switch = LiveSwitch()
    switch.on_arrival()
    switch.on_step(0)
    switch.repeat()
    assert switch.phase is Phase.DECODE


def test_whatever_breaks_in_it_prompts_have_their_clock_and_nothing_is_raised(switch, bell):
    switch.on_empty()
    assert heard(bell) is Phase.IDLE
    switch._switch.on_step = lambda *_: 1 / 0
    switch.on_step(0)
    switch.on_empty()
    switch.repeat()
    assert heard(bell) is Phase.PREFILL

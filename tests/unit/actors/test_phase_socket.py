"""Phases from process to process, over real sockets."""

import multiprocessing
import threading
import time

from agft_ray.actors.phase_socket import Doorbell, PhaseSender, Told, phase_path
from agft_ray.types import Phase


def heard(bell, timeout_s):
    rung, told = bell.wait(timeout_s)
    return rung, told and told.phase


def test_the_newest_of_those_that_have_come_counts(bell, phases_at):
    sender = PhaseSender(phases_at)
    for phase in (Phase.PREFILL, Phase.DECODE, Phase.IDLE):
        assert sender.send(Told(phase, 1.5))
    assert heard(bell, 5.0) == (False, Phase.IDLE)
    assert heard(bell, 0.0) == (False, None)


def test_a_phase_says_since_when_it_is(bell, phases_at):
    PhaseSender(phases_at).send(Told(Phase.DECODE, 12345.678901234))
    assert bell.wait(5.0) == (False, Told(Phase.DECODE, 12345.678901234))


def test_what_is_repeated_is_no_news(bell, phases_at):
    sender = PhaseSender(phases_at)
    for told, news in (
        (Told(Phase.DECODE, 1.0), Phase.DECODE),
        (Told(Phase.DECODE, 1.0), None),
        (Told(Phase.DECODE, 2.0), Phase.DECODE),
        (Told(Phase.PREFILL, 2.5), Phase.PREFILL),
        (Told(Phase.PREFILL, 2.5), None),
    ):
        sender.send(told)
        assert heard(bell, 0.1) == (False, news)


def test_without_a_tuner_nothing_happens(phases_at, tmp_path):
    assert not PhaseSender(phases_at).send(Told(Phase.DECODE, 1.5))
    assert list(tmp_path.iterdir()) == []


def test_a_sender_that_came_first_reaches_the_tuner_and_the_one_after_it(phases_at):
    sender = PhaseSender(phases_at)
    assert not sender.send(Told(Phase.DECODE, 1.5))
    for phase in (Phase.PREFILL, Phase.DECODE):
        bell = Doorbell()
        bell.listen(phases_at)  # the one before was killed, and left its socket
        assert sender.send(Told(phase, 1.5))
        assert heard(bell, 5.0) == (False, phase)
    bell.close()
    assert not phases_at.exists()
    assert not sender.send(Told(Phase.DECODE, 1.5))


def test_a_tuner_that_hangs_never_blocks_the_replica(bell, phases_at):
    sender, start_s = PhaseSender(phases_at), time.monotonic()
    sent = [sender.send(Told(Phase.DECODE, 1.5)) for _ in range(5000)]
    assert not all(sent)
    assert time.monotonic() - start_s < 2.0
    assert heard(bell, 1.0) == (False, Phase.DECODE)
    assert sender.send(Told(Phase.IDLE, 1.5))


def test_anything_else_is_passed_over(bell, phases_at):
    sender = PhaseSender(phases_at)
    sender.send(Told(Phase.DECODE, 1.5))
    for other in (b"", b"\0", b"\x09", b"\1\2", b"\x09" * 9, b"x" * 100):
        sender._socket.sendto(other, sender._address)
    assert heard(bell, 1.0) == (False, Phase.DECODE)


def test_other_threads_ring(bell):
    threading.Timer(0.05, bell.ring).start()
    assert heard(bell, 5.0) == (True, None)
    assert heard(bell, 0.0) == (False, None)
    bell.ring()
    assert heard(bell, 5.0) == (True, None), "also one that nobody waited for"


def test_a_directory_too_deep_for_an_address_will_do(tmp_path):
    path = phase_path(tmp_path / ("d" * 100) / "leases", "r")
    path.parent.parent.parent.mkdir()
    bell = Doorbell()
    bell.listen(path)
    assert PhaseSender(path).send(Told(Phase.DECODE, 1.5))
    assert heard(bell, 5.0) == (False, Phase.DECODE)
    bell.close()


def test_where_nobody_may_listen_the_bell_still_rings(tmp_path):
    (tmp_path / "leases").write_text("no directory")
    bell = Doorbell()
    bell.listen(phase_path(tmp_path / "leases", "r"))
    bell.ring()
    assert heard(bell, 5.0) == (True, None)
    bell.close()


def _send(path, count):
    sender = PhaseSender(path)
    for number in range(count):
        sender.send(Told(Phase.PREFILL if number % 2 else Phase.DECODE, float(number)))
        time.sleep(0.001)


def test_another_process_is_heard(bell, phases_at):
    process = multiprocessing.get_context("spawn").Process(target=_send, args=(phases_at, 200))
    process.start()
    phases, deadline_s = [], time.monotonic() + 30.0
    while (len(phases) < 50 or process.is_alive()) and time.monotonic() < deadline_s:
        _, phase = heard(bell, 0.1)
        if phase is not None:
            phases.append(phase)
    process.join()
    assert len(phases) >= 50
    assert phases[-1] is Phase.PREFILL

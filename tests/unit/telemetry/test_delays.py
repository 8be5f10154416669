"""Histograms of delays."""

from agft_ray.telemetry.delays import UPPER_MS, Delays


def test_percentiles_are_the_upper_ends_of_bins():
    delays = Delays()
    for delay_ms in (0.6, 0.6, 0.7, 0.75, 0.8, 1.2, 1.3, 4.5, 4.6, 9.0):
        delays.add(delay_ms / 1e3)
    assert [delays.percentile_ms(share) for share in (0.0, 0.4, 0.5, 0.9, 0.99)] == [
        UPPER_MS[0],
        0.75,
        1.0,
        5.0,
        10.0,
    ]
    assert Delays().percentile_ms(0.5) == 0.0


def test_what_is_beyond_all_bins_is_in_the_last():
    delays = Delays()
    delays.add(60.0)
    assert delays.counts[-1] == 1


def test_histograms_add_up():
    delays, other = Delays(), Delays()
    delays.add(0.0006)
    other.add(0.0006)
    other.add(0.004)
    delays.merge(other.counts)
    assert sum(delays.counts) == 3
    assert delays.percentile_ms(0.5) == 0.75


def test_a_row_a_bin_up_to_the_last_that_holds_any():
    delays = Delays()
    for _ in range(3):
        delays.add(0.0003)
    delays.add(0.0009)
    assert [line.split("ms")[1].split() for line in delays.lines(width=6)] == [
        ["0.0%"],
        ["75.0%", "######"],
        ["0.0%"],
        ["25.0%", "##"],
    ]
    assert Delays().lines() == []

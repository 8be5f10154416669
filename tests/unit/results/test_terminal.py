"""Progress in a log."""

from agft_ray.results.terminal import PLAIN_PERIOD_S, PlainProgress, coloured


def test_a_line_in_ten_seconds_and_the_last_one_at_the_end():
    now, written = [100.0], []
    lines = PlainProgress(written.append, lambda: now[0])
    for second in range(25):
        now[0] = 100.0 + second
        lines.show(f"at {second}")
    assert written == ["at 10", "at 20"]
    lines.end()
    lines.end()
    assert written == ["at 10", "at 20", "at 24"]


def test_what_is_to_be_seen_at_once_begins_the_period_anew():
    now, written = [0.0], []
    lines = PlainProgress(written.append, lambda: now[0])
    now[0] = PLAIN_PERIOD_S
    lines.at_once("phase")
    lines.show("run 1")
    assert written == ["phase"]
    now[0] = 2 * PLAIN_PERIOD_S
    lines.show("run 2")
    assert written == ["phase", "run 2"]


def test_colours():
    assert coloured("-1", "better") == "[green]-1[/]"
    assert coloured("+1", "worse") == "[red]+1[/]"
    assert coloured("0", "same") == "0"
    assert coloured("0", "same", same="dim") == "[dim]0[/]"

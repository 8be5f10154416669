"""How results look on a terminal, whatever command prints them."""

NO_VALUE = "—"
"""Stands where a figure does not exist."""
PLAIN_PERIOD_S = 10.0
"""Where there is no terminal, progress is a line in so many wall seconds."""

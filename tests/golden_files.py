"""Screens against files: `tests/golden/<screen>.txt` holds what a command prints, word for word.

AGFT_RAY_UPDATE_GOLDEN=1 writes the files instead; read their diff before committing it.
"""

import difflib
import os
import re
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
UPDATE = "AGFT_RAY_UPDATE_GOLDEN"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""A terminal's; FORCE_COLOR makes rich print them into files, too."""


def assert_golden(screen, text, replaced=None):
    """Fails, with a diff, where the text is not that of the screen's file.

    Args:
        screen: name of the file, without its suffix.
        text: what was printed; colours and blanks at the ends of lines do not count.
        replaced: what differs from run to run, and the placeholder that stands for it: a string,
            or a compiled pattern. Each must occur.
    """
    text = COLOURS.sub("", text)
    for changing, placeholder in (replaced or {}).items():
        pattern = changing if isinstance(changing, re.Pattern) else re.escape(changing)
        text, count = re.subn(pattern, lambda _, to=placeholder: to, text)
        assert count, f"{screen}: nothing to be replaced by {placeholder}, no {changing!r}"
    text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    path = GOLDEN / f"{screen}.txt"
    if os.environ.get(UPDATE):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    diff = difflib.unified_diff(
        expected.splitlines(), text.splitlines(), str(path), "printed now", lineterm=""
    )
    shown = "\n".join(diff)
    assert not shown, f"{shown}\n\nIf that is meant: {UPDATE}=1 pytest ... writes {path.name} anew."


def sections(screens):
    """Several variants of a screen as one text, each below its name."""
    return "\n\n".join(f"=== {name} ===\n{text.rstrip()}" for name, text in screens.items())

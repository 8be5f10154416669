"""The tests' own comparison of screens with files."""

import re
from pathlib import Path

import golden_files
import pytest
from golden_files import GOLDEN, UPDATE, assert_golden


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(golden_files, "GOLDEN", tmp_path)
    monkeypatch.delenv(UPDATE, raising=False)
    (tmp_path / "screen.txt").write_text("one\n<time>\n")
    return tmp_path


def test_the_same_text_but_for_what_changes(folder):
    assert_golden("screen", "\x1b[1;31mone\x1b[0m  \n12.5 ms", {re.compile(r"[\d.]+ ms"): "<time>"})


def test_another_text_is_shown_as_a_diff_with_the_way_to_accept_it(folder):
    with pytest.raises(AssertionError, match=rf"(?s)\n-one\n\+two\n.*{UPDATE}=1"):
        assert_golden("screen", "two\n<time>")
    with pytest.raises(AssertionError, match=r"\+anything"):
        assert_golden("absent", "anything")


def test_a_placeholder_for_nothing_is_refused(folder):
    with pytest.raises(AssertionError, match="<gone>"):
        assert_golden("screen", "one\n<time>", {"/a/path": "<gone>"})


def test_an_update_writes_the_file(folder, monkeypatch):
    monkeypatch.setenv(UPDATE, "1")
    assert_golden("screen", "two")
    assert (folder / "screen.txt").read_text() == "two\n"


def test_every_file_is_that_of_a_test(request):
    sources = (request.config.rootpath / "tests").rglob("test_*.py")
    others = (path for path in sources if path.name != Path(__file__).name)
    named = re.findall(r'assert_golden\(\s*"(\w+)"', "".join(path.read_text() for path in others))
    assert {path.stem for path in GOLDEN.iterdir()} == {*named}

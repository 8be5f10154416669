"""Every snippet of README and docs is run, or marked with the reason why it cannot be.

A mark is a comment before the snippet: `<!-- not run: needs a GPU -->`. What is marked is held to
the code all the same: YAML loads, Python compiles and its imports of ours are there, each
`agft-ray` command is one that the parser takes, and files that are named exist.
"""

import ast
import itertools
import os
import re
import shlex
import subprocess
import textwrap
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

from agft_ray.cli.app import _parser
from agft_ray.serve.checks import validate_file

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "deployments").glob("*/README.md")),
]
LANGUAGES = ("bash", "python", "yaml", "toml", "ini", "dockerfile")
MARK = re.compile(r"<!-- not run: (\S[^>]*) -->\s*$")
OURS = re.compile(r"^(configs|examples|deployments|docs)/[\w./-]+\.(yaml|py|service)$")


def snippets():
    """(place, language, text, why it is not run) of each."""
    parsers = [CodeBlockParser(language, lambda example: None) for language in LANGUAGES]
    for page in PAGES:
        document = Sybil(parsers).parse(page)
        for example in document.examples():
            text = textwrap.dedent(str(example.parsed))
            mark = MARK.search(document.text[: example.region.start].rstrip())
            place = f"{page.relative_to(ROOT)}:{example.line}"
            language = example.region.parsed and document.text[example.region.start :]
            language = re.match(r"\s*```(\w+)", language).group(1)
            yield place, language, text, mark and mark.group(1)


SNIPPETS = list(snippets())


def commands(text):
    """The words of each command of a shell snippet, comments and continued lines seen to."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        for is_operator, words in itertools.groupby(lexer, lambda word: set(word) <= set("|&;")):
            found = list(itertools.dropwhile(re.compile(r"^\w+=").match, words))
            if found and not is_operator:
                yield found


def check_command(words):
    words = words[1:] if words[0] == "sudo" else words
    if "--" in words and words[0] == "kubectl":
        words = words[words.index("--") + 1 :]
    if Path(words[0]).name == "agft-ray":
        assert _parser().parse_args(words[1:]).command
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words[1]
    for before, word in pairwise(words):
        if OURS.match(word) and before not in ("--out", ">"):
            assert (ROOT / word).exists(), f"{word} is not there"
        if before in ("run", "deploy") and word.startswith("configs/"):
            assert validate_file(ROOT / word)


def check_python(text):
    tree = compile(text, "snippet", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)
    ours = [
        node
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module.startswith("agft_ray")
    ]
    exec(compile(ast.Module(ours, []), "imports", "exec"), {})


def run(language, text):
    if language == "python":
        exec(compile(text, "snippet", "exec"), {})
    elif language == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize(
    ("language", "text", "reason"),
    [pytest.param(*rest, id=place) for place, *rest in SNIPPETS],
)
def test_snippet(language, text, reason, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("PATH", f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if language == "yaml":
        assert yaml.safe_load(text)
    elif language == "toml":
        assert tomllib.loads(text)
    elif language == "python":
        check_python(text)
    elif language == "bash":
        for words in commands(text):
            check_command(words)
    if reason is None:
        assert language in ("yaml", "toml", "python", "bash"), "say why this cannot be run"
        run(language, text)


def test_there_are_snippets_of_every_kind_and_some_are_run():
    assert {language for _, language, *_ in SNIPPETS} == set(LANGUAGES)
    assert sum(reason is None for *_, reason in SNIPPETS) >= 8


@pytest.mark.parametrize(
    "text", ["agft-ray simulate --polcy agft", "agft-ray nonsense", "serve run configs/none.yaml"]
)
def test_a_command_that_is_none_is_found(text):
    (words,) = commands(text)
    with pytest.raises((SystemExit, AssertionError)):
        check_command(words)

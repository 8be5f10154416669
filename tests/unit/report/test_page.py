"""The report: what must be in it is, nothing outside is needed, and it is the same every time."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from agft_ray.cli.app import main
from agft_ray.report.data import by_grid, load
from agft_ray.results.numbers import change_text
from agft_ray.results.record import write_runs
from agft_ray.results.spread import Spread
from unit.results.test_record import RECORD

pytest.importorskip("matplotlib", reason="a report needs the extra 'report'")
COMMAND = [
    *("agft-ray", "simulate", "--rate", "1", "--duration", "100", "--seed", "0..1", "--jobs", "1"),
    *("--policy", "agft", "--policy", "frontier", "--clock-step-mhz", "630"),
]
HEADINGS = [
    "Energy against latency",
    "Clock, power and load over time",
    "Latency distributions",
    "Learning curve",
    "Clocks chosen by load",
]


class Page(HTMLParser):
    """Collects tags, attributes and text; notes tags that are not closed."""

    void = frozenset({"meta", "br", "path", "use", "line", "rect", "circle", "link"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    assert main([*COMMAND[1:], "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def report(study):
    assert main(["report", str(study), "--out", str(study / "report.html")]) == 0
    return (study / "report.html").read_text()


def test_the_page_needs_nothing_else(report):
    assert not re.search(r"(https?:)?//\w", report)
    page = Page(report)
    assert page.open == []
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "image"}
    for _, attributes in page.tags:
        for name in ("href", "src"):
            assert attributes.get(name, "#").startswith("#")


def test_the_page_has_every_plot_the_table_and_its_origin(report):
    page = Page(report)
    text = " ".join(page.texts)
    for heading in HEADINGS:
        assert heading in text
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(HEADINGS)
    for words in ("agft", "default", "fixed:1470", "EDP of the run"):
        assert words in text
    assert " ".join(COMMAND) in text
    assert re.search(r"Seeds 0, 1; agft_ray [\d.]+.*python 3", text)
    assert "±" in text
    assert "nan" not in text.lower().split()


def test_the_page_can_be_read_by_all(report):
    page = Page(report)
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("title")
    pictures = page.all("svg")
    assert len(pictures) == len(HEADINGS)
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 10
    assert all(attributes["scope"] in ("col", "row") for attributes in page.all("th"))
    assert page.all("caption")


def test_the_same_figures_for_programs(study, report):
    content = json.loads((study / "report.json").read_text())
    (section,) = content["sections"]
    assert section["seeds"] == [0, 1]
    runs = json.loads((study / "runs.json").read_text())["runs"]
    assert {(r["policy"], r["seed"]) for r in section["runs"]} == {
        (r["policy"], r["seed"]) for r in runs
    }
    agft = next(p for p in section["policies"] if p["policy"] == "agft")
    own = [r["energy_j"] for r in runs if r["policy"] == "agft"]
    default = [r["energy_j"] for r in runs if r["policy"] == "default"]
    change = sum(100 * (a / b - 1) for a, b in zip(own, default, strict=True)) / 2
    assert agft["changes_percent"]["energy_j"]["mean"] == pytest.approx(change)
    assert f"{change_text(Spread(**agft['changes_percent']['energy_j']))} %" in report


def test_the_same_page_every_time(study, report):
    assert main(["report", str(study), "--out", str(study / "again.html")]) == 0
    assert (study / "again.html").read_text() == report


def test_records_alone_make_a_page_without_plots_over_time(study, tmp_path):
    out = tmp_path / "short.html"
    assert main(["report", str(study / "runs.json"), "--out", str(out)]) == 0
    text = out.read_text()
    assert HEADINGS[0] in text
    assert HEADINGS[1] not in text
    assert "with <code>--out DIR</code>" in text


def test_scenarios_are_kept_apart_and_names_escaped(tmp_path):
    records = [
        replace(RECORD, policy=policy, trace=trace, tpot_s=RECORD.ttft_s)
        for trace in ("a.csv", "<b>.csv")
        for policy in ("default", "agft")
    ]
    write_runs(tmp_path / "runs.json", records)
    sections, studies = load([tmp_path / "runs.json"])
    assert [len(section.records) for section in sections] == [2, 2]
    assert studies == []
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path / "runs.json"), "--out", str(out)]) == 0
    assert "&lt;b&gt;.csv" in out.read_text()
    assert "<b>.csv" not in out.read_text()


def test_records_without_latencies_make_a_table(tmp_path):
    write_runs(tmp_path / "runs.json", [RECORD])
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path / "runs.json"), "--out", str(out)]) == 0
    assert "<table>" in out.read_text()
    assert "<svg" not in out.read_text()


def test_the_fleet_is_the_sum_of_its_replicas(study):
    (section,), _ = load([study])
    windows = next(section.windows("agft"))
    grid = by_grid(windows)
    assert grid["energy_j"].sum() == pytest.approx(windows["energy_j"].sum())
    assert (grid["replicas"] == 1).all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: path.mkdir(), "runs.json"),
        (lambda path: path.write_text("{}"), "--json"),
        (lambda path: path.write_text('{"runs": []}'), "nothing to report"),
        (lambda path: None, "cannot be read"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, capsys, make, named):
    make(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert str(tmp_path / "run") in error or named == "nothing to report"
    assert not (tmp_path / "r.html").exists()


def test_the_page_must_be_html(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--out", "report.json"]) == 2
    error = capsys.readouterr().err
    assert "report.json" in error
    assert ".html" in error

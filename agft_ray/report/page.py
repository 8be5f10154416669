"""A report of simulated runs: one HTML page that needs nothing else, and a JSON file beside it."""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agft_ray import __version__
from agft_ray.files import replacing, write_json
from agft_ray.report.data import Section, load
from agft_ray.report.plots import plots
from agft_ray.results.comparison import PolicyStanding, standings
from agft_ray.results.figures import METRICS, Metric
from agft_ray.results.labels import DEFAULT
from agft_ray.results.numbers import NO_VALUE, change_text, spread_text, verdict
from agft_ray.results.spread import Spread

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #24292f; background: #fff;
  max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .3rem; }
h2 { font-size: 1.25rem; margin-top: 2.6rem; border-bottom: 1px solid #d8dee4; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .2rem; }
figure { margin: .4rem 0 1.6rem; }
figure svg { width: 100%; height: auto; }
figcaption, .note { color: #57606a; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
caption { text-align: left; color: #57606a; padding-bottom: .4rem; white-space: normal; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4; }
thead th { vertical-align: bottom; border-bottom: 2px solid #8c959f; }
tbody th, thead th:first-child { text-align: left; font-weight: 600; }
.better { color: #116329; } .worse { color: #a40e26; } .same { color: #57606a; }
pre { background: #f6f8fa; padding: .7rem .9rem; overflow-x: auto; font-size: .85rem; }
"""


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page to `out` and the same figures as JSON beside it; returns the JSON's path.

    Each file is replaced as a whole or not at all. Raises `AgftError` if a run cannot be read or
    matplotlib is missing.
    """
    sections, studies = load(runs)
    page = "".join(_page(sections, studies))
    beside = out.with_suffix(".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(beside, summary(sections, studies))
    with replacing(out) as file:
        file.write(page)
    return beside


def summary(sections: Sequence[Section], studies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows, for programs: by scenario the records, and each policy's means,
    intervals and changes against default clocks."""
    return {
        "agft_ray": __version__,
        "studies": list(studies),
        "sections": [
            {
                "title": section.title,
                "seeds": section.seeds,
                "policies": [_standing_json(standing) for standing in standings(section.records)],
                "runs": [record.to_json() for record in section.records],
            }
            for section in sections
        ],
    }


def _standing_json(standing: PolicyStanding) -> dict[str, Any]:
    return {
        "policy": standing.policy,
        "values": {name: asdict(spread) for name, spread in standing.values.items()},
        "changes_percent": {n: asdict(spread) for n, spread in standing.changes_percent.items()},
    }


def _page(sections: Sequence[Section], studies: Sequence[dict[str, Any]]) -> Iterator[str]:
    title = f"agft-ray: {sections[0].title}"
    yield (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        "<h1>Energy and latency by policy</h1>\n"
    )
    for section in sections:
        yield from _section(section)
    yield from _provenance(studies)
    yield "</main>\n</body>\n</html>\n"


def _section(section: Section) -> Iterator[str]:
    yield f"<h2>{_text(section.title)}</h2>\n"
    first = section.records[0]
    seeds = ", ".join(map(str, section.seeds)) or "none"
    yield (
        f'<p class="note">{first.requests:,} requests in {first.duration_s:,.0f} simulated seconds '
        f"(first run); seeds {seeds}.</p>\n"
    )
    yield from _table(section)
    for plot in plots(section):
        yield (
            f"<h3>{_text(plot.heading)}</h3>\n<figure>\n{plot.svg}\n"
            f"<figcaption>{_text(plot.caption)}</figcaption>\n</figure>\n"
        )
    if not section.named:
        yield (
            '<p class="note">Rows of requests and windows were not kept, so there is no plot over '
            "time; run <code>agft-ray simulate</code> with <code>--out DIR</code> and name DIR "
            "here.</p>\n"
        )


def _table(section: Section) -> Iterator[str]:
    found = standings(section.records)
    metrics = [metric for metric in METRICS if any(metric.name in s.values for s in found)]
    intervals = (
        "95 % intervals over seeds, changes paired by seed" if len(section.seeds) > 1 else ""
    )
    yield (
        '<div class="scroll" tabindex="0" role="region" aria-label="Comparison table"><table>\n'
        f"<caption>Means and change against default clocks. {intervals}</caption>\n"
        '<thead><tr><th scope="col">policy</th>'
    )
    for metric in metrics:
        unit = f"<br>{_text(metric.unit)}" if metric.unit else ""
        yield f'<th scope="col">{_text(metric.label)}{unit}</th>'
    yield "</tr></thead>\n<tbody>\n"
    for standing in found:
        yield f'<tr><th scope="row">{_text(_name(standing))}</th>'
        for metric in metrics:
            yield f"<td>{_cell(standing, metric)}</td>"
        yield "</tr>\n"
    yield "</tbody></table></div>\n"


def _name(standing: PolicyStanding) -> str:
    choices = sorted({run.choice for run in standing.runs if run.choice})
    return f"{standing.policy} ({'; '.join(choices)})" if choices else standing.policy


def _cell(standing: PolicyStanding, metric: Metric) -> str:
    spread = standing.values.get(metric.name)
    if spread is None:
        return f'<span class="same" title="does not exist">{NO_VALUE}</span>'
    value = spread_text(spread, scale=metric.scale)
    partial = standing.partial(metric.name)
    change = standing.changes_percent.get(metric.name)
    lines = [value, partial and f"({partial} runs)"]
    if change is not None and standing.policy != DEFAULT:
        lines.append(_change(change, metric))
    return "<br>".join(line for line in lines if line)


def _change(change: Spread, metric: Metric) -> str:
    kind = verdict(change, judged=metric.judged)
    return f'<span class="{kind}">{change_text(change)} %</span>'


def _provenance(studies: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "<h2>How this was made</h2>\n"
    yield f"<p>Report by agft-ray {_text(__version__)}.</p>\n"
    for study in studies:
        command = shlex.join(map(str, study.get("command", [])))
        versions = ", ".join(f"{k} {v}" for k, v in study.get("versions", {}).items())
        seeds = ", ".join(map(str, study.get("seeds", [])))
        yield f"<pre>{_text(command)}</pre>\n"
        yield f'<p class="note">Seeds {_text(seeds)}; {_text(versions)}.</p>\n'
        for note in study.get("notes", []):
            yield f'<p class="note">{_text(str(note))}</p>\n'


def _text(text: str) -> str:
    return html.escape(text)

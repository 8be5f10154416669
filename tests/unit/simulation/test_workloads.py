"""The generator against the published figures of the trace it resembles; reading and refusing."""

import itertools

import numpy as np
import pytest

from agft_ray.errors import TraceError
from agft_ray.simulation.workloads import generate_conversation, read_azure_trace, thin, until

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:15:46.6805900,374,44\n"


def cv(requests):
    gaps_s = np.diff([request.arrival_s for request in requests])
    return gaps_s.std() / gaps_s.mean()


def figures(tokens):
    return [np.mean(tokens), np.percentile(tokens, 50), np.percentile(tokens, 99)]


@pytest.fixture(scope="module")
def generated():
    return list(itertools.islice(generate_conversation(2.0, 1e9, seed=7), 60_000))


def test_generated_lengths_are_those_of_the_trace(generated):
    prompts = [request.prompt_tokens for request in generated]
    outputs = [request.output_tokens for request in generated]
    assert figures(prompts) == pytest.approx([1155, 1020, 4142], rel=0.05)
    assert figures(outputs) == pytest.approx([211, 129, 601], rel=0.05)
    assert max(p + o for p, o in zip(prompts, outputs, strict=True)) <= 8192
    assert min(*prompts, *outputs) >= 1


def test_generated_arrivals_have_the_rate_and_burstiness(generated):
    assert len(generated) / generated[-1].arrival_s == pytest.approx(2.0, rel=0.02)
    assert cv(generated) == pytest.approx(1.09, abs=0.03)


def test_generation_is_seeded_and_lengths_do_not_depend_on_the_rate():
    slow, again = (list(generate_conversation(1.0, 50.0, seed=3)) for _ in range(2))
    fast = list(generate_conversation(2.0, 25.0, seed=3))
    other = list(generate_conversation(1.0, 50.0, seed=4))
    assert slow == again
    assert slow != other
    assert [r.prompt_tokens for r in slow] == [r.prompt_tokens for r in fast]
    assert [r.arrival_s for r in slow] == pytest.approx([2 * r.arrival_s for r in fast])
    assert all(request.arrival_s < 50.0 for request in slow)


@pytest.mark.parametrize("arguments", [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_generation_needs_a_positive_rate_and_duration(arguments):
    with pytest.raises(ValueError, match="must be above 0"):
        generate_conversation(*arguments, seed=0)


def test_thinning_keeps_a_share_that_does_not_depend_on_duration(generated):
    whole = list(thin(generated, 0.25, seed=5))
    start = list(thin(generated[:1000], 0.25, seed=5))
    assert whole[: len(start)] == start
    assert len(whole) / len(generated) == pytest.approx(0.25, rel=0.05)
    assert list(thin(generated[:10], 1.0, seed=5)) == generated[:10]
    with pytest.raises(ValueError, match=r"keep: must be above 0 and at most 1, got 1\.5"):
        thin(generated, 1.5, seed=5)


def test_until_stops_before_the_duration(generated):
    assert list(until(generated, generated[10].arrival_s)) == generated[:10]


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "trace.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_reading_gives_relative_arrivals_and_row_numbers(write):
    later = "2023-11-16 18:15:50.9305900,396,109\r\n"
    rows = list(read_azure_trace(write("\ufeff" + HEADER + ROW + later)))
    assert [(r.request_id, r.prompt_tokens, r.output_tokens) for r in rows] == [
        ("1", 374, 44),
        ("2", 396, 109),
    ]
    assert [r.arrival_s for r in rows] == pytest.approx([0.0, 4.25])


def test_reading_finds_columns_by_name(write):
    content = "GeneratedTokens,Model,TIMESTAMP,ContextTokens\n44,x,2024-05-10 00:00:00+00:00,374\n"
    (request,) = read_azure_trace(write(content))
    assert (request.prompt_tokens, request.output_tokens) == (374, 44)


BROKEN = [
    ("2023-11-16 18:15:47,374\n", "must have 3 columns"),
    ("\n", "must have 3 columns"),
    ("2023-11-16 18:15:47,many,44\n", "ContextTokens: .*'many'"),
    ("2023-11-16 18:15:47,374,0\n", "GeneratedTokens: .*above 0, got '0'"),
    ("2023-11-16 18:15:47,374,-3\n", "GeneratedTokens: .*above 0, got '-3'"),
    ("2023-11-16 18:15:47,nan,44\n", "ContextTokens: .*'nan'"),
    ("yesterday,374,44\n", "TIMESTAMP: must be an ISO 8601 time, got 'yesterday'"),
    ("2023-11-16 18:15:47Z,374,44\n", "TIMESTAMP: must be an ISO 8601 time"),
    ("2023-11-16 18:15:46,374,44\n", "TIMESTAMP: must not go back"),
]


@pytest.mark.parametrize(("line", "problem"), BROKEN)
def test_a_broken_line_is_named_or_skipped(write, line, problem):
    path = write(HEADER + ROW + line + ROW)
    with pytest.raises(TraceError, match=rf"trace\.csv: line 3: {problem}"):
        list(read_azure_trace(path))
    skipped = []
    requests = list(read_azure_trace(path, strict=False, on_skip=skipped.append))
    assert [request.request_id for request in requests] == ["1", "3"]
    assert len(skipped) == 1
    assert "line 3" in skipped[0]


def test_a_byte_that_is_no_text_breaks_its_line_only(write):
    path = write((HEADER + ROW).encode() + b"\xff\xfe,1,1\n" + ROW.encode())
    assert len(list(read_azure_trace(path, strict=False))) == 2


def test_a_broken_first_row_is_not_the_origin_of_time(write):
    path = write(HEADER + "2020-01-01 00:00:00,0,1\n" + ROW)
    (request,) = read_azure_trace(path, strict=False)
    assert (request.request_id, request.arrival_s) == ("2", 0.0)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "line 1: must name the columns .*missing: TIMESTAMP, ContextTokens, GeneratedTokens"),
        ("TIMESTAMP,ContextTokens\n" + ROW, "missing: GeneratedTokens"),
        (HEADER, "holds no request"),
        (HEADER + "a,b,c\n", "holds no request"),
    ],
)
def test_a_file_without_columns_or_requests_is_always_an_error(write, content, problem):
    with pytest.raises(TraceError, match=problem):
        list(read_azure_trace(write(content), strict=False))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TraceError, match=r"absent\.csv: cannot be read: No such file"):
        list(read_azure_trace(tmp_path / "absent.csv"))


def test_the_real_trace_has_its_published_figures(conversation_trace):
    requests = list(read_azure_trace(conversation_trace))
    assert len(requests) == 19_366
    assert requests[-1].arrival_s == pytest.approx(3502, abs=0.5)
    assert cv(requests) == pytest.approx(1.09, abs=0.005)
    assert figures([r.prompt_tokens for r in requests]) == pytest.approx([1155, 1020, 4142], abs=1)
    assert figures([r.output_tokens for r in requests]) == pytest.approx([211, 129, 601], abs=1)

"""Every format read as it is documented, every broken line named, nothing held in memory."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agft_ray.errors import TraceError
from agft_ray.workloads.requests import Request
from agft_ray.workloads.traces import MAX_LINE_CHARS, find_trace, open_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE_ROW = "2023-11-16 18:15:46.6805900,374,44\n"
LENGTHS = "arrival_time_ns,input_toks,output_toks\n"
LENGTHS_ROW = "46926808,2358,531\n"


def mooncake(**changes):
    fields = {"timestamp": 27482, "input_length": 1000, "output_length": 52, "hash_ids": [46, 47]}
    return json.dumps({k: v for k, v in (fields | changes).items() if v is not None}) + "\n"


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "trace.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_azure_2023(write):
    later = "2023-11-16 18:15:50.9305900,396,109\r\n"
    rows = list(open_trace(write("\ufeff" + AZURE + AZURE_ROW + later)))
    assert rows == [Request("1", 0.0, 374, 44), Request("2", 4.25, 396, 109)]


def test_azure_2024_has_a_time_zone_and_sometimes_no_fraction(write):
    content = (
        "2024-05-10 00:00:00.009930+00:00,1,2\n"
        "2024-05-10 00:00:01+00:00,3,4\n"
        "2024-05-10 02:00:01.0099301+02:00,5,6\n"
    )
    rows = list(open_trace(write(AZURE + content)))
    assert [row.arrival_s for row in rows] == [0.0, 0.99007, 1.0]


def test_columns_are_found_by_name(write):
    content = "GeneratedTokens,Model,TIMESTAMP,ContextTokens\n44,x,2024-05-10 00:00:00+00:00,374\n"
    assert list(open_trace(write(content))) == [Request("1", 0.0, 374, 44)]


def test_lengths(write):
    rows = list(open_trace(write(LENGTHS + LENGTHS_ROW + "347938951,1034,769\r\n")))
    assert rows == [Request("1", 0.0, 2358, 531), Request("2", 0.301012143, 1034, 769)]


def test_mooncake_has_prefix_blocks(write):
    lines = [
        mooncake(),
        mooncake(timestamp=30535, input_length=1025, hash_ids=[46, 47, 2366]),
        mooncake(timestamp=30535.5, hash_ids=None, extra="ignored"),
    ]
    assert list(open_trace(write("".join(lines)))) == [
        Request("1", 0.0, 1000, 52, (46, 47)),
        Request("2", 3.053, 1025, 52, (46, 47, 2366)),
        Request("3", 3.0535, 1000, 52, ()),
    ]


BROKEN = [
    (AZURE, AZURE_ROW, "2023-11-16 18:15:47,374\n", "must have 3 columns"),
    (AZURE, AZURE_ROW, "\n", "must have 3 columns"),
    (AZURE, AZURE_ROW, "2023-11-16 18:15:47,many,44\n", "ContextTokens: .*'many'"),
    (AZURE, AZURE_ROW, "2023-11-16 18:15:47,374,0\n", "GeneratedTokens: .*above 0 .*got '0'"),
    (AZURE, AZURE_ROW, "2023-11-16 18:15:47,374,-3\n", "GeneratedTokens: .*above 0 .*got '-3'"),
    (AZURE, AZURE_ROW, "2023-11-16 18:15:47,nan,44\n", "ContextTokens: .*'nan'"),
    (AZURE, AZURE_ROW, f"2023-11-16 18:15:47,{'9' * 5000},44\n", "ContextTokens: .*below 2\\^31"),
    (AZURE, AZURE_ROW, "yesterday,374,44\n", "TIMESTAMP: must be an ISO 8601 time, got 'yester"),
    (AZURE, AZURE_ROW, "2023-11-16 18:15:47Z,374,44\n", "TIMESTAMP: must have a time zone on eve"),
    (AZURE, AZURE_ROW, "2023-11-16 18:15:46,374,44\n", r"TIMESTAMP: must not go back, is 0\.68"),
    (LENGTHS, LENGTHS_ROW, "46926807,1,1\n", "arrival_time_ns: must not go back, is 1e-09 s"),
    (LENGTHS, LENGTHS_ROW, "-1,1,1\n", "arrival_time_ns: must be a whole number of ns"),
    (LENGTHS, LENGTHS_ROW, "inf,1,1\n", "arrival_time_ns: must be a whole number of ns"),
    (LENGTHS, LENGTHS_ROW, f"{2**63},1,1\n", "arrival_time_ns: must be a whole number of ns"),
    (LENGTHS, LENGTHS_ROW, "46926808,1.5,1\n", "input_toks: .*'1.5'"),
    ("", mooncake(), "[]\n", "must be a JSON object, got"),
    ("", mooncake(), "\n", "must be a JSON object: Expecting value, at column 1"),
    ("", mooncake(), '{"timestamp": 27482,\n', "must be a JSON object: .* at column"),
    ("", mooncake(), "[" * 100_000 + "\n", "must be a JSON object"),
    ("", mooncake(), mooncake(timestamp=float("nan")), "NaN: is no number of JSON"),
    ("", mooncake(), mooncake(other=float("-inf")), "-Infinity: is no number of JSON"),
    ("", mooncake(), mooncake().replace("27482", "1e999"), "timestamp: must be a number.*got inf"),
    ("", mooncake(), mooncake(timestamp=10**400), "timestamp: must be a number"),
    ("", mooncake(), mooncake(timestamp=True), "timestamp: must be a number.*got True"),
    ("", mooncake(), mooncake(timestamp=None), "timestamp: must be a number.*and is missing"),
    ("", mooncake(), mooncake(timestamp=27481), "timestamp: must not go back, is 0.001 s before"),
    ("", mooncake(), mooncake(input_length="9"), "input_length: .*above 0 .*got '9'"),
    ("", mooncake(), mooncake(output_length=0), "output_length: .*above 0 .*got 0"),
    ("", mooncake(), mooncake(output_length=None), "output_length: .*and is missing"),
    ("", mooncake(), mooncake(hash_ids=[1, True]), "hash_ids: must be a list of whole numbers"),
    ("", mooncake(), mooncake(hash_ids=[1]), "hash_ids: must have an id for each 512.*2, got 1"),
]


@pytest.mark.parametrize(("header", "good", "line", "problem"), BROKEN)
def test_a_broken_line_is_named_or_skipped(write, header, good, line, problem):
    path = write(header + good + line + good)
    number = 3 if header else 2
    with pytest.raises(TraceError, match=rf"trace\.csv: line {number}: {problem}"):
        list(open_trace(path))
    skipped = []
    requests = list(open_trace(path, strict=False, on_skip=skipped.append))
    assert [request.request_id for request in requests] == ["1", "3"]
    assert [f"line {number}: " in message for message in skipped] == [True]


def test_a_byte_that_is_no_text_breaks_its_line_only(write):
    path = write((AZURE + AZURE_ROW).encode() + b"\xff\xfe,1,1\n" + AZURE_ROW.encode())
    assert len(list(open_trace(path, strict=False))) == 2


@pytest.mark.parametrize(
    ("header", "broken", "good"),
    [
        (AZURE, "2020-01-01 00:00:00Z,0,1\n", AZURE_ROW),
        ("", mooncake(timestamp=1, output_length=0), mooncake()),
    ],
)
def test_a_broken_first_row_is_not_the_origin_of_time(write, header, broken, good):
    (request,) = open_trace(write(header + broken + good), strict=False)
    assert (request.request_id, request.arrival_s) == ("2", 0.0)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "trace.csv: holds no request"),
        ("\n", "trace.csv: holds no request"),
        ("TIMESTAMP,ContextTokens\n" + AZURE_ROW, "line 1: .*missing: GeneratedTokens"),
        ("arrival_time_ns,output_toks\n", "line 1: .*missing: input_toks"),
        ("<html>\n", "line 1: .*JSON.*, got <html>"),
        (AZURE, "holds no request"),
        (AZURE + "a,b,c\n", "holds no request"),
        ("{}\n", "holds no request"),
        (b"\x00" * (MAX_LINE_CHARS + 1), f"line 1: .* {MAX_LINE_CHARS:,} "),
        (AZURE + AZURE_ROW + "9" * (MAX_LINE_CHARS + 1), f"line 3: .* {MAX_LINE_CHARS:,} "),
    ],
)
def test_a_file_that_is_no_trace_is_always_an_error(write, content, problem):
    with pytest.raises(TraceError, match=problem):
        list(open_trace(write(content), strict=False))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from([(AZURE, AZURE_ROW), (LENGTHS, LENGTHS_ROW), ("", mooncake())]),
    st.integers(0, 60),
    st.integers(0, 20),
    st.binary(max_size=20),
)
def test_a_damaged_line_is_never_more_than_a_trace_error(write, sample, start, length, damage):
    header, row = sample
    broken = bytearray(row.encode())
    broken[start : start + length] = damage
    path = write((header + row).encode() + broken)
    requests = list(open_trace(path, strict=False))
    assert requests[0] == next(open_trace(path))
    for request in requests:
        assert request.arrival_s >= 0
        assert min(request.prompt_tokens, request.output_tokens) >= 1


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(TraceError, match=r"absent\.csv: .*No such file"):
        list(open_trace(tmp_path / "absent.csv"))
    with pytest.raises(TraceError, match=f"{tmp_path}: .*Is a directory"):
        list(open_trace(tmp_path))


def test_memory_does_not_grow_with_the_file(write):
    path = write(LENGTHS + LENGTHS_ROW * 50_000)
    for _ in open_trace(path):  # what is allocated once
        break
    tracemalloc.start()
    assert sum(1 for _ in open_trace(path)) == 50_000
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000  # the file has 900,000


def test_a_trace_is_found_by_path_then_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGFT_RAY_DATA", str(tmp_path / "data"))
    stored = tmp_path / "data" / "traces" / "mine.csv"
    stored.parent.mkdir(parents=True)
    stored.touch()
    assert find_trace("mine.csv") == stored
    here = tmp_path / "mine.csv"
    here.touch()
    assert find_trace("mine.csv").absolute() == here
    with pytest.raises(TraceError) as error:
        find_trace("other.csv")
    words = ("other.csv: ", str(stored.parent / "other.csv"), "agft-ray fetch-data")
    assert all(word in str(error.value) for word in words)
    monkeypatch.delenv("AGFT_RAY_DATA")
    with pytest.raises(TraceError, match=r"other\.csv: .*AGFT_RAY_DATA .*agft-ray fetch-data"):
        find_trace("other.csv")


def figures(tokens):
    return [np.mean(tokens), np.percentile(tokens, 50), np.percentile(tokens, 99)]


def test_the_real_trace_has_its_published_figures(conversation_trace):
    requests = list(open_trace(conversation_trace))
    gaps_s = np.diff([request.arrival_s for request in requests])
    assert len(requests) == 19_366
    assert requests[-1].arrival_s == pytest.approx(3502, abs=0.5)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.09, abs=0.005)
    assert figures([r.prompt_tokens for r in requests]) == pytest.approx([1155, 1020, 4142], abs=1)
    assert figures([r.output_tokens for r in requests]) == pytest.approx([211, 129, 601], abs=1)

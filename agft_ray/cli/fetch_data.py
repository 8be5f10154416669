"""`agft-ray fetch-data`: the public traces, from their origin, with checksums."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray.errors import ConfigError, DownloadError
from agft_ray.results.terminal import PlainProgress

if TYPE_CHECKING:
    from agft_ray.workloads.download import OnBytes
    from agft_ray.workloads.public_traces import PublicTrace

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

MB = 1e6


def add_command(commands: Commands) -> None:
    """Add it to the parser; a command returns its exit status."""
    fetch = commands.add_parser(
        "fetch-data",
        help="get the public traces",
        description="Fetch public traces from their origin into $AGFT_RAY_DATA/traces and verify "
        "them. Without names: all whose checksum is known. A file that is there is verified and "
        "kept. Exit status 1 if one of them could not be had.",
    )
    fetch.add_argument("names", nargs="*", metavar="NAME", help="as --list shows them")
    fetch.add_argument("--list", action="store_true", help="show what there is, fetch nothing")
    fetch.add_argument("--to", type=Path, metavar="DIR", help="default: $AGFT_RAY_DATA/traces")
    fetch.add_argument("--base-url", metavar="URL", help="a mirror: files are at URL/NAME")
    fetch.add_argument(
        "--allow-unverified",
        action="store_true",
        help="fetch files whose checksum is not known here, too (1 to 2 GB)",
    )
    fetch.set_defaults(command=_fetch_data)


def _fetch_data(arguments: argparse.Namespace) -> int:
    from agft_ray.workloads.public_traces import PUBLIC_TRACES

    if arguments.list:
        print("\n".join(_described(trace) for trace in PUBLIC_TRACES))
        return 0
    traces, directory = _chosen(arguments, PUBLIC_TRACES)
    failed = False
    for trace in traces:
        url = trace.url
        if arguments.base_url is not None:
            url = f"{arguments.base_url.rstrip('/')}/{trace.name}"
        try:
            print(_get(trace, url, directory, allow_unverified=arguments.allow_unverified))
        except DownloadError as error:
            failed = True
            print(f"agft-ray: {error}", file=sys.stderr)
    return int(failed)


def _described(trace: PublicTrace) -> str:
    known = f"sha256 {trace.sha256}" if trace.sha256 else "no checksum known: --allow-unverified"
    return f"{trace.name}: {trace.what} ({trace.licence})\n  {trace.url}\n  {known}"


def _chosen(
    arguments: argparse.Namespace, traces: Sequence[PublicTrace]
) -> tuple[list[PublicTrace], Path]:
    """What to fetch and where to; raises `ConfigError` with all that is wrong with the options."""
    from agft_ray.workloads.traces import DATA_VARIABLE, data_traces

    known = {trace.name: trace for trace in traces}
    problems = [
        f"NAME: there is no {name!r}; --list shows what there is"
        for name in arguments.names
        if name not in known
    ]
    directory = arguments.to or data_traces()
    if directory is None:
        problems.append(f"--to: name a folder, or set {DATA_VARIABLE}")
    if arguments.base_url is not None and not arguments.base_url.startswith(
        ("http://", "https://")
    ):
        problems.append(
            f"--base-url: must begin with http:// or https://, got {arguments.base_url!r}"
        )
    if problems:
        raise ConfigError("fetch-data", problems)
    assert directory is not None
    if arguments.names:
        return [known[name] for name in dict.fromkeys(arguments.names)], directory
    return [t for t in traces if t.sha256 or arguments.allow_unverified], directory


def _get(trace: PublicTrace, url: str, directory: Path, *, allow_unverified: bool) -> str:
    """Fetch it unless it is there; returns what to say. Raises `DownloadError`."""
    from agft_ray.workloads.download import download, sha256_of

    path = directory / trace.name
    if path.exists():
        sha256 = sha256_of(path)
        if trace.sha256 not in (None, sha256):
            raise DownloadError(
                f"{path}: is there already, and has SHA-256 {sha256}, not {trace.sha256}; kept as "
                "it is: move it away to fetch the original"
            )
        return f"{path}: there already, {_verdict(trace, sha256)}"
    if trace.sha256 is None and not allow_unverified:
        raise DownloadError(
            f"{trace.name}: no checksum is known here, so it cannot be verified; "
            "--allow-unverified fetches it all the same"
        )
    with _progress(trace.name) as on_bytes:
        sha256 = download(trace, url, directory, on_bytes)
    return f"{path}: fetched, {_verdict(trace, sha256)}"


def _verdict(trace: PublicTrace, sha256: str) -> str:
    if trace.sha256:
        return "checksum right"
    return f"NOT verified: no checksum is known here; its SHA-256 is {sha256}"


@contextmanager
def _progress(name: str) -> Iterator[OnBytes]:
    """A bar on a terminal, else a line every few seconds; both on standard error."""
    if not sys.stderr.isatty():
        yield _plain_progress(name)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
    except ImportError:
        yield _plain_progress(name)
        return
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda received, total: bar.update(task, completed=received, total=total)


def _plain_progress(name: str) -> OnBytes:
    lines = PlainProgress(lambda line: print(line, file=sys.stderr, flush=True))

    def show(received: int, total: int | None) -> None:
        of = "" if total is None else f" of {total / MB:,.1f}"
        lines.show(f"{name}: {received / MB:,.1f}{of} MB")

    return show

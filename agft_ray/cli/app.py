"""The `agft-ray` command: its subcommands in the order in which people need them."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence

from agft_ray import __version__
from agft_ray.actors import simulate_on_ray
from agft_ray.cli import (
    bench,
    calibrate,
    completion,
    config,
    demo,
    doctor,
    fetch_data,
    plot,
    policies,
    replay,
    report,
    reset,
    simulate,
    status,
    validate,
)
from agft_ray.errors import AgftError

EXAMPLES = {
    "demo": "agft-ray demo configs/simulated.yaml --wall 120",
    "simulate": "agft-ray simulate --duration 600 --policy agft --policy fixed:1230",
    "report": "agft-ray report runs/a6000 --out report.html",
    "validate": "agft-ray validate configs/*.yaml",
    "config": "agft-ray config show simulated > my.yaml",
    "policies": "agft-ray policies agft",
    "status": "agft-ray status --watch 1",
    "doctor": "agft-ray doctor --json",
    "reset": "agft-ray reset --all --force",
    "replay": "agft-ray replay --rate 2 --duration 120 --out runs/mine",
    "plot": "agft-ray plot runs/mine --out replay.svg",
    "fetch-data": "agft-ray fetch-data azure2023_conv.csv",
    "calibrate": "agft-ray calibrate measured.csv --base rtx_a6000 --model llama-3.1-8b "
    "--card card.yaml --out mine.yaml",
    "bench": "agft-ray bench decision",
    "completion": "agft-ray completion bash > ~/.local/share/bash-completion/completions/agft-ray",
}
LEVELS = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status (0 fine, 1 failed, 2 bad input)."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(given, argparse.Namespace(argv=given))
    logging.basicConfig(level=LEVELS[max(-1, min(arguments.verbose - arguments.quiet, 2))])
    try:
        with _ended_by_sigterm():
            return int(arguments.command(arguments))
    except AgftError as error:
        print(f"agft-ray: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(
            f"agft-ray: {error}; this command needs the extra 'serve': "
            "pip install 'agft-ray[serve]'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as end:
        return 128 + (signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT)


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what Ctrl-C keeps and stops, it keeps and stops as well."""


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that a demo stops the cluster it started and a
    study keeps what is finished; afterwards it does what it did before."""

    def end(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _HelpFormatter(argparse.HelpFormatter):
    """Says every default, and leaves indented lines as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        is_told = default in (None, False, [], argparse.SUPPRESS) or "default" in (text or "")
        if is_told or not action.option_strings:
            return text
        return f"{text or ''} (default: %(default)s)".strip()

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(
            line if line.startswith(" ") else textwrap.fill(line, width) for line in lines
        )


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: object) -> None:
        super().__init__(**{"formatter_class": _HelpFormatter} | options)  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="agft-ray", description="Energy-aware LLM serving on Ray")
    parser.add_argument("--version", action="version", version=f"agft-ray {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more; repeatable")
    parser.add_argument("-q", "--quiet", action="count", default=0, help="log errors only")
    commands: argparse._SubParsersAction[argparse.ArgumentParser] = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=_Parser
    )
    demo.add_command(commands)
    simulate.add_command(commands, ray_pool=simulate_on_ray.ray_pool)
    for each in (report, validate, config, policies, status, doctor, reset, replay, plot):
        each.add_command(commands)
    for each in (fetch_data, calibrate, bench):
        each.add_command(commands)
    completion.add_command(commands, parser)
    for name, example in EXAMPLES.items():
        command = commands.choices[name]
        command.epilog = "\n\n".join(filter(None, (command.epilog, f"Example:\n  {example}")))
    return parser

"""The `agft-ray` command: a file a subcommand."""

from agft_ray.cli.app import main

__all__ = ["main"]

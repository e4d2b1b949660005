"""The command line: one file per command, its options beside its body; dispatch.py runs them."""

from cmmasksd.cli.dispatch import build_parser, main

__all__ = ["build_parser", "main"]

"""Entry point of the `tandem` command."""

from __future__ import annotations


def main() -> None:
    """Runs the command line."""
    raise SystemExit("tandem: no commands yet")

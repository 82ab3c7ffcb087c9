"""The `tunery` command. Everything heavy is imported by the command that needs it, so that `--help` answers at once."""

from __future__ import annotations


def main() -> None:
    """Run the command line of this process."""
    from common.cli.app import app

    app(prog_name="tunery")

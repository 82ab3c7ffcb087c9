"""`tunery doctor`: look at every part of an installation that can be seen from here, and say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from common.cli import failures, state

if TYPE_CHECKING:
    from common.cli.checks.finding import Finding


def doctor(ctx: typer.Context, output: state.Output = None) -> None:
    """Check this machine, the server and the parts behind it. The exit code is 1 if something is broken.

    The parts (database, broker, object store) are checked where their settings are in the environment, or where
    `tunery up` runs with this data directory.
    """
    from common import settings
    from common.cli.checks.machine import look_at_machine
    from common.cli.checks.parts import left_by_up, look_at_parts
    from common.cli.checks.server import look_at_server

    options = state.of(ctx)
    data_dir = options.data_dir or settings.client_address()[2]
    looks: tuple[Callable[[], list[Finding]], ...] = (
        lambda: look_at_machine(data_dir),
        lambda: look_at_server(options),
        lambda: look_at_parts(settings.Settings(**left_by_up(data_dir))),
    )
    findings: list[Finding] = []
    for look in looks:
        found = look()
        findings += found
        if not options.as_json:
            _print(found)
    if options.as_json:
        from dataclasses import asdict

        from common.cli import screen

        screen.as_json({"data": [asdict(finding) for finding in findings]})
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(failures.FAILED)


# Behind the verdict.
_INDENT = 6
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def _print(findings: list[Finding]) -> None:
    from common.cli import screen

    console = screen.stdout()
    for finding in findings:
        line = f"{finding.verdict:<4}  {finding.check}: {screen.sentence(finding.detail)}"
        style = _STYLES[finding.verdict] if finding.verdict != "ok" else None
        console.print(screen.hanging(line, console, _INDENT), style=style, soft_wrap=True)
        if finding.hint and finding.verdict != "ok":
            line = f"      → {screen.sentence(finding.hint)}"
            console.print(screen.hanging(line, console, _INDENT + 2), soft_wrap=True)

"""Remove what was named, one after the other, and say so: the same for every resource."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from common.cli import state

if TYPE_CHECKING:
    from common.client import Tunery


def remove_each(ctx: typer.Context, names: list[str], delete: Callable[[Tunery, str], None]) -> None:
    """Call `delete` for each of `names`; as JSON, they are listed when all are gone."""
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        for name in names:
            delete(client, name)
            if not options.as_json:
                typer.echo(f"removed: {screen.sentence(name)}")
    if options.as_json:
        screen.as_json({"removed": names})

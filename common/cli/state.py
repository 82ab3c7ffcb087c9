"""What the options before and after a command's name set, for every command."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from common.client import Tunery


class Format(StrEnum):
    """How results are written."""

    table = "table"
    json = "json"


@dataclass
class State:
    """The options that hold for the whole command line."""

    url: str | None = None
    data_dir: Path | None = None
    as_json: bool = False
    debug: bool = False

    def connect(self) -> Tunery:
        """Return a client for the server that is meant; raises ServerNotFound."""
        from common.client import Tunery

        return Tunery(self.url, data_dir=self.data_dir)


def of(ctx: typer.Context) -> State:
    """Return the state of the command line that `ctx` belongs to."""
    state = ctx.find_root().obj
    assert isinstance(state, State)
    return state


def _choose(ctx: typer.Context, value: Format | None) -> Any:
    if value is not None:
        of(ctx).as_json = value is Format.json
    return value


Output = Annotated[
    Format | None,
    typer.Option("--output", "-o", help="Write a table, or JSON for programs.", callback=_choose, show_default=False),
]
"""The option of every command; it is also taken before the command's name."""

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data directory of `tunery up`; otherwise TUNERY_DATA_DIR or .tunery.")
]

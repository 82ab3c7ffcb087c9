"""What the server and the child that holds the model say to each other. Standard library only: both import it.

The server writes commands to the child's standard input, the child writes messages to its standard output; both are
JSON objects, one a line. The child's folder holds `spec.json`, a `ServeSpec`.

Commands: `Load`, `Unload`, `Ask` and `Cancel`, obeyed in order; only a cancel overtakes. The child answers
`Ready` once, `Loaded` or `Refused` to a load, and to an ask either `Refused`, or `Accepted`, any number of `Piece` and
one `Finished`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from worker.trainer.protocol import SPEC_FILE, BaseRef, Failed, decoder


@dataclass(frozen=True)
class ServeSpec:
    """The base to hold, and the bounds of a batch.

    `method` and `quantization` say how the base is held, in the words of a job. A batch has at most `max_rows` answers,
    and `max_batch_tokens` tokens: rows times the longest of prompt and answer. No answer is longer than `max_tokens`.
    """

    base: BaseRef
    method: str
    quantization: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    threads: int = 0
    max_rows: int = 8
    max_batch_tokens: int = 65_536
    max_tokens: int = 4096

    def write(self, folder: Path) -> None:
        """Write `spec.json` into `folder`."""
        (folder / SPEC_FILE).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> ServeSpec:
        """Read `spec.json` from `folder`."""
        values = json.loads((folder / SPEC_FILE).read_text())
        return cls(**{**values, "base": BaseRef(**values["base"])})


@dataclass(frozen=True)
class Load:
    """Load the weighted sum of the adapters in the folders of `parts`, or the one there is.

    torch keeps adapters as attributes of modules: `name` has no dot and is no word that they use (as `half`).
    """

    name: str
    parts: list[tuple[str, float]]


@dataclass(frozen=True)
class Unload:
    """Forget an adapter."""

    name: str


@dataclass(frozen=True)
class Ask:
    """Answer `messages` with the adapter of that name, or with the bare base. Tenants take turns."""

    id: str
    adapter: str | None
    messages: list[dict[str, str]]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    tenant: str = ""


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for that answer any more."""

    id: str


Command = Load | Unload | Ask | Cancel
_COMMANDS: dict[str, type[Command]] = {kind.__name__.lower(): kind for kind in (Load, Unload, Ask, Cancel)}


def written(command: Command) -> dict[str, Any]:
    """Return `command` as it is sent."""
    return {"do": type(command).__name__.lower(), **asdict(command)}


def read(values: dict[str, Any]) -> Command:
    """Return the command that was sent as `values`."""
    return _COMMANDS[values["do"]](**{name: value for name, value in values.items() if name != "do"})


@dataclass(frozen=True)
class Ready:
    """The base is loaded: how many tokens it can look back on, where it lies, in which format, in how many bytes."""

    type: ClassVar[str] = "ready"
    context: int | None
    device: str
    precision: str
    bytes: int


@dataclass(frozen=True)
class Loaded:
    """The adapter is loaded and takes so many bytes."""

    type: ClassVar[str] = "loaded"
    name: str
    bytes: int


@dataclass(frozen=True)
class Refused:
    """The load or ask of that name or id is not possible; whoever sent it can mend it."""

    type: ClassVar[str] = "refused"
    of: str
    code: str
    message: str
    hint: str | None = None
    param: str | None = None


@dataclass(frozen=True)
class Accepted:
    """The prompt has so many tokens; an answer will follow."""

    type: ClassVar[str] = "accepted"
    id: str
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """The answer goes on with `text`."""

    type: ClassVar[str] = "piece"
    id: str
    text: str


@dataclass(frozen=True)
class Finished:
    """The answer is at its end: `stop`, `length` or `cancelled`. The token that ended it is counted."""

    type: ClassVar[str] = "finished"
    id: str
    reason: str
    completion_tokens: int


Message = Ready | Loaded | Refused | Accepted | Piece | Finished | Failed
decode: Callable[[bytes], Message] = decoder(Ready, Loaded, Refused, Accepted, Piece, Finished, Failed)

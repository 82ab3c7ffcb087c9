"""What a supervisor and its child process say to each other. Standard library only: the supervisor imports this too.

The supervisor writes commands to the child's standard input, the child writes messages to the pipe that it got as
standard output; both are JSON objects, one a line. The folder of a run holds everything else:

    spec.json            TrainSpec, written by the supervisor
    dataset/             training and validation file, as fetched
    resume/              a checkpoint to go on from, complete or absent
    adapter/             the published adapter of the job that is exported
    checkpoints/         written by the child: `step-00000020/` with `manifest.json` inside, renamed into place
    out/adapter/         the adapter; out/merged…/ merged models; out/reports/ what was measured

Commands:   {"do": "run"}   {"do": "stop"}   {"do": "deadline", "monotonic": 1234.5}
`stop` asks for a checkpoint at the next step and exit 75. `deadline` is the moment, on CLOCK_MONOTONIC (the same for
every process of a machine), by which the child must have left unless a later deadline arrives: the lease's self-fence.

A child that is allowed to may stay after a run, with its base in memory, and says `idle`. It is given its next run by
{"do": "run", "folder": "…", "monotonic": 1234.5}. Commands may name the run that they mean by its folder's name,
"run": "…": one that arrives after that run is passed over.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol, TypeVar

# Exit codes; anything else, and death by a signal, is a fault of the infrastructure.
DONE = 0
DISK_FULL = 28
BAD_INPUT = 64
BAD_CHECKPOINT = 65
DIVERGED = 66
DEVICE_FAULT = 70
DRAINED = 75
OUT_OF_MEMORY = 77

# What decides the numbers of a run, besides its base and its data.
_SHAPING = (
    "method",
    "hyperparameters",
    "lora",
    "quantization",
    "seed",
    "validation_dataset",
    "validation_split",
    "chat_template",
)

SPEC_FILE = "spec.json"
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class BaseRef:
    """The base model: where its files lie, and the name that an adapter must carry to be loaded elsewhere."""

    path: str
    id: str
    revision: str | None = None


@dataclass(frozen=True)
class CacheRef:
    """The folder in which this machine keeps bases in 4 bit, and its bounds: of it, and of the disk that stays free."""

    path: str
    most_bytes: int
    reserve_bytes: int


@dataclass(frozen=True)
class TrainSpec:
    """One attempt at one job. `job` is the frozen JobSpec; paths other than the base's are relative to the folder.

    `shrink` is the out-of-memory ladder: the micro-batch is halved that many times and accumulation doubled.
    `limits` bounds the dataset: max_bytes, max_row_bytes, max_rows; what it leaves out has a default.
    `keep`: after the run the process may stay, with its base in memory, for another run over the same base.
    `adapter` is the folder of a published adapter, that of `source_job`: then nothing is trained, and merged models are
    made of it. The dataset of such a job may be gone, which leaves `train_file` empty.
    `cache`: where the base may lie in 4 bit already, None: nowhere. `claimed_at`: when the job was claimed, on
    CLOCK_MONOTONIC.
    """

    job_id: str
    attempt: int
    job: dict[str, Any]
    base: BaseRef
    train_file: str
    train_sha256: str
    validation_file: str | None = None
    resume_from: str | None = None
    device: str = "auto"
    threads: int = 0
    shrink: int = 0
    limits: dict[str, int] = field(default_factory=dict)
    adapter: str | None = None
    source_job: str | None = None
    keep: bool = False
    cache: CacheRef | None = None
    claimed_at: float | None = None

    @property
    def config_hash(self) -> str:
        """The hash over what decides the numbers of this run: a checkpoint of another one must not be gone on from.

        Of the job as it was accepted, so that it stays the same where a newer version knows more fields.
        """
        shaping = {name: self.job[name] for name in _SHAPING if name in self.job}
        parts = (shaping, self.base.id, self.base.revision, self.train_sha256)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write `spec.json` into `folder`."""
        (folder / SPEC_FILE).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> TrainSpec:
        """Read `spec.json` from `folder`."""
        values = json.loads((folder / SPEC_FILE).read_text())
        cache = CacheRef(**values["cache"]) if values.get("cache") else None
        return cls(**{**values, "base": BaseRef(**values["base"]), "cache": cache})

    def base_key(self) -> str | None:
        """Return what a base in memory must have been loaded by to serve this run; None if none may be kept for it."""
        if not self.keep or self.adapter is not None or self.job.get("method") == "full":
            return None
        asked = [self.job.get("method"), self.job.get("quantization"), self.device]
        return json.dumps([self.base_identity(), asked], sort_keys=True)

    def base_identity(self) -> list[Any]:
        """Return what tells this base from every other one: its names, and its files.

        The files count by size and time: an operator may have put another model into the same folder.
        """
        root = Path(self.base.path)
        found = ((path.relative_to(root).as_posix(), path.stat()) for path in sorted(root.rglob("*")) if path.is_file())
        return [asdict(self.base), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]]


@dataclass(frozen=True)
class Stage:
    """The child entered a stage: prepare, train, evaluate, export."""

    type: ClassVar[str] = "stage"
    stage: str


@dataclass(frozen=True)
class Note:
    """An event for the job's history, e.g. which loss was chosen or what an option was replaced by."""

    type: ClassVar[str] = "event"
    name: str
    message: str
    level: str = "info"
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where the run is. Tokens per second count real tokens only: no padding."""

    type: ClassVar[str] = "progress"
    step: int
    max_steps: int
    tokens_per_s: float | None = None
    eta_s: float | None = None


@dataclass(frozen=True)
class Checked:
    """How far the check of the rows is: at which row of the file that `param` names, and how far into all of them."""

    type: ClassVar[str] = "checked"
    param: str
    rows: int
    bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Metrics:
    """Values logged at a step; `kind` is train or eval."""

    type: ClassVar[str] = "metrics"
    step: int
    values: dict[str, float]
    kind: str = "train"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint is complete on disk; `folder` is relative to the run's folder."""

    type: ClassVar[str] = "checkpoint"
    step: int
    folder: str


@dataclass(frozen=True)
class Result:
    """The run is done and `out/` is complete. `report` goes into the job's record."""

    type: ClassVar[str] = "result"
    report: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """Why the child will exit with an error code; `code` is a stable word for programs.

    `problems` are the first of the `num_problems` rows that are wrong, as the fields of `JobProblem`.
    """

    type: ClassVar[str] = "error"
    code: str
    message: str
    hint: str | None = None
    param: str | None = None
    problems: list[dict[str, Any]] = field(default_factory=list)
    num_problems: int = 0


@dataclass(frozen=True)
class Idle:
    """The run has ended as with exit code 0, and the child waits for another one over the same base."""

    type: ClassVar[str] = "idle"


Message = Stage | Note | Progress | Checked | Metrics | Checkpoint | Result | Failed | Idle


class Said(Protocol):
    """A message of any child: a dataclass whose `type` is its name on the wire."""

    type: ClassVar[str]


M = TypeVar("M", bound=Said)


class Sender:
    """Writes messages to the supervisor. Safe to use from several threads."""

    def __init__(self, pipe: BinaryIO):
        self._pipe = pipe
        self._lock = threading.Lock()

    def __call__(self, message: Said) -> None:
        """Write `message` as one line and flush it."""
        with self._lock:
            self._pipe.write(encode(message))
            self._pipe.flush()


def encode(message: Said) -> bytes:
    """Return `message` as one line of JSON."""
    values: Any = message
    return json.dumps({"type": message.type, **asdict(values)}, allow_nan=False).encode() + b"\n"


def decoder(*kinds: type[M]) -> Callable[[bytes], M]:
    """Return a function that reads messages of these kinds from lines, and raises ValueError for any other line."""
    known = {kind.type: kind for kind in kinds}

    def decode(line: bytes) -> M:
        try:
            values = json.loads(line)
            if b"\\u" in line:
                values = _storable(values)
            kind: Any = known[values.pop("type")]
            names = {item.name for item in fields(kind)}
            message: M = kind(**{name: value for name, value in values.items() if name in names})
            return message
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a message of the protocol: {line[:200]!r}") from error

    return decode


def _storable(value: Any) -> Any:
    """Return a JSON value with U+FFFD for what a database refuses: NUL and halves of surrogate pairs."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return [_storable(item) for item in value] if isinstance(value, list) else value


decode: Callable[[bytes], Message] = decoder(Stage, Note, Progress, Checked, Metrics, Checkpoint, Result, Failed, Idle)

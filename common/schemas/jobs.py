"""What a job is asked for (`JobSpec`) and how it is shown (`JobRead`): shared by API, client and worker."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, Field, model_validator

from common.errors import JobProblem
from common.schemas.exports import Exports
from common.schemas.hyperparameters import Hyperparameters
from common.schemas.lora import Lora, Quantization
from common.schemas.methods import Method, check_parts, fill_in
from common.schemas.values import Priority, Strict, Text, no_nul

Status = Literal["validating", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})

_MODEL = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?(@[\w./-]{1,128})?", re.ASCII)
_SCHEMES = ("s3://", "https://", "hf://", "dataset:", "file://")


def _model_name(value: str) -> str:
    if not _MODEL.fullmatch(value) or ".." in value:
        raise ValueError(
            "is neither a hub id (org/name or org/name@revision) nor the plain name of a folder under TUNERY_MODEL_DIR"
        )
    return value


def _dataset_uri(value: str) -> str:
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise ValueError("contains control characters")
    # Elsewhere a name is taken as it stands, blanks and percent signs included.
    if " " in value and value.startswith("https://"):
        raise ValueError("contains blanks; write each as %20")
    if not value.startswith(_SCHEMES):
        raise ValueError(
            f"must start with one of {', '.join(_SCHEMES)}; POST /datasets uploads a file and answers its id"
        )
    return value


ModelName = Annotated[str, Field(max_length=256), AfterValidator(_model_name)]
DatasetUri = Annotated[str, Field(max_length=2048), AfterValidator(no_nul), AfterValidator(_dataset_uri)]
Suffix = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
# The longest of a known family has some 17,000 characters.
ChatTemplate = Annotated[Text, Field(min_length=1, max_length=65_536)]
# Asked at each checkpoint: the request's own, or the first validation rows.
SamplePrompts = (
    Annotated[list[Annotated[Text, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=8)]
    | Literal["validation"]
)
Metadata = Annotated[
    dict[Annotated[Text, Field(min_length=1, max_length=64)], Annotated[Text, Field(max_length=512)]],
    Field(max_length=16),
]


def _within_reason(value: datetime) -> datetime:
    if not 2000 <= value.year < 2200:
        raise ValueError("is not between the years 2000 and 2200")
    return value


# Not strict: JSON has no type for a time. ISO 8601, with its offset from UTC.
NotBefore = Annotated[AwareDatetime, Field(strict=False), AfterValidator(_within_reason)]


class JobSpec(Strict):
    """The body of `POST /jobs`: what was asked, frozen when it was accepted."""

    model: ModelName
    dataset: DatasetUri
    validation_dataset: DatasetUri | None = None
    validation_split: Annotated[float, Field(gt=0, le=0.5)] | None = None
    method: Method = "qlora"
    suffix: Suffix | None = None
    chat_template: ChatTemplate | None = None
    sample_prompts: SamplePrompts | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    lora: Lora | None = None
    quantization: Quantization | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    priority: Priority = 0
    not_before: NotBefore | None = None
    metadata: Metadata = {}
    export: Exports = ["adapter"]

    @model_validator(mode="before")
    @classmethod
    def _method_adds_its_parts(cls, data: Any) -> Any:
        return fill_in(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _parts_fit_the_method(self) -> JobSpec:
        check_parts(self.method, self.lora, self.quantization, self.export)
        return self

    @model_validator(mode="after")
    def _validation_is_there(self) -> JobSpec:
        if self.validation_dataset is not None and self.validation_split is not None:
            raise ValueError("validation_split: validation_dataset names other rows; give one of the two")
        if self.validated:
            return self
        for name in ("early_stopping_patience", "load_best_model_at_end"):
            if getattr(self.hyperparameters, name) not in (0, False, "auto"):
                raise ValueError(f"hyperparameters.{name}: needs a validation_dataset or a validation_split")
        if self.sample_prompts == "validation":
            raise ValueError('sample_prompts: "validation" needs a validation_dataset or a validation_split')
        return self

    @property
    def validated(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.validation_dataset is not None or self.validation_split is not None


class JobOrder(Strict):
    """The body of `PATCH /jobs/{id}`: where a waiting job stands. What is left out stays; null lifts `not_before`."""

    priority: Priority | None = None
    not_before: NotBefore | None = None

    @model_validator(mode="after")
    def _changes_a_field(self) -> JobOrder:
        if "priority" in self.model_fields_set and self.priority is None:
            raise ValueError("priority: null is no priority; leave it out to keep it")
        if not self.model_fields_set:
            raise ValueError("name at least one of priority and not_before")
        return self


class JobError(BaseModel):
    """Why a job failed.

    Where rows of its data are wrong, `num_problems` says how many, and `problems`, of a single job and not in lists,
    tells the first hundred.
    """

    code: str
    message: str
    hint: str | None = None
    param: str | None = None
    problems: list[JobProblem] = []
    num_problems: int = 0


WaitCode = Literal[
    "checking",
    "no_checker",
    "checkers_busy",
    "retry_pause",
    "not_before",
    "paused",
    "quota_running",
    "quota_gpu_hours",
    "no_worker",
    "workers_busy",
    "fair_share",
    "worker_free",
]


class WaitsFor(BaseModel):
    """What a job waits for: a word for programs, a sentence for people, and when it ends, where that is known."""

    code: WaitCode
    message: str
    until: datetime | None = None


class CheckProgress(BaseModel):
    """How far the check of a job's rows is.

    `rows` are read of the file that the job's field `param` names, `bytes` of all that has to be read, `total_bytes`:
    a file that is split is read twice.
    """

    param: str
    rows: int
    bytes: int
    total_bytes: int


class JobRead(BaseModel):
    """A job as it is shown. Times are UTC.

    `checked` is told once a check has taken a second, until it ends.

    `position` (1 is claimed next), `waits_for` and `expected_start` are told of a single job that waits, not in lists;
    position and start only where they can be said. `source_job` is the job whose adapter an export merges.
    """

    id: str
    source_job: str | None = None
    status: Status
    stage: str | None
    checked: CheckProgress | None = None
    step: int
    max_steps: int | None
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    model: str
    base_revision: str | None
    dataset: str
    validation_dataset: str | None
    validation_split: float | None = None
    method: str
    suffix: str | None
    chat_template: str | None = None
    sample_prompts: list[str] | str | None = None
    hyperparameters: Hyperparameters
    lora: Lora | None
    quantization: Quantization | None
    seed: int
    priority: int
    not_before: datetime | None = None
    metadata: dict[str, str]
    export: list[str]
    desired: Literal["run", "pause", "cancel"]
    attempt: int
    worker: str | None
    error: JobError | None
    report: dict[str, Any] | None
    created_at: datetime
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    position: int | None = None
    waits_for: WaitsFor | None = None
    expected_start: datetime | None = None


class JobList(BaseModel):
    """One page of jobs, newest first; `next` is the value of `after` for the next page."""

    data: list[JobRead]
    has_more: bool
    next: str | None


class Event(BaseModel):
    """Something that happened to a job, past tense. `id` is the cursor."""

    id: int
    at: datetime
    name: str
    level: Literal["info", "warning", "error"]
    message: str
    data: dict[str, Any]


class EventList(BaseModel):
    """Events in order; `next` is the value of `after` for what follows."""

    data: list[Event]
    has_more: bool
    next: int


class Metric(BaseModel):
    """Values logged at a step. `id` is a cursor in the same sequence as the events'."""

    id: int
    at: datetime
    step: int
    kind: Literal["train", "eval"]
    values: dict[str, float]


class MetricList(BaseModel):
    """Metrics in order; a step that was repeated after a resume appears once, as the last attempt saw it."""

    data: list[Metric]
    has_more: bool
    next: int


class Artifact(BaseModel):
    """One published file and a signed link to it."""

    name: str
    bytes: int
    sha256: str
    url: str


class ArtifactList(BaseModel):
    """Every published file of a job."""

    data: list[Artifact]

"""What a job is asked for (`JobSpec`) and how it is shown (`JobRead`): shared by API, client and worker.

Hyperparameters carry the names that Hugging Face users type; `worker/ml` maps them to what the libraries call them now.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Auto = Literal["auto"]

STATUSES = ("validating", "queued", "running", "paused", "succeeded", "failed", "cancelled")
Status = Literal["validating", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})

_MODEL = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?(@[\w./-]{1,128})?", re.ASCII)
_SCHEMES = ("s3://", "https://", "hf://", "dataset:", "file://")
_TARGET_LIST_MAX = 256


def _model_name(value: str) -> str:
    if not _MODEL.fullmatch(value) or ".." in value:
        raise ValueError(
            "is neither a hub id (org/name or org/name@revision) nor the plain name of a folder under TUNERY_MODEL_DIR"
        )
    return value


def _dataset_uri(value: str) -> str:
    if any(ord(character) < 33 or ord(character) == 127 for character in value):
        raise ValueError("contains blanks or control characters; percent-encode them")
    if not value.startswith(_SCHEMES):
        raise ValueError(
            f"must start with one of {', '.join(_SCHEMES)}; POST /datasets uploads a file and answers its id"
        )
    return value


def _no_nul(value: str) -> str:
    if "\x00" in value or any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise ValueError("contains a NUL or a lone surrogate, which no database stores")
    return value


Text = Annotated[str, AfterValidator(_no_nul)]
ModelName = Annotated[str, Field(max_length=256), AfterValidator(_model_name)]
DatasetUri = Annotated[str, Field(max_length=2048), AfterValidator(_no_nul), AfterValidator(_dataset_uri)]
Suffix = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Metadata = Annotated[
    dict[Annotated[Text, Field(min_length=1, max_length=64)], Annotated[Text, Field(max_length=512)]],
    Field(max_length=16),
]

Optimizer = Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused"]
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


class _Strict(BaseModel):
    # A float that is not finite would be stored as JSON that no other parser reads.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Hyperparameters(_Strict):
    """How to train. Each takes `"auto"`, which leaves the choice to the worker; an event says what it chose."""

    num_train_epochs: Annotated[float, Field(gt=0, le=1000)] | Auto = 1.0
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Auto = 2e-4
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=1024)] | Auto = 4
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] | Auto = 4
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | Auto = "auto"
    max_steps: Annotated[int, Field(ge=-1, le=10_000_000)] | Auto = -1
    save_steps: Annotated[int, Field(ge=1, le=10_000_000)] | Auto = "auto"
    eval_steps: Annotated[int, Field(ge=1, le=10_000_000)] | Auto = "auto"
    logging_steps: Annotated[int, Field(ge=1, le=10_000_000)] | Auto = 10
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | Auto = 0.0
    lr_scheduler_type: Schedule | Auto = "linear"
    weight_decay: Annotated[float, Field(ge=0, le=1)] | Auto = 0.0
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] | Auto = 1.0
    optim: Optimizer | Auto = "paged_adamw_8bit"
    gradient_checkpointing: bool | Auto = True
    group_by_length: bool | Auto = True
    packing: bool | Auto = False

    @model_validator(mode="after")
    def _some_step(self) -> Hyperparameters:
        if self.max_steps == 0:
            raise ValueError("max_steps: 0 trains nothing; use -1 for no limit, or a positive number")
        return self


class Lora(_Strict):
    """The adapter. `target_modules` is a list of module names, a regular expression, or `all-linear`."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    lora_alpha: Annotated[float, Field(gt=0, le=65536)] = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: (
        Annotated[
            list[Annotated[Text, Field(min_length=1, max_length=200)]], Field(min_length=1, max_length=_TARGET_LIST_MAX)
        ]
        | Annotated[Text, Field(min_length=1, max_length=500)]
    ) = ["q_proj", "k_proj", "v_proj", "o_proj"]

    @field_validator("target_modules")
    @classmethod
    def _is_a_pattern(cls, value: list[str] | str) -> list[str] | str:
        # Compiled again where the adapter is attached, on a GPU worker: too late to say that it is broken.
        try:
            return value if isinstance(value, list) else re.compile(value).pattern
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is not a regular expression ({error}); a list of names needs none") from error


class Quantization(_Strict):
    """How the frozen base is held: bitsandbytes' names."""

    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    bnb_4bit_use_double_quant: bool = True


class JobSpec(_Strict):
    """The body of `POST /jobs`: what was asked, frozen when it was accepted."""

    model: ModelName
    dataset: DatasetUri
    validation_dataset: DatasetUri | None = None
    method: Literal["qlora", "lora"] = "qlora"
    suffix: Suffix | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    lora: Lora = Lora()
    quantization: Quantization | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    metadata: Metadata = {}
    export: Annotated[list[Literal["adapter"]], Field(min_length=1, max_length=1)] = ["adapter"]

    @model_validator(mode="before")
    @classmethod
    def _quantization_follows_method(cls, data: Any) -> Any:
        # Filled in before validation, so that the frozen spec says what will be done.
        if isinstance(data, dict) and data.get("quantization") is None and data.get("method", "qlora") == "qlora":
            return {**data, "quantization": {}}
        return data

    @model_validator(mode="after")
    def _method_and_quantization_agree(self) -> JobSpec:
        four_bit = self.quantization is not None and self.quantization.load_in_4bit
        if self.method == "qlora" and not four_bit:
            raise ValueError(
                'quantization.load_in_4bit: method "qlora" needs true; use method "lora" for a 16-bit base'
            )
        if self.method == "lora" and four_bit:
            raise ValueError('quantization.load_in_4bit: method "lora" keeps the base in 16 bit; use method "qlora"')
        return self


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    hint: str | None = None
    param: str | None = None


class JobRead(BaseModel):
    """A job as it is shown. Times are UTC."""

    id: str
    status: Status
    stage: str | None
    step: int
    max_steps: int | None
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    model: str
    base_revision: str | None
    dataset: str
    validation_dataset: str | None
    method: str
    suffix: str | None
    hyperparameters: Hyperparameters
    lora: Lora
    quantization: Quantization | None
    seed: int
    priority: int
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

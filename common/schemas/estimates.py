"""What a job would take, before it is submitted: shared by API, client and command."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel


class TokenEstimate(BaseModel):
    """The dataset in tokens, of one epoch. `counted`: by the check of `job`. `sampled`: told from characters.

    `tokens` lies between `low` and `high`; `train_tokens` are those of all epochs.
    """

    source: Literal["counted", "sampled"]
    job: str | None = None
    rows: int
    tokens: int
    low: int
    high: int
    longest_row_tokens: int
    train_tokens: int | None = None


class MemoryEstimate(BaseModel):
    """Bytes by part at the peak of a step, on `device`, for its largest micro-batch.

    `allocated_bytes` is what torch's allocator reserves, `total_bytes` has the device's context besides; `paged_bytes`
    of optimizer state leave the card where there is no room, and are in neither.
    """

    device: str
    rows: int
    length: int
    checkpointed_layers: int
    parts: dict[str, int]
    paged_bytes: int
    allocated_bytes: int
    total_bytes: int


class WorkerEstimate(BaseModel):
    """A job on one known worker. `fits` and `duration_s` are null where they cannot be told; `message` says why.

    It fits what is free of the card (`free_bytes`), as far as that is known. Batch and checkpointing are what the job
    would have there: `gradient_checkpointing` is every how many layers, 0 for none. `tokens_per_s` is the median of
    succeeded jobs on the same base, with the same method, on such a card.
    """

    id: str
    name: str
    state: str
    device_name: str | None
    vram_bytes: int | None
    free_bytes: int | None = None
    fits: bool | None
    total_bytes: int | None
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    gradient_checkpointing: int | None = None
    tokens_per_s: float | None = None
    duration_s: float | None = None
    message: str | None = None


class JobEstimate(BaseModel):
    """The answer to `POST /jobs/estimate`. Nothing was created.

    What is null could not be told, and `unknown` has a sentence for it by the field's name. `position` is the place in
    the queue if the job were there now.
    """

    tokens: TokenEstimate | None
    steps: int | None
    memory: MemoryEstimate | None
    workers: list[WorkerEstimate]
    position: int | None
    not_before: datetime | None = None
    unknown: dict[str, str] = {}

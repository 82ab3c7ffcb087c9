"""How to train, in the names that Hugging Face users type; `worker/ml` maps them to what the libraries call them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.schemas.values import Auto, Strict

Optimizer = Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused"]
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


class Hyperparameters(Strict):
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
    loss: Literal["all", "completion", "assistant"] | Auto = "auto"

    @model_validator(mode="after")
    def _some_step(self) -> Hyperparameters:
        if self.max_steps == 0:
            raise ValueError("max_steps: 0 trains nothing; use -1 for no limit, or a positive number")
        return self

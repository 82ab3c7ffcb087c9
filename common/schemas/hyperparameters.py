"""How to train, in the names that Hugging Face users type; `worker/ml` maps them to what the libraries call them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.schemas.values import Auto, Strict

# Those that resume bit for bit and need no further package. (Adafactor's state comes back in the weights' dtype.)
Optimizer = Literal[
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adamw_8bit",
    "adamw_torch",
    "adamw_torch_fused",
    "ademamix_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
]
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
ADAPTER_LEARNING_RATE = 2e-4


class Hyperparameters(Strict):
    """How to train. Each takes `"auto"`, which leaves the choice to the worker; an event says what it chose."""

    num_train_epochs: Annotated[float, Field(gt=0, le=1000)] | Auto = 1.0
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Auto = ADAPTER_LEARNING_RATE
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=1024)] | Auto = 4
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] | Auto = 4
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | Auto = "auto"
    max_steps: Annotated[int, Field(ge=-1, le=10_000_000)] | Auto = -1
    save_steps: Annotated[int, Field(ge=1, le=10_000_000)] | Auto = "auto"
    eval_steps: Annotated[int, Field(ge=1, le=10_000_000)] | Auto = "auto"
    logging_steps: Annotated[int, Field(ge=1, le=10_000_000)] | Auto = 10
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | Auto = 0.0
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)] | Auto = 0
    lr_scheduler_type: Schedule | Auto = "linear"
    weight_decay: Annotated[float, Field(ge=0, le=1)] | Auto = 0.0
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] | Auto = 1.0
    optim: Optimizer | Auto = "paged_adamw_8bit"
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] | Auto = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] | Auto = 0.999
    adam_epsilon: Annotated[float, Field(gt=0, le=1)] | Auto = 1e-8
    neftune_noise_alpha: Annotated[float, Field(ge=0, le=1000)] | Auto = 0.0
    gradient_checkpointing: bool | Annotated[int, Field(ge=1, le=1000)] | Auto = True
    group_by_length: bool | Auto = True
    packing: bool | Literal["bfd", "wrapped"] | Auto = False
    kernels: Literal["auto", "plain", "fused"] = "auto"
    fp8: bool | Auto = False
    max_memory_gib: Annotated[float, Field(gt=0, le=10_000)] | Auto = "auto"
    loss: Literal["all", "completion", "assistant"] | Auto = "auto"
    early_stopping_patience: Annotated[int, Field(ge=0, le=1000)] | Auto = 0
    early_stopping_threshold: Annotated[float, Field(ge=0, le=1000)] | Auto = 0.0
    load_best_model_at_end: bool | Auto = "auto"
    max_loss_ratio: Annotated[float, Field(ge=0, le=1000)] | Auto = 3.0

    @model_validator(mode="after")
    def _steps_agree(self) -> Hyperparameters:
        if self.max_loss_ratio != "auto" and 0 < self.max_loss_ratio <= 1:
            raise ValueError("max_loss_ratio: the loss would be above that at once; use 0 for never, or more than 1")
        if self.max_steps == 0:
            raise ValueError("max_steps: 0 trains nothing; use -1 for no limit, or a positive number")
        if self.warmup_steps not in (0, "auto") and self.warmup_ratio not in (0, "auto"):
            raise ValueError("warmup_steps: warmup_ratio says how long the warm-up is too; give one of them")
        return self
